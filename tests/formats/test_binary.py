import numpy as np
import pytest

from gptjax.errors import FormatError
from gptjax.formats.binary import check_size, read_header, write_file


def test_header_and_arrays_without_gaps(tmp_path):
    write_file(tmp_path / "x", [1, 2], [np.arange(3, dtype="<i4"), np.array([[1.5]], "<f4").T])
    header, size = read_header(tmp_path / "x", "file")
    assert header == [1, 2] + 254 * [0]
    assert size == 1024 + 12 + 4
    assert (tmp_path / "x").read_bytes()[1024:] == bytes.fromhex(
        "00000000 01000000 02000000 0000c03f"
    )


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """As a full disk does: in the middle, with an error of the system."""
    (tmp_path / "x").write_bytes(b"before")

    def arrays():
        yield np.zeros(10)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*x'"):
        write_file(tmp_path / "x", [], arrays())
    assert (tmp_path / "x").read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("size", "word"), [(9, "truncated"), (11, "malformed")])
def test_sizes(tmp_path, size, word):
    check_size(tmp_path / "x", "file", 10, 10, "ten")
    with pytest.raises(
        FormatError,
        match=f"x is {word}: its header announces ten, 10 bytes, but the file has {size}",
    ):
        check_size(tmp_path / "x", "file", size, 10, "ten")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FormatError, match="cannot be read: it is a folder"):
        read_header(tmp_path, "file")
