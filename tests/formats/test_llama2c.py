"""llama2.c's model files, against a reading of their layout and a forward of run.c's own."""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.convert.weights import load_weights
from gptjax.errors import CheckpointError, ConfigError, FormatError
from gptjax.formats import llama2c
from gptjax.models.params import num_params, stack
from gptjax.models.transformer import logits
from tests.models import tiny

SIZES = {"family": "llama", "num_heads": 4, "num_kv_heads": 2, "channels": 16, "hidden": 24}
CFG = tiny.config(**SIZES, tied=False)
both = pytest.mark.parametrize("tied", [True, False])
versions = pytest.mark.parametrize("version", [0, 1, 2])


def config(tied=False, **changes):
    return dataclasses.replace(CFG, tied=tied, **changes)


def make_params(cfg=CFG):
    return jax.tree.map(np.asarray, tiny.params(cfg, jnp.float32))


def write(path, version=0, cfg=CFG):
    llama2c.write_model(path, make_params(cfg), cfg, version)
    return path


def unpadded(params, cfg=CFG):
    """Stacked, without pad rows."""
    found = stack(jax.tree.map(np.asarray, params))
    wcls = None if found.wcls is None else found.wcls[: cfg.vocab_size]
    return found._replace(tok_emb=found.tok_emb[: cfg.vocab_size], wcls=wcls)


def largest_errors(ours, theirs):
    return [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    ]


