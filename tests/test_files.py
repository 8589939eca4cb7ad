import os

import pytest

from gptjax.errors import FormatError
from gptjax.files import check_file, open_file, read_small, read_text


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "a").write_bytes("Zoë\r\n\r".encode())
    (tmp_path / "b").symlink_to("a")
    check_file(tmp_path / "b")
    with open_file(tmp_path / "b") as file:
        assert file.read() == "Zoë\r\n\r".encode()
    assert read_text(tmp_path / "b", 8) == "Zoë\n\n"


def test_what_is_larger_is_refused_also_where_its_size_is_not_known(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert read_small(tmp_path / "a", 100) == bytes(100)
    for path in (tmp_path / "a", "/proc/self/maps"):
        with pytest.raises(FormatError, match="more than the 99 bytes"):
            read_small(path, 99)


@pytest.mark.parametrize(("path", "kind"), [("/dev/zero", "a device"), ("pipe", "a named pipe"), (".", "a folder")])
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
