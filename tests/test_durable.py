import pytest

from gptjax.files import set_aside, write_folder, write_whole


def test_a_file_appears_once_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with write_whole(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), write_whole(path) as file:
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt"), write_whole(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")


def test_a_folder_appears_once_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "folder"

    def fill(into):
        (into / "a.txt").write_text("one")
        assert not folder.exists()

    assert (write_folder(folder, fill) / "a.txt").read_text() == "one"

    def fail(into):
        (into / "a.txt").write_text("two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new" / "other", fail)
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def test_two_that_make_the_same_folder(tmp_path):
    """The one that comes second is content with the first one's."""

    def fill(into):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.txt").write_text("first")
        (into / "a.txt").write_text("second")

    write_folder(tmp_path / "folder", fill)
    assert (tmp_path / "folder" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_is_set_aside_again_gets_a_name_of_its_own(tmp_path):
    for content in ("a", "b", "c"):
        (tmp_path / "step_00000004").mkdir()
        (tmp_path / "step_00000004" / "x").write_text(content)
        set_aside(tmp_path / "step_00000004")
    kept = {path.name: (path / "x").read_text() for path in tmp_path.iterdir()}
    assert kept == {"damaged-step_00000004": "a", "damaged-step_00000004-2": "b", "damaged-step_00000004-3": "c"}