def run_c(content: bytes, tokens: list[int]) -> np.ndarray:
    """The logits after the last token, from the bytes of version 0, as run.c computes them."""
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("<7i", content[:28])
    numbers = iter(np.frombuffer(content, "<f4", offset=28).astype(np.float64))
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    head = dim // heads

    def take(*shape):
        return np.array([next(numbers) for _ in range(np.prod(shape))]).reshape(shape)

    tok_emb = take(vocabulary, dim)
    att_norm, wq = take(layers, dim), take(layers, dim, dim)
    wk, wv = (take(layers, kv_heads * head, dim) for _ in range(2))
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = (
        take(layers, hidden, dim),
        take(layers, dim, hidden),
        take(layers, hidden, dim),
    )
    final_norm = take(dim)
    take(2, positions, head // 2)
    wcls = tok_emb if tied else take(vocabulary, dim)
    assert not list(numbers)

    def norm(x, w):
        return w * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(x, position):
        for i in range(0, len(x), 2):
            angle = position * 10000.0 ** (-(i % head) / head)
            a, b = x[i], x[i + 1]
            x[i] = a * np.cos(angle) - b * np.sin(angle)
            x[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    cache = [([], []) for _ in range(layers)]
    for position, token in enumerate(tokens):
        x = tok_emb[token].copy()
        for layer, (keys, values) in enumerate(cache):
            h = norm(x, att_norm[layer])
            q = rotate(wq[layer] @ h, position).reshape(heads, head)
            keys.append(rotate(wk[layer] @ h, position).reshape(kv_heads, head))
            values.append((wv[layer] @ h).reshape(kv_heads, head))
            out = []
            for n in range(heads):
                group = n // (heads // kv_heads)
                scores = np.array([q[n] @ k[group] for k in keys]) / np.sqrt(head)
                p = np.exp(scores - scores.max())
                out.append(sum(w * v[group] for w, v in zip(p / p.sum(), values, strict=True)))
            x += wo[layer] @ np.concatenate(out)
            h = norm(x, ffn_norm[layer])
            gate = w1[layer] @ h
            x += w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
    return wcls @ norm(x, final_norm)


@both
def test_run_c_gets_the_same_logits_from_the_file(tied, tmp_path):
    cfg = config(tied)
    path = write(tmp_path / "m.bin", 0, cfg)
    tokens = [1, 7, 3, 3, 10, 0]
    found, params = load_weights(str(path))
    assert (found.tied, found.num_kv_heads) == (tied, 2)
    cfg = dataclasses.replace(found, dtype="float64").resolve("cpu", len(tokens))
    ours = logits(jax.tree.map(lambda x: x.astype(jnp.float64), params), jnp.array([tokens]), cfg)
    np.testing.assert_allclose(
        ours[0, -1, : cfg.vocab_size], run_c(path.read_bytes(), tokens), rtol=1e-9, atol=1e-12
    )


@both
@versions
def test_what_is_written_is_read_back(tied, version, tmp_path):
    cfg = config(tied)
    path = write(tmp_path / "m.bin", version, cfg)
    found, architecture, params = llama2c.read_model(path)
    assert (found, architecture) == (version, cfg.architecture)
    assert llama2c.is_model(path)
    ours, expected = unpadded(params), unpadded(make_params(cfg))
    if version < 2:
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
    else:
        scales = [np.abs(w).max() / 127 for w in jax.tree.leaves(expected)]
        assert all(
            error <= scale / 2 * (1 + 1e-5)
            for error, scale in zip(largest_errors(ours, expected), scales, strict=True)
        )
        np.testing.assert_array_equal(ours.blocks.att_norm, expected.blocks.att_norm)
        assert (ours.blocks.wq != expected.blocks.wq).any()


def test_the_headers_are_llama2_cs(tmp_path):
    heads = {v: write(tmp_path / f"{v}.bin", v).read_bytes() for v in (0, 1, 2)}
    sizes = (16, 24, 2, 4, 2, 11, 12)
    assert struct.unpack("<7i", heads[0][:28]) == (*sizes[:5], -11, 12)
    for version in (1, 2):
        assert struct.unpack("<I8i", heads[version][:36]) == (0x616B3432, version, *sizes)
        assert heads[version][36] == 0
        assert heads[version][41:256] == bytes(215)
    assert heads[1][37:41] == bytes(4)
    assert struct.unpack("<i", heads[2][37:41]) == (8,)  # the largest half of 64 in 16 and 24
    numbers = num_params(CFG.architecture)
    vectors = 16 * (2 * 2 + 1)
    assert len(heads[0]) == 28 + 4 * (numbers + 2 * 12 * 2)
    assert len(heads[1]) == 256 + 4 * numbers
    assert len(heads[2]) == 256 + 4 * vectors + (numbers - vectors) * (8 + 4) // 8
    norms = np.frombuffer(heads[2], "<f4", vectors, 256)
    np.testing.assert_array_equal(norms[:16], make_params().blocks[0].att_norm)


@given(
    st.lists(st.floats(-(2**120), 2**120, width=32), min_size=8, max_size=64),
    st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=50)
def test_int8_is_within_half_a_scale(numbers, group):
    array = np.array(numbers[: len(numbers) // group * group], np.float32)
    integers, scales = llama2c.quantize(array, group)
    assert integers.dtype == np.int8
    error = np.abs(llama2c.dequantize(integers, scales).astype(np.float64) - array)
    # A subnormal scale is itself rounded, by up to half of the least float, in each of 127
    most = scales[:, None].astype(np.float64) * (0.5 + 1e-4) + 127 * 2.0**-150
    assert (error.reshape(-1, group) <= most).all()


def test_int8_rounds_half_to_even_and_keeps_zeros():
    array = np.array([127, 0.5, 1.5, -2.5, 0, 0, 0, 0, 1e-45, 1.8e-43, 0, 0], np.float32)
    integers, scales = llama2c.quantize(array, 4)
    assert integers.tolist() == [[127, 0, 2, -2], [0] * 4, [1, 127, 0, 0]]
    assert scales[:2].tolist() == [1, 0]
    assert llama2c.dequantize(integers, scales)[4:8].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e5}, "model.rope_theta 10000, and cannot hold this model's 100000"),
        ({"norm_eps": 1e-6}, "model.norm_eps 1e-05, and cannot hold this model's 1e-06"),
    ],
)
@versions
def test_what_the_file_cannot_hold_is_named(version, changes, message, tmp_path):
    cfg = config(**changes)
    with pytest.raises(ConfigError, match=message):
        llama2c.write_model(tmp_path / "m.bin", make_params(cfg), cfg, version)
    assert not list(tmp_path.iterdir())


def test_an_eps_of_float32_is_the_same(tmp_path):
    write(tmp_path / "m.bin", 0, config(norm_eps=float(np.float32(1e-5))))


