import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import DataError, FormatError
from gptjax.formats.token_shards import open_shard, write_shard
from tests.mutations import mutated


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
        (
            lambda b: b[:-1],
            "truncated: its header announces 3 tokens, 1030 bytes, but the file has 1029",
        ),
        (
            lambda b: b + b"xx",
            "malformed: its header announces 3 tokens, 1030 bytes, but the file has 1032",
        ),
        (lambda b: b[:1000], "truncated: 1000 bytes"),
        (lambda b: b"", "not a token shard: .* but it has 0 bytes"),
        (lambda b: b"\x00\x01\x02", "not a token shard: .* but it has 3 bytes"),
        (
            lambda b: (20240326).to_bytes(4, "little") + b[4:],
            "is an llm.c model, not a token shard",
        ),
        (lambda b: b"PK" + b[2:], "not a token shard: it has a header that begins 20204368 where"),
        (
            lambda b: b[:4] + b"\x02" + b[5:],
            "a token shard of version 2, where 1 is expected after 20240520",
        ),
        (
            lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:],
            "malformed: its header announces -1 tokens",
        ),
        (lambda b: b[:8] + bytes(4), "truncated: 12 bytes"),
        (lambda b: b[:8] + bytes(1016), "malformed: its header announces 0 tokens"),
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


