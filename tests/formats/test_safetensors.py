import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gptjax.errors import FormatError
from gptjax.formats import safetensors as ours
from gptjax.formats.lazy import LazyTensor, tensor_names, tensor_of
from tests.models import tiny
from tests.models.fused import fuse

CFG = tiny.config(dtype="float32")
FLOAT32, BFLOAT16 = ours.DTYPES["F32"], ours.DTYPES["BF16"]
PARAMS = tiny.params(CFG, jnp.float32)


def assert_same(found, expected, rounded=lambda x: x):
    for name, layer, _ in tensor_names(CFG):
        a, b = tensor_of(found, name, layer, CFG), rounded(tensor_of(expected, name, layer, CFG))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_what_is_written_is_read_back(tmp_path, dtype):
    path = tmp_path / "m.safetensors"
    ours.write_model(path, PARAMS, CFG, dtype)
    cfg, found = ours.read_model(path)
    assert (cfg.num_layers, cfg.num_heads, cfg.channels, cfg.vocab_size, cfg.max_seq_len) == (
        2,
        2,
        8,
        11,
        12,
    )
    assert_same(found, PARAMS, lambda x: x.astype(dtype))
    assert ours.is_model(path)


def test_the_library_reads_what_is_written(tmp_path):
    """Names, shapes, numbers and alignment, by the format's own implementation."""
    path = tmp_path / "m.safetensors"
    ours.write_model(path, PARAMS, CFG, FLOAT32)
    theirs = safetensors.numpy.load_file(path)
    expected = fuse(PARAMS)
    outside = {
        "wte": expected.pop("wte")[:11],
        **{name: expected.pop(name) for name in ("wpe", "lnfw", "lnfb")},
    }
    expected = outside | {
        f"{name}.{layer}": tensor[layer] for name, tensor in expected.items() for layer in range(2)
    }
    assert set(theirs) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(theirs[name], tensor, err_msg=name)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_hidden_units_are_kept_where_they_are_not_the_default(tmp_path):
    cfg = tiny.config(hidden=24, dtype="float32")
    for name, model in (("narrow", cfg), ("plain", CFG)):
        ours.write_model(tmp_path / name, tiny.params(model, jnp.float32), model, FLOAT32)
        assert ours.read_model(tmp_path / name)[0] == model.architecture
        with safetensors.safe_open(tmp_path / name, "numpy") as file:
            assert ("hidden" in file.metadata()) == (name == "narrow")
            assert "family" not in file.metadata()


def changed(path, change):
    tensors = safetensors.numpy.load_file(path)
    metadata = {
        "num_layers": "2",
        "num_heads": "2",
        "channels": "8",
        "vocab_size": "11",
        "max_seq_len": "12",
    }
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("fcw.1"), "lacks the tensor fcw.1"),
        (lambda t, m: t.update(extra=t["wpe"]), "tensors that this model does not have: extra"),
        (
            lambda t, m: t.update(lnfw=t["lnfw"][:7]),
            r"the tensor lnfw has the shape \[7\], but \[8\] is expected",
        ),
        (
            lambda t, m: t.update(lnfw=np.zeros(8, np.int32)),
            "the tensor lnfw holds I32, but one of F64, F32, F16, BF16",
        ),
        (lambda t, m: m.pop("channels"), "has no valid num_layers, num_heads"),
        (lambda t, m: m.update(channels="-8"), "has no valid num_layers, num_heads"),
        (lambda t, m: m.update(num_heads="3"), "holds an invalid model"),
        (lambda t, m: m.update(num_layers="999999999"), "lacks the tensor ln1w.2"),
        (
            lambda t, m: m.update(hidden="31"),
            r"the tensor fcw.0 has the shape \[8, 32\], but \[8, 31\] is expected",
        ),
        (lambda t, m: m.update(hidden="wide"), "has no valid num_layers, num_heads"),
        (
            lambda t, m: m.update(family="none"),
            "model.family 'none' is not known: choose one of gpt2",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    ours.write_model(path, PARAMS, CFG, FLOAT32)
    changed(path, change)
    with pytest.raises(FormatError, match=message):
        ours.read_model(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: b[:20],
        lambda b: b"",
        lambda b: (2**63).to_bytes(8, "little") + b[8:],
        lambda b: b[:8] + b"[" + b[9:],
        lambda b: b.replace(b'"data_offsets": [0,', b'"data_offsets": [4,', 1),
    ],
)
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    ours.write_model(path, PARAMS, CFG, FLOAT32)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match="is not a safetensors file, or is damaged"):
        ours.read_model(path)


def test_writing_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ours.write(tmp_path / "m.safetensors", {"a": LazyTensor((3,), FLOAT32, fail)}, {})
    assert not list(tmp_path.iterdir())