def test_other_families_and_versions_are_refused(tmp_path):
    gpt2 = tiny.config()
    with pytest.raises(ConfigError, match="holds models of the family llama, and this is gpt2"):
        llama2c.write_model(tmp_path / "m.bin", tiny.params(gpt2), gpt2)
    with pytest.raises(ValueError, match="not 3"):
        write(tmp_path / "m.bin", 3)


def test_int8_of_a_number_that_is_not_finite_is_refused(tmp_path):
    params = jax.tree.map(np.array, make_params())
    params.blocks[1].wk[0, 0, 0] = np.inf
    with pytest.raises(CheckpointError, match="numbers in wk that are not finite"):
        llama2c.write_model(tmp_path / "m.bin", params, CFG, 2)
    assert not list(tmp_path.iterdir())


def field(offset, value, kind="<i"):
    packed = struct.pack(kind, value)
    return lambda content: content[:offset] + packed + content[offset + len(packed) :]


@pytest.mark.parametrize(
    ("version", "damage", "message"),
    [
        (0, lambda b: b[:20], "truncated: 20 bytes, but its header alone takes 28"),
        (1, lambda b: b[:200], "truncated: 200 bytes, but its header alone takes 256"),
        *[(v, lambda b: b[:-1], "is truncated: its header announces 2 layers") for v in (0, 1, 2)],
        *[(v, lambda b: b + b"\0", "is malformed: its header announces") for v in (0, 1, 2)],
        *[
            (v, field(4 * i + 8 * (v > 0), value), f"holds the sizes .*{value}")
            for v in (0, 1, 2)
            for i in range(7)
            for value in (0, 2**31 - 1)
        ],
        *[(0, field(4 * i, -1), "holds the sizes .*-1") for i in (0, 1, 2, 3, 4, 6)],
        *[(1, field(8 + 4 * i, -1), "holds the sizes .*-1") for i in range(7)],
        (0, field(12, 3), "holds an invalid model: model.channels 16"),
        (0, field(12, 16), "holds an invalid model: .* heads of 1 channels"),
        (0, field(16, 3), "holds an invalid model: model.num_heads 4"),
        (0, field(20, 11), "is malformed"),  # tied, with a classifier all the same
        (1, field(4, 3), "of version 3: versions 0, 1 and 2"),
        (1, field(4, -1), "of version -1"),
        (1, field(36, 2, "<B"), "byte 36 of its header is 2"),
        (1, field(36, 1, "<B"), "is malformed"),
        (1, field(37, 1, "<B"), "does not end in zeros"),
        (2, field(255, 1, "<B"), "does not end in zeros"),
        (2, field(37, 0), "groups of 0"),
        (2, field(37, -8), "groups of -8"),
        (2, field(37, 7), "groups of 7 numbers do not divide the 176 of tok_emb"),
        (2, field(37, 16), "is malformed"),
    ],
)
def test_damaged_files_are_named(version, damage, message, tmp_path):
    path = write(tmp_path / "m.bin", version)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=message) as caught:
        llama2c.read_model(path)
    assert str(path) in str(caught.value)


def test_nothing_is_allocated_for_a_size_that_is_not_there(tmp_path):
    """A header of 16 million layers: refused by the file's size."""
    path = write(tmp_path / "m.bin")
    path.write_bytes(field(8, 2**24)(path.read_bytes()))
    with pytest.raises(FormatError, match="truncated: its header announces 16777216 layers"):
        llama2c.read_model(path)


def test_the_real_model_there_and_back(shared, tmp_path):
    _, cfg, params = llama2c.read_model(shared / "llama2c" / "stories260K.bin")
    assert (cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.channels) == (5, 8, 4, 64)
    assert (cfg.hidden, cfg.vocab_size, cfg.max_seq_len, cfg.tied) == (172, 512, 512, True)
    llama2c.write_model(tmp_path / "m.bin", params, cfg)
    content = (shared / "llama2c" / "stories260K.bin").read_bytes()
    ours, theirs = (
        np.frombuffer(b, "<f4", offset=28) for b in ((tmp_path / "m.bin").read_bytes(), content)
    )
    tables = 512 * 8 // 2 * 2
    np.testing.assert_array_equal(ours[:-tables], theirs[:-tables])
    np.testing.assert_allclose(ours[-tables:], theirs[-tables:], atol=1e-5)  # nothing reads them