@given(
    st.binary(max_size=1100),
    st.sampled_from([b"", b"\x88\xd8\x34\x01", b"\xa1\xd9\x34\x01\x07\x00\x00\x00"]),
)
def test_arbitrary_bytes_are_a_shard_or_a_format_error(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    path.write_bytes(start + content)
    with contextlib.suppress(FormatError):
        shard = open_shard(path)
        assert not start
        assert shard.tokens.nbytes == len(content)


@settings(max_examples=80)
@given(data=st.data(), kind=st.sampled_from(["llm.c", "llama3", "nanogpt", "int32"]))
def test_a_mutated_file_maps_as_it_stands_or_is_refused(tmp_path_factory, data, kind):
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    ids = np.arange(1, 701) * 71
    if kind in ("llm.c", "llama3"):
        write_shard(path, ids, np.uint16 if kind == "llm.c" else np.uint32)
    else:
        ids.astype("<u2" if kind == "nanogpt" else "<i4").tofile(path)
    content = data.draw(mutated(path.read_bytes()))
    path.write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(FormatError):
        shard = open_shard(path)
        header = 1024 if shard.kind in ("llm.c", "llama3") else 0
        assert shard.tokens.tobytes() == content[header:]
        assert shard.tokens.size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_llama_3s_ids_take_32_bits(tmp_path):
    ids = np.array([128_000, 0, 2**32 - 1])
    assert write_shard(tmp_path / "train.bin", ids, np.uint32) == 3
    content = (tmp_path / "train.bin").read_bytes()
    assert content[:12] == bytes.fromhex("a1d93401 07000000 03000000")  # 20240801, 7, 3
    assert len(content) == 1024 + 12
    np.testing.assert_array_equal(open_shard(tmp_path / "train.bin").tokens, ids)


@pytest.mark.parametrize("count", [1, 2, 7, 300_000])
def test_files_without_a_header(tmp_path, count):
    """NanoGPT's uint16 and the older int32, of the same ids."""
    ids = np.random.default_rng(0).integers(1, 50257, count)
    for dtype, mapped, kind in (("<u2", np.uint16, "nanogpt"), ("<i4", np.uint32, "int32")):
        ids.astype(dtype).tofile(tmp_path / kind)
        shard = open_shard(tmp_path / kind)
        assert (shard.kind, shard.tokens.dtype) == (kind, mapped)
        assert isinstance(shard.tokens, np.memmap)
        np.testing.assert_array_equal(shard.tokens, ids)


@pytest.mark.parametrize("where", [1, 300_001, -1])
def test_one_id_where_int32_would_have_none_tells_uint16(tmp_path, where):
    ids = np.zeros(600_000, "<u2")
    ids[::2] = 7
    ids.tofile(tmp_path / "x.bin")
    assert open_shard(tmp_path / "x.bin").kind == "int32"
    ids[where] = 1
    ids.tofile(tmp_path / "x.bin")
    assert open_shard(tmp_path / "x.bin").kind == "nanogpt"


@pytest.mark.parametrize("where", [0, 150_000, 299_999])
def test_negative_ids_are_refused(tmp_path, where):
    ids = np.arange(300_000, dtype="<i4") % 50257
    ids[where] = -1
    ids.tofile(tmp_path / "x.bin")
    with pytest.raises(
        FormatError, match="x.bin is not a token shard: as int32 it holds negative ids"
    ):
        open_shard(tmp_path / "x.bin")


def test_a_negative_id_is_too_large_for_every_vocabulary(tmp_path):
    ids = np.arange(600_000, dtype="<i4") % 50257
    ids[200_000] = -1
    ids.tofile(tmp_path / "x.bin")
    shard = open_shard(tmp_path / "x.bin")
    assert (shard.kind, int(shard.tokens[200_000])) == ("int32", 2**32 - 1)


def test_a_nanogpt_folders_pickle_is_never_opened(tmp_path):
    """``meta.pkl`` beside the shards is left alone: opening it would fail here."""
    (tmp_path / "meta.pkl").mkdir()
    np.arange(1, 100, dtype="<u2").tofile(tmp_path / "train.bin")
    assert open_shard(tmp_path / "train.bin").tokens.size == 99


def test_the_older_files_of_tinyshakespeare(shared):
    folder = shared / "tinyshakespeare"
    for split in ("train", "val"):
        old, new = (
            open_shard(folder / f"tiny_shakespeare_{split}{kind}.bin") for kind in (".int32", "")
        )
        assert (old.kind, new.kind) == ("int32", "llm.c")
        np.testing.assert_array_equal(old.tokens, new.tokens)


def test_opening_takes_no_room_whatever_the_size(tmp_path):
    with (tmp_path / "x.bin").open("wb") as file:
        file.write(np.array([20240520, 1, 2**31 - 1], "<i4").tobytes())
        file.truncate(1024 + 2 * (2**31 - 1))  # a hole
    tracemalloc.start()
    assert open_shard(tmp_path / "x.bin").tokens[-1] == 0
    with (tmp_path / "x.bin").open("r+b") as file:
        file.write(bytes([9] * 1024))  # no header any more
        file.truncate(2**33)
    assert open_shard(tmp_path / "x.bin").tokens.size == 2**32
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


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


def test_many_arrays_are_never_held_together(tmp_path):
    tracemalloc.start()
    assert write_shard(tmp_path / "x.bin", (np.full(100_000, i) for i in range(60))) == 6_000_000
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    shard = open_shard(tmp_path / "x.bin")
    assert (
        shard.tokens.reshape(60, -1).min(1).tolist()
        == shard.tokens.reshape(60, -1).max(1).tolist()
        == list(range(60))
    )


@pytest.mark.parametrize("tokens", [[], (), np.array([], int), iter([]), iter([np.array([], int)])])
def test_nothing_is_no_shard(tmp_path, tokens):
    """It could not be read back."""
    with pytest.raises(DataError, match="no token ids to write to .*x.bin"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_other_dtypes_cannot_be_written(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"as uint16 or uint32, not as {np.dtype(dtype)}"):
        write_shard(tmp_path / "x.bin", [1], dtype)


def test_an_error_of_the_source_does_not_name_the_shard(tmp_path):
    def arrays():
        yield np.fromfile(tmp_path / "missing.npy", np.uint16)

    with pytest.raises(FileNotFoundError, match="missing.npy"):
        write_shard(tmp_path / "x.bin", arrays())
