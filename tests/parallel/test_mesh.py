"""The mesh: how its shape is checked, how a training state lies on it, and who reads which rows."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from gptjax.config import MeshConfig, OptimConfig
from gptjax.errors import ConfigError
from gptjax.parallel import mesh as meshes
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import MESH_AXES
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from tests.models import tiny

KEY = jax.random.key(0)
B, T = 8, 6
CFG = tiny.config(num_layers=1, num_heads=8, channels=16, vocab_size=120)
SIZES = CFG.axis_sizes
ALL = MeshConfig(2, 2, 2)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_initial_state_and_steps_equal_those_of_one_device(name):
    """Parameters are drawn in their shards, and a step changes shards; what is fetched are
    scalars.
    """
    optimizer = make_optimizer(OptimConfig(name=name, schedule="constant"), 10, CFG)
    cfg = dataclasses.replace(CFG, dtype="float32")
    batch = jax.tree.map(lambda x: np.asarray(x)[None], tiny.batch(cfg, B, T))
    found = {}
    with jax.enable_x64(False):
        for mesh in (None, make_mesh(ALL, SIZES, B)):
            state = steps.make_state(KEY, cfg, optimizer, mesh)
            if mesh:
                jax.tree.map(
                    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9),
                    state,
                    found[None][0],
                )
                assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
                assert not [
                    x for x in jax.tree.leaves(state.params) if x.sharding.is_fully_replicated
                ]
            first = jax.device_get(state)
            arguments = steps.step_arguments(cfg, optimizer, (1, B, T), mesh)
            compiled = steps.compile_step(cfg, optimizer, "manual", *arguments, mesh)
            losses, buffer = [], steps.gradient_buffer(state.params)
            for step in range(1, 4):
                state, buffer, metrics = steps.run_step(
                    compiled, state, buffer, meshes.place_rows(mesh, batch), KEY, step
                )
                losses.append(float(metrics.loss))
            evaluated = steps.evaluate(
                steps.make_eval_loss(cfg, mesh), state.params, [jax.tree.map(lambda x: x[0], batch)]
            )
            found[mesh] = first, losses, evaluated
    (_, one, value), (_, other, same) = found.values()
    assert other == pytest.approx(one, rel=1e-5)
    assert same == pytest.approx(value, rel=1e-5)
    assert one[-1] < one[0]


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (
            {"data": 16},
            {},
            "the mesh data 16 x fsdp 1 x tensor 1 takes 16 devices, but there are 8 devices",
        ),
        (
            {"data": -1, "fsdp": 3},
            {},
            "leaves no whole number of devices for -1, as there are 8 devices",
        ),
        ({"tensor": 4}, {"num_heads": 2}, "model.num_heads 2 is not divisible by mesh.tensor = 4"),
        ({"data": 3}, {}, "data.batch_size 8 is not divisible by mesh.data x mesh.fsdp = 3"),
        (
            {"fsdp": 4},
            {"channels": 18, "num_heads": 2},
            "model.channels 18 is not divisible by mesh.fsdp = 4",
        ),
    ],
)
def test_an_invalid_mesh_is_rejected_with_the_reason(mesh, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_mesh(
            MeshConfig(**mesh),
            tiny.config(**{"num_heads": 8, "channels": 16, **changes}).axis_sizes,
            B,
        )


class Elsewhere:
    """A device of some process."""

    platform, device_kind, client = "cpu", "cpu", None

    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("asked", "batch", "count", "first"),
    [
        (
            (16, 1, 1),
            8,
            8,
            "for 8 devices, (data, fsdp, tensor) can be (8, 1, 1), (4, 2, 1), (4, 1, 2) or (2, 4, "
            "1), or others",
        ),
        ((-1, 3, 1), 8, 8, "(2, 4, 1), (4, 2, 1), (1, 8, 1) or (1, 4, 2), or others"),
        (
            (1, 1, 5),
            12,
            12,
            "(1, 1, 12), (1, 3, 4)",
        ),  # in 3 processes: tensor 3 or 6 would give two of them parts of the same rows
        (
            (1, 5, 2),
            1,
            8,
            "no mesh takes all 8 devices with data.batch_size 1, but with 8, (data, fsdp, tensor) "
            "can be (1, 4, 2)",
        ),
        ((2, 1, 1), 8, 1, "for 1 device, (data, fsdp, tensor) can only be (1, 1, 1)"),
    ],
)
def test_every_suggested_mesh_is_valid(asked, batch, count, first):
    """With 4 devices in a process, and for the batch size that the message names."""
    devices = [Elsewhere(n, n // 4) for n in range(count)]
    sizes_of_model = tiny.config(num_heads=12, channels=48, vocab_size=384).axis_sizes
    with pytest.raises(ConfigError, match=re.escape(first)) as error:
        make_mesh(MeshConfig(*asked), sizes_of_model, batch, devices)
    rows = count if "no mesh takes all" in str(error.value) else batch
    listed = [
        tuple(map(int, sizes.split(", ")))
        for sizes in re.findall(r"\(([\d, ]+)\)", str(error.value))
    ]
    assert 1 <= len(listed) <= meshes.LISTED
    for sizes in listed:
        assert math.prod(sizes) == count
        meshes.row_share(make_mesh(MeshConfig(*sizes), sizes_of_model, rows, devices), rows)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [((0, 1, 1), "mesh.data must be at least 1, or -1"), ((-1, -1, 1), "only one of")],
)
def test_sizes_are_checked(mesh, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(*mesh)


def test_one_device_needs_no_mesh_and_minus_one_takes_the_remaining_devices():
    assert make_mesh(MeshConfig(), SIZES, B) is None
    assert make_mesh(MeshConfig(-1, 1, 1), SIZES, B, jax.devices()[:1]) is None
    mesh = make_mesh(MeshConfig(2, -1, 2), SIZES, B)
    assert dict(mesh.shape) == dict(zip(MESH_AXES, (2, 2, 2), strict=True))
    assert meshes.describe_mesh(mesh) == "8 devices: data 2 x fsdp 2 x tensor 2"


def test_several_processes_must_use_all_devices():
    devices = [Elsewhere(n, n // 2) for n in range(4)]
    with pytest.raises(
        ConfigError,
        match="takes 2 devices, but there are 4 devices in 2 processes, which must all take part",
    ):
        make_mesh(MeshConfig(data=2), SIZES, B, devices)
