"""Operations of small programs, counted by hand, and those of a step against the model's
dimensions.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gptjax.bench import program
from gptjax.config import Config, DataConfig, MeshConfig
from gptjax.errors import ConfigError
from tests.conftest import ROOT
from tests.models import tiny
from tests.plan.conftest import needs_libtpu

X = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)


def count(function, *arguments, platform="cpu"):
    return program.operations(
        jax.jit(function)
        .trace(*arguments)
        .lower(lowering_platforms=(platform,))
        .compiler_ir("stablehlo")
    )


def test_what_is_called_twice_counts_twice():
    inner = jax.jit(lambda x: jnp.sin(x) @ x.T)
    found = count(lambda x: (inner(x), inner(2 * x)), X)
    assert found.times["sine"] == found.times["dot_general"] == found.times["transpose"] == 2
    assert found.nbytes["sine"] == 2 * 4 * 8 * 2
    assert found.nbytes["dot_general"] == 2 * 4 * 4 * 2
    assert found.times["multiply"] == 1


def test_loops_count_once_and_reductions_bodies_do_not_count():
    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.cos(x), x).astype(jnp.float32).max()

    found = count(looped, X)
    assert found.times["cosine"] == found.times["while"] == found.times["reduce"] == 1
    assert found.nbytes["convert"] == 4 * 8 * 4
    assert found.nbytes["reduce"] == 4
    assert not found.times["maximum"]


def test_a_kernel_goes_by_its_own_name():
    found = count(lambda x: jax.lax.top_k(x, 2), X, platform="cpu")
    assert not found.times["custom_call"]
    symmetric = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count(jnp.linalg.eigvalsh, symmetric).times["lapack_ssyevd_ffi"] == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_products_of_a_step(platform):
    """Three products of each of a block's six matrices and of the classifier, and six of
    materialised attention.
    """
    cfg = Config(
        data=DataConfig(batch_size=2, seq_len=8),
        model=tiny.config(dtype="float32", attention="materialised"),
    )
    model = cfg.model.resolve(platform, 8)
    for backward in ("manual", "autodiff"):
        found = program.lowered_step(cfg, model, backward, platform)
        assert found.times["dot_general"] == model.num_layers * (3 * 6 + 6) + 3


@pytest.mark.parametrize(
    ("mesh", "platform", "name"),
    [
        (MeshConfig(), "tpu", "v5e:1x1"),
        (MeshConfig(data=4), "tpu", "v5e:2x2"),
        (MeshConfig(data=2, fsdp=4), "tpu", "v5e:2x4"),
        (MeshConfig(fsdp=8), "cuda", "h100:8"),
        (MeshConfig(fsdp=2, tensor=2), "cpu", "cpu:4"),
    ],
)
def test_the_devices_are_as_many_as_the_meshs(mesh, platform, name):
    assert program.target(Config(model=tiny.config(), mesh=mesh), platform).name == name


def test_a_slice_that_no_torus_has_is_refused():
    with pytest.raises(ConfigError, match="the mesh has 6 devices, but for tpu"):
        program.target(Config(model=tiny.config(), mesh=MeshConfig(data=6)), "tpu")


@needs_libtpu
def test_a_step_compiles_for_a_tpu(tmp_path):
    """In a process of its own, as libtpu is loaded for good."""
    options = {
        "what": "program",
        "platform": "tpu",
        "hlo": tmp_path,
        "json": tmp_path / "r.json",
        "config": ROOT / "configs" / "debug.yaml",
        "data.batch_size": 8,
        "data.seq_len": 128,
        "model.num_layers": 4,
        "model.channels": 256,
        "model.num_heads": 4,
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "gptjax.bench", *arguments]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    ours, autodiff = (
        json.loads((tmp_path / "r.json").read_text())[f"{way}-gradient.txt"]
        for way in ("manual", "autodiff")
    )
    assert 0 < ours["accessed_bytes"] <= autodiff["accessed_bytes"]
    assert ours["temporary_bytes"] <= autodiff["temporary_bytes"]
    _, _, stored = (tmp_path / "manual-gradient.txt").read_text().partition("\nENTRY")
    # The scores in bfloat16 alone; q, k and v with T last, straight from the products
    assert "bf16[1024,4096]{" in stored
    assert "f32[1024,4096]{" not in stored
    assert "bf16[8,4,64,128]{3,2,1,0" in stored
    assert "bf16[8,128,4,64]{" not in stored
