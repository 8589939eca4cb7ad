"""Reading what is a file and no more, and writing what appears whole or not at all."""

import os

import pytest

from gptjax.errors import FormatError
from gptjax.files import (
    check_file,
    open_file,
    read_small,
    read_text,
    set_aside,
    write_folder,
    write_whole,
)

# Reading


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "a").write_bytes("Zoë\r\n\r".encode())
    (tmp_path / "b").symlink_to("a")
    check_file(tmp_path / "b")
    with open_file(tmp_path / "b") as file:
        assert file.read() == "Zoë\r\n\r".encode()
    assert read_text(tmp_path / "b", 8) == "Zoë\n\n"


def test_larger_files_are_refused_even_without_a_known_size(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert read_small(tmp_path / "a", 100) == bytes(100)
    for path in (tmp_path / "a", "/proc/self/maps"):
        with pytest.raises(FormatError, match="more than the 99 bytes"):
            read_small(path, 99)


@pytest.mark.parametrize(
    ("path", "kind"), [("/dev/zero", "a device"), ("pipe", "a named pipe"), (".", "a folder")]
)
@pytest.mark.parametrize("read", [open_file, check_file, lambda path: read_small(path, 9)])
def test_nothing_else_is_opened(path, kind, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(FormatError, match=f"{path} cannot be read: it is {kind}, not a file"):
        read(path)


def test_what_is_replaced_before_it_is_opened(tmp_path, monkeypatch):
    """The check comes first, and the file that was opened is checked again."""
    os.mkfifo(tmp_path / "a")
    monkeypatch.setattr("gptjax.files.check_file", lambda path: None)
    with pytest.raises(FormatError, match="a named pipe"):
        open_file(tmp_path / "a")


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "a")


# Writing


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
    with (
        pytest.raises(OSError, match=r"No space left on device: .*a\.txt"),
        write_whole(tmp_path / "a.txt"),
    ):
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
    assert kept == {
        "damaged-step_00000004": "a",
        "damaged-step_00000004-2": "b",
        "damaged-step_00000004-3": "c",
    }
