"""The step on 8 simulated devices: the same numbers as on one, every array cut, and nothing sent that need not be."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import mesh as meshes
from gptjax import steps
from gptjax.checkpoint import CheckpointWriter, restore_newest
from gptjax.errors import ConfigError
from gptjax.mesh import MeshConfig, make_mesh
from gptjax.models import gpt2
from gptjax.models.params import MATRICES, Block, param_shapes
from gptjax.optim import OptimConfig, make_optimizer
from gptjax.sharding import MESH_AXES, within
from tests.compare import assert_same_gradients
from tests.models import tiny

KEY = jax.random.key(0)
A, B, T = 2, 8, 6
CFG = tiny.config(num_layers=1, num_heads=8, channels=16, vocab_size=120, loss_chunks=2, dropout=0.2)
OPTIMIZER = make_optimizer(OptimConfig(schedule="constant"), 10)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=8),
    "data and fsdp": MeshConfig(2, 4),
    "all": MeshConfig(2, 2, 2),
}


@functools.cache
def mesh_of(name, cfg=CFG):
    return make_mesh(MESHES[name], cfg, B)


ROWS = 20  # tokens in a sequence: so many that activations are larger than weights, and no two things are equally large
PLAIN = dataclasses.replace(CFG, dropout=0.0, loss_chunks=1, max_seq_len=ROWS)


def gradient(cfg, backward="manual", name=None, shape=(A, B, T)):
    """((loss, gradient), parameters, program) of A micro-batches as training computes it, on one device or a mesh."""
    mesh = mesh_of(name) if name else None
    params, batch = tiny.params(cfg, jnp.dtype(cfg.dtype)), tiny.batch(cfg, shape[0] * shape[1], shape[2])
    batch = meshes.place_rows(mesh, jax.tree.map(lambda x: np.asarray(x).reshape(shape), batch))
    if mesh:
        params = jax.device_put(params, meshes.param_shardings(mesh, cfg))
    arguments = params, batch, meshes.whole(mesh, KEY), np.int32(3), jax.tree.map(jnp.zeros_like, params)
    run = steps.step_functions(cfg, OPTIMIZER, backward, mesh).gradient.lower(*arguments).compile()
    return run(*arguments)[:2], params, run


@functools.cache
def plain(name):
    """Without dropout and pieces; its program is looked at too."""
    return gradient(PLAIN, name=name, shape=(1, B, ROWS))


def assert_same(found, expected, tolerance):
    """Loss and gradient, and that the gradient lies as the parameters that it changes."""
    (loss, grads), params, _ = found
    (one_loss, one_grads), _, _ = expected
    assert float(loss) == pytest.approx(float(one_loss), rel=tolerance)
    assert_same_gradients(grads, one_grads, params, tolerance)
    for gradient, kept in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert gradient.sharding.is_equivalent_to(kept.sharding, gradient.ndim)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(name):
    assert_same(plain(name), plain(None), 1e-12)


@pytest.mark.parametrize(
    ("name", "backward", "changes", "tolerance"),
    [
        ("all", "manual", {}, 1e-12),  # dropout draws the same numbers however an array is cut
        ("all", "autodiff", {}, 1e-12),
        ("all", "manual", {"dtype": "float32"}, 1e-5),
        ("all", "autodiff", {"dtype": "float32"}, 1e-5),
        *((name, "autodiff", {"dropout": 0.0}, 1e-12) for name in ("data", "fsdp", "tensor")),
        ("fsdp", "manual", {"layers": "scan", "num_layers": 2, "recompute": "block", "attention": "blockwise"}, 1e-12),
    ],
)
def test_so_it_does_however_the_model_is_computed(name, backward, changes, tolerance):
    cfg = dataclasses.replace(CFG, **changes)
    found = gradient(cfg, backward, name)
    assert_same(found, gradient(cfg, backward), tolerance)
    assert "collective-permute" not in found[2].as_text()


def collectives(text):
    """(kind, elements of the result): how many of them; of numbers, not of ids."""
    found = collections.Counter()
    for line in text.splitlines():
        call = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line)
        for shape in re.findall(r"f64\[([\d,]*)\]", call[1]) if call else []:
            found[call[2], math.prod(int(n) for n in shape.split(",") if n)] += 1
    return found


def assert_gathered(found, name, passes):
    """Over fsdp each layer's weights were, once for each pass, and the vocabulary's once; nothing else but vectors."""
    _, fsdp, tensor = MESHES[name].shape
    gathered = collections.Counter({size: n for (kind, size), n in found.items() if kind == "all-gather"})
    shapes = param_shapes(PLAIN)._asdict()
    vectors = {n for shape in shapes.values() for n in (shape[-1], shape[-1] // tensor)}
    weights: collections.Counter = collections.Counter()
    for weight in (*MATRICES, "wte") if fsdp > 1 else ():
        weights[math.prod(shapes[weight][-2:]) // tensor] += passes * PLAIN.num_layers if weight in MATRICES else 1
    assert collections.Counter({size: n for size, n in gathered.items() if size not in vectors}) == weights
    assert not [kind for kind, _ in found if kind == "collective-permute"]


@pytest.mark.parametrize("name", MESHES)
def test_no_weight_is_gathered_but_over_fsdp_and_no_score_at_all(name):
    """For the forward and for the backward."""
    assert_gathered(collectives(plain(name)[2].as_text()), name, passes=2)


def test_evaluation_gathers_each_weight_once():
    mesh = mesh_of("all")
    batch = meshes.place_rows(mesh, jax.tree.map(np.asarray, tiny.batch(PLAIN, B, ROWS)))
    evaluate = jax.jit(within(mesh, functools.partial(gpt2.loss, cfg=PLAIN)))
    assert_gathered(collectives(evaluate.lower(plain("all")[1], batch).compile().as_text()), "all", passes=1)


@pytest.mark.parametrize("name", MESHES)
def test_what_is_summed_over_devices_is_a_gradient_or_a_value_in_the_residual_stream(name):
    """Scores are summed to three numbers a row; a gradient's sum is of this device's part of the vocabulary."""
    data, fsdp, tensor = MESHES[name].shape
    found = collectives(plain(name)[2].as_text())
    summed = {size: n for (kind, size), n in found.items() if kind == "all-reduce"}
    shapes = param_shapes(PLAIN)._asdict()
    grads = {math.prod(s[1:] if w in Block._fields else s) // cut for w, s in shapes.items() for cut in {1, tensor, fsdp}}
    grads |= {math.prod(shapes["wte"]) // (tensor * fsdp), math.prod(shapes["qkvw"][1:]) // (tensor * fsdp)}
    stream = B * ROWS * PLAIN.channels // data
    rows = B * ROWS // (data * fsdp)
    assert set(summed) <= grads | {math.prod(s[1:]) // (tensor * fsdp) for s in shapes.values() if len(s) == 3} | {
        stream // fsdp,
        rows,
        1,
    }, name
    if tensor > 1:
        assert summed[stream // fsdp] == 4 * PLAIN.num_layers + 2  # two a layer each way, the embedding, before the classifier
        assert summed[rows] == 3
    if data * fsdp > 1:
        assert max(size for size in summed if size != stream // fsdp) <= math.prod(shapes["wte"]) // tensor


def test_memory_falls_with_the_devices():
    """Parameters, moments and gradients each to 1 / N; nothing is whole."""
    whole = sum(map(math.prod, param_shapes(PLAIN))) * 4
    for n in (2, 4, 8):
        mesh = make_mesh(MeshConfig(fsdp=n), PLAIN, B)
        state, _, _ = steps.step_arguments(PLAIN, OPTIMIZER, (1, B, ROWS), mesh)
        held = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(tree))  # noqa: E731
        assert held(state.params) == whole / n
        assert held(state.opt_state) == 2 * whole / n + 8  # and two counters
    arguments = {name: plain(name)[2].memory_analysis().argument_size_in_bytes for name in ("data", "fsdp")}
    ids = 2 * B * ROWS * 4 // 8 + 64
    assert arguments["data"] == pytest.approx(2 * 2 * whole, abs=ids)  # parameters and room for the gradient, float64 here
    assert arguments["fsdp"] == pytest.approx(2 * 2 * whole / 8, abs=ids)
    for name, part in (("data", whole), ("fsdp", whole / 8)):  # the gradient is written over that room
        assert plain(name)[2].memory_analysis().alias_size_in_bytes >= 2 * part


def test_training_starts_and_goes_on_as_on_one_device():
    """Parameters are drawn in their shards, and a step changes shards; what is fetched are scalars."""
    cfg = dataclasses.replace(PLAIN, dtype="float32")
    batch = jax.tree.map(lambda x: np.asarray(x)[None], tiny.batch(cfg, B, T))
    found = {}
    with jax.enable_x64(False):
        for mesh in (None, mesh_of("all")):
            state = steps.make_state(KEY, cfg, OPTIMIZER, mesh)
            if mesh:
                jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), state, found[None][0])
                assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
                assert not [x for x in jax.tree.leaves(state.params) if x.sharding.is_fully_replicated]
            first = jax.device_get(state)
            arguments = steps.step_arguments(cfg, OPTIMIZER, (1, B, T), mesh)
            compiled = steps.compile_step(cfg, OPTIMIZER, "manual", *arguments, mesh)
            losses = []
            for step in range(1, 4):
                state, metrics = steps.run_step(compiled, state, meshes.place_rows(mesh, batch), KEY, step)
                losses.append(float(metrics.loss))
            evaluated = steps.evaluate(steps.make_eval_loss(cfg, mesh), state.params, [jax.tree.map(lambda x: x[0], batch)])
            found[mesh] = first, losses, evaluated
    (_, one, value), (_, other, same) = found.values()
    assert other == pytest.approx(one, rel=1e-5)
    assert same == pytest.approx(value, rel=1e-5)
    assert one[-1] < one[0]


def test_a_checkpoint_is_read_onto_any_other_mesh(tmp_path):
    saved = steps.make_state(KEY, PLAIN, OPTIMIZER, mesh_of("all"))
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, saved, PLAIN, {})
    writer.close()
    scan = dataclasses.replace(PLAIN, layers="scan")
    for cfg, mesh in ((PLAIN, mesh_of("fsdp")), (PLAIN, None), (scan, mesh_of("tensor"))):
        state = restore_newest(tmp_path, cfg, OPTIMIZER, mesh).state
        np.testing.assert_array_equal(state.params.fcw[0], saved.params.fcw[0])
        assert len(state.params.wte.sharding.device_set) == (mesh.size if mesh else 1)
        if mesh:
            assert state.params.wte.sharding.is_equivalent_to(meshes.param_shardings(mesh, cfg).wte, 2)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ({"data": 16}, {}, "the mesh data 16 x fsdp 1 x tensor 1 takes 16 devices, but there are 8 devices"),
        ({"data": -1, "fsdp": 3}, {}, "leaves no whole rest, as there are 8 devices"),
        ({"tensor": 4}, {"num_heads": 2}, "model.num_heads 2 does not divide by mesh.tensor = 4"),
        ({"data": 3}, {}, "data.batch_size 8 does not divide by mesh.data x mesh.fsdp = 3"),
        ({"fsdp": 4}, {"channels": 18, "num_heads": 2}, "model.channels 18 does not divide by mesh.fsdp = 4"),
    ],
)
def test_a_mesh_that_cannot_be_says_what_could(mesh, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_mesh(MeshConfig(**mesh), tiny.config(**{"num_heads": 8, "channels": 16, **changes}), B)


class Elsewhere:
    """A device of some process."""

    platform, device_kind, client = "cpu", "cpu", None

    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("asked", "batch", "count", "first"),
    [
        ((16, 1, 1), 8, 8, "of 8 devices, (data, fsdp, tensor) can be (8, 1, 1), (4, 2, 1), (4, 1, 2) or (2, 4, 1), or others"),
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
            "no mesh takes all 8 devices with data.batch_size 1, but with 8, (data, fsdp, tensor) can be (1, 4, 2)",
        ),
        ((2, 1, 1), 8, 1, "of 1 device, (data, fsdp, tensor) can only be (1, 1, 1)"),
    ],
)
def test_each_mesh_that_is_said_to_be_one_that_can_be_is(asked, batch, count, first):
    """Of 4 devices a process, and for the rows that are named."""
    devices, cfg = [Elsewhere(n, n // 4) for n in range(count)], tiny.config(num_heads=12, channels=48, vocab_size=384)
    with pytest.raises(ConfigError, match=re.escape(first)) as error:
        make_mesh(MeshConfig(*asked), cfg, batch, devices)
    rows = count if "no mesh takes all" in str(error.value) else batch
    listed = [tuple(map(int, sizes.split(", "))) for sizes in re.findall(r"\(([\d, ]+)\)", str(error.value))]
    assert 1 <= len(listed) <= meshes.LISTED
    for sizes in listed:
        assert math.prod(sizes) == count
        meshes.row_share(make_mesh(MeshConfig(*sizes), cfg, rows, devices), rows)


@pytest.mark.parametrize(
    ("mesh", "message"), [((0, 1, 1), "mesh.data must be at least 1, or -1"), ((-1, -1, 1), "only one of")]
)
def test_sizes_are_checked(mesh, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(*mesh)


def test_one_device_is_no_mesh_and_the_rest_is_what_is_left():
    assert make_mesh(MeshConfig(), PLAIN, B) is None
    assert make_mesh(MeshConfig(-1, 1, 1), PLAIN, B, jax.devices()[:1]) is None
    mesh = make_mesh(MeshConfig(2, -1, 2), PLAIN, B)
    assert dict(mesh.shape) == dict(zip(MESH_AXES, (2, 2, 2), strict=True))
    assert meshes.describe_mesh(mesh) == "8 devices: data 2 x fsdp 2 x tensor 2"


def test_all_devices_of_several_processes_take_part():
    devices = [Elsewhere(n, n // 2) for n in range(4)]
    with pytest.raises(ConfigError, match="takes 2 devices, but there are 4 devices in 2 processes, which must all take part"):
        make_mesh(MeshConfig(data=2), PLAIN, B, devices)
