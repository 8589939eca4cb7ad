import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import FormatError
from gptjax.formats.token_shards import open_shard, write_shard


def test_what_is_written_is_read_back(tmp_path):
    ids = np.array([0, 1, 50256, 65535])
    write_shard(tmp_path / "train.bin", ids)
    shard = open_shard(tmp_path / "train.bin")
    np.testing.assert_array_equal(shard.tokens, ids)
    assert isinstance(shard.tokens, np.memmap)
    assert [p.name for p in tmp_path.iterdir()] == ["train.bin"]


def test_bytes_are_llm_cs(tmp_path):
    """256 int32 of header, then uint16, little-endian."""
    write_shard(tmp_path / "x.bin", [50256, 1])
    content = (tmp_path / "x.bin").read_bytes()
    assert len(content) == 1024 + 4
    assert content[:12] == bytes.fromhex("88d83401 01000000 02000000")  # 20240520, 1, 2
    assert content[1024:] == bytes.fromhex("50c4 0100")


def test_tinyshakespeare_as_llm_c_wrote_it(shared, tmp_path):
    path = shared / "tinyshakespeare" / "tiny_shakespeare_val.bin"
    shard = open_shard(path)
    assert shard.tokens.size == 32768
    assert shard.tokens[:6].tolist() == [50256, 5962, 22307, 25, 198, 8421]
    write_shard(tmp_path / "again.bin", shard.tokens)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("ids", [[-1], [65536]])
def test_ids_that_do_not_fit(tmp_path, ids):
    with pytest.raises(ValueError, match=r"0\.\.65535"):
        write_shard(tmp_path / "x.bin", ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "truncated: its header announces 3 tokens, 1030 bytes, but the file has 1029"),
        (lambda b: b + b"xx", "malformed: its header announces 3 tokens, 1030 bytes, but the file has 1032"),
        (lambda b: b[:1000], "truncated: 1000 bytes"),
        (lambda b: b"", "truncated: 0 bytes"),
        (lambda b: b"PK" + b[2:], "not a token shard"),
        (lambda b: b[:4] + b"\x02" + b[5:], "not a token shard: it begins 20240520, 2"),
        (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "malformed: its header announces -1 tokens"),
        (lambda b: b[:8] + b"\xff\xff\xff\x7f" + b[12:], "announces 2147483647 tokens"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    path = tmp_path / "val.bin"
    write_shard(path, [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


def test_missing_shard(tmp_path):
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        open_shard(tmp_path / "none.bin")


@given(st.binary(max_size=1100))
def test_arbitrary_bytes_raise_only_the_format_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        open_shard(path)
