import contextlib

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
        (lambda b: b"", "not a token shard: .* but it has 0 bytes"),
        (lambda b: b"\x00\x01\x02", "not a token shard: .* but it has 3 bytes"),
        (lambda b: (20240326).to_bytes(4, "little") + b[4:], "another file of llm.c's: it begins 20240326"),
        (lambda b: b[:4] + b"\x02" + b[5:], "a token shard of version 2, where 1 is expected after 20240520"),
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


@given(st.binary(max_size=1100), st.sampled_from([b"", b"\x88\xd8\x34\x01", b"\xa1\xd9\x34\x01\x07\x00\x00\x00"]))
def test_arbitrary_bytes_are_a_shard_or_a_format_error(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    path.write_bytes(start + content)
    with contextlib.suppress(FormatError):
        shard = open_shard(path)
        assert not start
        assert shard.tokens.nbytes == len(content)


def test_llama_3s_ids_take_32_bits(tmp_path):
    ids = np.array([128_000, 0, 2**32 - 1])
    assert write_shard(tmp_path / "train.bin", ids, np.uint32) == 3
    content = (tmp_path / "train.bin").read_bytes()
    assert content[:12] == bytes.fromhex("a1d93401 07000000 03000000")  # 20240801, 7, 3
    assert len(content) == 1024 + 12
    np.testing.assert_array_equal(open_shard(tmp_path / "train.bin").tokens, ids)


@pytest.mark.parametrize("count", [1, 2, 7, 30_000])
def test_files_without_a_header(tmp_path, count):
    """NanoGPT's uint16 and the older int32, of the same ids."""
    ids = np.random.default_rng(0).integers(1, 50257, count)
    for dtype, name in (("<u2", "narrow.bin"), ("<i4", "wide.bin")):
        ids.astype(dtype).tofile(tmp_path / name)
        shard = open_shard(tmp_path / name)
        assert shard.tokens.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(shard.tokens, ids)


def test_the_older_files_of_tinyshakespeare(shared):
    folder = shared / "tinyshakespeare"
    for split in ("train", "val"):
        old, new = (open_shard(folder / f"tiny_shakespeare_{split}{kind}.bin").tokens for kind in (".int32", ""))
        assert (old.dtype, new.dtype) == (np.int32, np.uint16)
        np.testing.assert_array_equal(old, new)


def test_arrays_are_written_one_by_one(tmp_path):
    """As they come, and nothing remains if they stop coming."""

    def arrays(fail):
        yield np.arange(3)
        yield np.array([], int)
        if fail:
            raise KeyboardInterrupt
        yield np.arange(2)

    assert write_shard(tmp_path / "x.bin", arrays(fail=False)) == 5
    assert open_shard(tmp_path / "x.bin").tokens.tolist() == [0, 1, 2, 0, 1]
    (tmp_path / "x.bin").unlink()
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.bin", arrays(fail=True))
    assert not list(tmp_path.iterdir())
