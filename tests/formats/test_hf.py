"""Folders in Hugging Face's layout, made here by hand; tests/test_parity.py has `transformers`
itself read and write them.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gptjax.errors import FormatError
from gptjax.formats import hf
from gptjax.formats.lazy import tensor_names, tensor_of
from tests.models import tiny
from tests.models.fused import fuse

CFG = tiny.config(dtype="float32")
PARAMS = tiny.params(CFG, jnp.float32)
FLOAT32 = np.dtype("<f4")


def write(folder, dtype=FLOAT32):
    hf.write_model(folder, PARAMS, CFG, dtype, None, lambda into: None)
    return folder


def assert_is_params(found):
    for name, layer, _ in tensor_names(CFG):
        np.testing.assert_array_equal(
            tensor_of(found, name, layer, CFG), tensor_of(PARAMS, name, layer, CFG)
        )


def edit(folder, change_tensors=lambda t: None, **fields):
    """Change some of a folder's tensors and of its config's fields; None removes a field."""
    tensors = safetensors.numpy.load_file(folder / hf.MODEL_FILE)
    change_tensors(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.MODEL_FILE, {"format": "pt"})
    config = json.loads((folder / hf.CONFIG_FILE).read_text()) | fields
    (folder / hf.CONFIG_FILE).write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


def test_what_is_written_is_read_back(tmp_path):
    cfg, found = hf.read_model(write(tmp_path / "m"))
    assert (cfg.num_layers, cfg.num_heads, cfg.channels, cfg.vocab_size, cfg.max_seq_len) == (
        2,
        2,
        8,
        11,
        12,
    )
    assert_is_params(found)


def test_names_are_transformers(tmp_path):
    tensors = safetensors.numpy.load_file(write(tmp_path / "m") / hf.MODEL_FILE)
    assert len(tensors) == 12 * 2 + 4
    expected = fuse(PARAMS)
    np.testing.assert_array_equal(tensors["transformer.ln_f.weight"], expected["lnfw"])
    np.testing.assert_array_equal(tensors["transformer.ln_f.bias"], expected["lnfb"])
    np.testing.assert_array_equal(tensors["transformer.wte.weight"], expected["wte"][:11])
    np.testing.assert_array_equal(tensors["transformer.wpe.weight"], expected["wpe"])
    layered = {
        "ln1": "ln_1",
        "qkv": "attn.c_attn",
        "attproj": "attn.c_proj",
        "ln2": "ln_2",
        "fc": "mlp.c_fc",
        "fcproj": "mlp.c_proj",
    }
    for layer in range(2):
        for ours, theirs in layered.items():
            np.testing.assert_array_equal(
                tensors[f"transformer.h.{layer}.{theirs}.weight"], expected[f"{ours}w"][layer]
            )
            np.testing.assert_array_equal(
                tensors[f"transformer.h.{layer}.{theirs}.bias"], expected[f"{ours}b"][layer]
            )


def test_hidden_units_are_four_times_the_channels_where_nothing_is_said(tmp_path):
    narrow = tiny.config(hidden=24, dtype="float32")
    hf.write_model(
        tmp_path / "m", tiny.params(narrow, jnp.float32), narrow, FLOAT32, None, lambda into: None
    )
    assert hf.read_model(tmp_path / "m")[0] == narrow.architecture
    folder = write(tmp_path / "four times")
    for n_inner in (32, None):
        edit(folder, n_inner=n_inner)
        assert hf.read_model(folder)[0] == CFG.architecture
    (folder / hf.CONFIG_FILE).write_text(
        json.dumps(json.loads((folder / hf.CONFIG_FILE).read_text()) | {"n_inner": None})
    )
    assert hf.read_model(folder)[0] == CFG.architecture


def test_the_hubs_own_files(tmp_path):
    """Without the prefix, with causal masks, and with the head that is the token embedding once
    more.
    """
    folder = write(tmp_path / "m")

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.float32))
            tensors[f"h.{layer}.attn.masked_bias"] = np.float32([-1e4])
        tensors["lm_head.weight"] = tensors["wte.weight"]

    edit(folder, change, n_positions=None)  # n_ctx remains
    assert_is_params(hf.read_model(folder)[1])


def shard(folder):
    """Cut the one file into two, with an index."""
    tensors = safetensors.numpy.load_file(folder / hf.MODEL_FILE)
    (folder / hf.MODEL_FILE).unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        place = f"model-{number:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / place)
        places |= dict.fromkeys(part, place)
    (folder / hf.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_several_files(tmp_path):
    folder = write(tmp_path / "m")
    shard(folder)
    assert_is_params(hf.read_model(folder)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update({"transformer.wpe.weight": "../secret.safetensors"}),
            "names the file '../secret.safetensors'",
        ),
        (lambda p: p.update({"transformer.wpe.weight": "none.safetensors"}), "which is not in"),
        (
            lambda p: p.update({"transformer.wpe.weight": p["transformer.h.0.attn.c_attn.bias"]}),
            "which model.*says is in it",
        ),
        (lambda p: p.pop("transformer.wpe.weight"), "lacks the tensor transformer.wpe.weight"),
        (lambda p: p.update({"x": 3}), "has no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path, change, message):
    folder = write(tmp_path / "m")
    places = shard(folder)
    change(places)
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FormatError, match=message):
        hf.read_model(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "bert"},
            "has model_type 'bert', but a Hugging Face folder of gpt2 or llama is expected",
        ),
        ({"model_type": ["gpt2"]}, r"has model_type \['gpt2'\], but"),
        ({"activation_function": "gelu"}, "has activation_function 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx True"),
        (
            {"n_inner": 99},
            r"h\.\d\.mlp\.c_(fc|proj)\.(weight|bias) has the shape \[.*32.*\], but \[.*99.*\] is expected",
        ),
        ({"n_inner": "wide"}, "has no usable n_inner: 'wide'"),
        ({"n_head": 3}, "describes an invalid model"),
        ({"n_layer": "two"}, "has no usable n_layer: 'two'"),
        ({"n_embd": 2**40}, "has no usable n_embd"),
        ({"n_layer": 3}, r"lacks the tensor transformer\.h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, r"tensors that this model does not have: transformer\.h\.1"),
        ({"vocab_size": 12}, r"wte\.weight has the shape \[11, 8\], but \[12, 8\] is expected"),
    ],
)
def test_a_model_that_is_not_this_one_is_refused_by_field(tmp_path, fields, message):
    folder = write(tmp_path / "m")
    edit(folder, **fields)
    with pytest.raises(FormatError, match=message):
        hf.read_model(folder)


def test_a_head_of_its_own_is_refused(tmp_path):
    folder = write(tmp_path / "m")
    edit(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    with pytest.raises(FormatError, match=r"lm_head\.weight differs from the token embedding"):
        hf.read_model(folder)


def test_pickles_are_not_read(tmp_path):
    folder = write(tmp_path / "m")
    (folder / hf.MODEL_FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FormatError, match=r"pytorch_model\.bin is a pickle, which can run any code and is not read"
    ):
        hf.read_model(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"n_layer": ', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_a_damaged_config(tmp_path, content):
    folder = write(tmp_path / "m")
    (folder / hf.CONFIG_FILE).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(FormatError, match=r"config\.json is not"):
        hf.read_model(folder)


# Llama

LLAMA = {"family": "llama", "num_heads": 4, "hidden": 12, "dtype": "float32"}


def write_llama(folder, **changes):
    """A grouped-query model, written; its configuration and parameters."""
    cfg = tiny.config(**LLAMA | {"num_kv_heads": 2} | changes)
    params = tiny.params(cfg, jnp.float32)
    hf.write_model(folder, params, cfg, FLOAT32, 2, lambda into: None, begin_of_text=1)
    return cfg, params


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_llama_is_read_back(tmp_path, num_kv_heads, tied):
    cfg, params = write_llama(
        tmp_path / "m", num_kv_heads=num_kv_heads, tied=tied, rope_theta=1e5, norm_eps=1e-6
    )
    for change in ("whole", "several files"):
        if change == "several files":
            shard(tmp_path / "m")
        found_cfg, found = hf.read_model(tmp_path / "m")
        assert found_cfg == cfg.architecture
        for name, layer, _ in tensor_names(cfg):
            np.testing.assert_array_equal(
                tensor_of(found, name, layer, cfg), tensor_of(params, name, layer, cfg)
            )


def test_a_llama_has_the_names_and_layout_of_transformers(tmp_path):
    _, params = write_llama(tmp_path / "m", tied=False)
    tensors = safetensors.numpy.load_file(tmp_path / "m" / hf.MODEL_FILE)
    assert len(tensors) == 9 * 2 + 3
    for layer, block in enumerate(params.blocks):
        at = f"model.layers.{layer}."
        expected = {
            "self_attn.q_proj": block.wq.reshape(8, 8).T,
            "self_attn.k_proj": block.wk.reshape(8, 4).T,
            "self_attn.v_proj": block.wv.reshape(8, 4).T,
            "self_attn.o_proj": block.wo.reshape(8, 8).T,
            "mlp.gate_proj": block.w1.T,
            "mlp.up_proj": block.w3.T,
            "mlp.down_proj": block.w2.T,
            "input_layernorm": block.att_norm,
            "post_attention_layernorm": block.ffn_norm,
        }
        for name, tensor in expected.items():
            np.testing.assert_array_equal(tensors[f"{at}{name}.weight"], tensor)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params.tok_emb[:11])
    np.testing.assert_array_equal(tensors["model.norm.weight"], params.final_norm)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params.wcls[:11])


def test_what_older_and_newer_files_of_llamas_hold(tmp_path):
    """No prefix, the frequencies of the rotary embedding, the base at either place, defaults."""
    cfg, _ = write_llama(tmp_path / "m", num_kv_heads=4, rope_theta=5e3)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]

    edit(tmp_path / "m", change, rope_parameters=None, num_key_value_heads=None, head_dim=None)
    assert hf.read_model(tmp_path / "m")[0] == cfg.architecture
    default = {"rope_type": "default"}
    for fields, base in (
        ({"rope_theta": None, "rope_parameters": default | {"rope_theta": 7e3}}, 7e3),
        ({"rope_theta": 7e3, "rope_parameters": default}, 7e3),
        ({"rope_theta": 7000, "rope_scaling": {"type": "default"}}, 7e3),
        ({"rope_theta": None, "rope_parameters": default, "rope_scaling": None}, 1e4),
    ):
        edit(tmp_path / "m", **fields)
        assert hf.read_model(tmp_path / "m")[0].rope_theta == base
        edit(tmp_path / "m", rope_parameters=None, rope_scaling=None)
    edit(tmp_path / "m", rms_norm_eps=None)
    assert hf.read_model(tmp_path / "m")[0].norm_eps == 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', but this Llama has 'silu'"),
        ({"attention_bias": True}, "has attention_bias True"),
        ({"mlp_bias": True}, "has mlp_bias True"),
        ({"head_dim": 4}, "has head_dim 4, but only hidden_size / num_attention_heads"),
        ({"head_dim": [2]}, r"has head_dim \[2\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling with type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling with rope_type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters with rope_type 'yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters with full_attention {}"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": [1]}, r"no usable rope_parameters: \[1\]"),
        ({"rope_theta": 5.0}, "two values of rope_theta: 5.0 and 10000.0"),
        ({"rope_theta": "x", "rope_parameters": None}, "no usable rope_theta: 'x'"),
        ({"rope_theta": True, "rope_parameters": None}, "no usable rope_theta: True"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "invalid model: .* not inf"),
        ({"rms_norm_eps": -1}, "invalid model: model.norm_eps must be a positive number"),
        ({"rms_norm_eps": "small"}, "no usable rms_norm_eps: 'small'"),
        ({"tie_word_embeddings": "yes"}, "no usable tie_word_embeddings: 'yes'"),
        ({"tie_word_embeddings": False}, r"lacks the tensor lm_head\.weight"),
        ({"num_key_value_heads": 3}, "invalid model: .* is not divisible"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight has the shape \[4, 8\]"),
        ({"intermediate_size": None}, "no usable intermediate_size: None"),
        ({"hidden_size": "8"}, "no usable hidden_size: '8'"),
    ],
)
def test_a_llama_that_is_computed_otherwise_is_refused_by_field(tmp_path, fields, message):
    write_llama(tmp_path / "m")
    edit(tmp_path / "m", **fields)
    with pytest.raises(FormatError, match=message):
        hf.read_model(tmp_path / "m")


@pytest.mark.parametrize("kind", ["<f2", jnp.bfloat16])
def test_a_llama_in_half_precision(tmp_path, kind):
    cfg = tiny.config(**LLAMA)
    params = tiny.params(cfg, jnp.float32)
    hf.write_model(tmp_path / "m", params, cfg, np.dtype(kind), None, lambda into: None)
    config = json.loads((tmp_path / "m" / hf.CONFIG_FILE).read_text())
    assert config["torch_dtype"] == np.dtype(kind).name
    found = hf.read_model(tmp_path / "m")[1].blocks[1].w2
    assert found.dtype == np.dtype(kind)
    np.testing.assert_array_equal(found, np.asarray(params.blocks[1].w2).astype(kind))


def test_a_llamas_tokens_are_named(tmp_path):
    write_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / hf.CONFIG_FILE).read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
