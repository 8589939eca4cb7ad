"""The gradient on 8 simulated devices: the numbers of one device, each array cut, and nothing sent
that need not be.
"""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, OptimConfig
from gptjax.models import transformer
from gptjax.models.params import param_axes, param_shapes, rows
from gptjax.parallel import mesh as meshes
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import on_mesh
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from tests.compare import assert_same_gradients
from tests.models import mlp_family, tiny

KEY = jax.random.key(0)
A, B, T = 2, 8, 6
CFG = tiny.config(
    num_layers=1, num_heads=8, channels=16, vocab_size=120, loss_chunks=2, dropout=0.2
)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=8),
    "data and fsdp": MeshConfig(2, 4),
    "all": MeshConfig(2, 2, 2),
}
# Tokens: so many that activations are larger than weights, and no two arrays are equally large
LONG = 20
PLAIN = dataclasses.replace(CFG, dropout=0.0, loss_chunks=1, max_seq_len=LONG)


@functools.cache
def mesh_of(name):
    return make_mesh(MESHES[name], CFG.axis_sizes, B)


def optimizer_of(cfg):
    return make_optimizer(OptimConfig(schedule="constant"), 10, cfg)


def gradient(cfg, backward="manual", name=None, shape=(A, B, T), packed=False):
    """((loss, gradient), parameters, program) of A micro-batches as training computes it, on one
    device or a mesh, with several documents in a row if packed.
    """
    mesh = mesh_of(name) if name else None
    params, batch = (
        tiny.params(cfg, jnp.dtype(cfg.dtype)),
        tiny.batch(cfg, shape[0] * shape[1], shape[2]),
    )
    if packed:
        starts = np.random.default_rng(0).random((shape[0] * shape[1], shape[2])) < 0.3
        batch = batch._replace(segments=jnp.asarray(starts.cumsum(1), jnp.int32))
    batch = meshes.place_rows(mesh, jax.tree.map(lambda x: np.asarray(x).reshape(shape), batch))
    if mesh:
        params = jax.device_put(params, meshes.param_shardings(mesh, param_axes(cfg)))
    arguments = (
        params,
        batch,
        meshes.whole(mesh, KEY),
        np.int32(3),
        jax.tree.map(jnp.zeros_like, params),
    )
    run = (
        steps.step_functions(cfg, optimizer_of(cfg), backward, mesh)
        .gradient.lower(*arguments)
        .compile()
    )
    return run(*arguments)[:2], params, run


@functools.cache
def plain(name):
    """Without dropout and chunks; its program is looked at too."""
    return gradient(PLAIN, name=name, shape=(1, B, LONG))


def assert_same(found, expected, tolerance):
    """Loss and gradient are the same, and the gradient lies as the parameters that it changes."""
    (loss, grads), params, _ = found
    (one_loss, one_grads), _, _ = expected
    assert float(loss) == pytest.approx(float(one_loss), rel=tolerance)
    assert_same_gradients(grads, one_grads, params, tolerance)
    for gradient, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert gradient.sharding.is_equivalent_to(param.sharding, gradient.ndim)


def without_key_bias(found):
    """The gradient with zeros for kb, which has none but rounding: it moves all scores of a query
    alike.
    """
    (loss, grads), params, run = found
    blocks = tuple(block._replace(kb=0 * block.kb) for block in grads.blocks)
    return (loss, grads._replace(blocks=blocks)), params, run


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(name):
    assert_same(plain(name), plain(None), 1e-12)


@pytest.mark.parametrize(
    ("name", "backward", "changes", "tolerance"),
    [
        ("all", "manual", {}, 1e-12),  # dropout draws the same numbers however an array is cut
        (
            "fsdp",
            "manual",
            {"layers": "scan", "num_layers": 2, "recompute": "block", "attention": "blockwise"},
            1e-12,
        ),
        ("all", "autodiff", {}, 1e-12),
        ("all", "manual", {"dtype": "float32"}, 1e-5),
        ("all", "autodiff", {"dtype": "float32"}, 1e-5),
        ("data", "autodiff", {"dropout": 0.0}, 1e-12),
        ("fsdp", "autodiff", {"dropout": 0.0}, 1e-12),
        ("tensor", "autodiff", {"dropout": 0.0}, 1e-12),
        ("tensor", "manual", {"recompute": "gelu", "dropout_mlp": 0.1}, 1e-12),
    ],
)
def test_sharded_gradient_equals_that_of_one_device_in_every_setting(
    name, backward, changes, tolerance
):
    cfg = dataclasses.replace(CFG, **changes)
    found, expected = gradient(cfg, backward, name), gradient(cfg, backward)
    if cfg.dtype == "float32":
        found, expected = without_key_bias(found), without_key_bias(expected)
    assert_same(found, expected, tolerance)
    assert "collective-permute" not in found[2].as_text()


@pytest.mark.parametrize("name", ["data", "all"])
def test_packed_documents_have_the_same_gradient_on_a_mesh(name):
    found, expected = (gradient(CFG, name=n, packed=True) for n in (name, None))
    assert_same(found, expected, 1e-12)
    assert float(expected[0][0]) != pytest.approx(float(gradient(CFG)[0][0]), rel=1e-6)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_a_family_is_sharded_by_its_weight_table(layers):
    with mlp_family.registered() as family:
        cfg = dataclasses.replace(CFG, family=family, num_layers=2, layers=layers, dropout=0.0)
        assert_same(gradient(cfg, name="all"), gradient(cfg), 1e-12)


@functools.cache
def llama(tied, name=None):
    """Two heads of queries for each of keys and values."""
    cfg = dataclasses.replace(
        PLAIN, family="llama", num_heads=16, num_kv_heads=8, channels=32, hidden=24, tied=tied
    )
    return gradient(cfg, name=name, shape=(1, B, LONG))


@pytest.mark.parametrize(
    ("name", "tied"),
    [("tensor", False), ("data", True), ("fsdp", False), ("all", True)],
)
def test_llamas_groups_of_heads_stay_on_their_device(name, tied):
    found = llama(tied, name)
    assert_same(found, llama(tied), 1e-12)
    sent = {kind for kind, _ in collectives(found[2].as_text())}
    if name == "tensor":
        assert sent == {"all-reduce"}
    assert "collective-permute" not in sent


def collectives(text):
    """(kind, elements of the result): how many of them; of numbers, not of ids."""
    found = collections.Counter()
    for line in text.splitlines():
        call = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
            line,
        )
        for shape in re.findall(r"f64\[([\d,]*)\]", call[1]) if call else []:
            found[call[2], math.prod(int(n) for n in shape.split(",") if n)] += 1
    return found


def sizes_of(*kinds):
    """Elements of each of PLAIN's weights of these kinds."""
    return [math.prod(shape) for _, _, weight, shape in rows(PLAIN) if weight.kind in kinds]


HEAD = math.prod(param_shapes(PLAIN).wte)


def assert_gathered(found, name, passes):
    """Over fsdp each layer's matrices were gathered, once for each pass, and the classifier's once;
    else only vectors.
    """
    _, fsdp, tensor = MESHES[name].shape
    vectors = {n // cut for n in sizes_of("vector") for cut in (1, tensor)}
    gathered = collections.Counter(
        {size: n for (kind, size), n in found.items() if kind == "all-gather"}
    )
    expected: collections.Counter = collections.Counter()
    if fsdp > 1:
        expected[HEAD // tensor] += 1
        for size in sizes_of("matrix"):
            expected[size // tensor] += passes * PLAIN.num_layers
    assert (
        collections.Counter({size: n for size, n in gathered.items() if size not in vectors})
        == expected
    )
    assert not [kind for kind, _ in found if kind == "collective-permute"]


@pytest.mark.parametrize("name", MESHES)
def test_only_weights_are_gathered_and_only_over_fsdp(name):
    """Matrices are gathered for the forward and for the backward; heads are never exchanged between
    devices.
    """
    found = collectives(plain(name)[2].as_text())
    assert_gathered(found, name, passes=2)
    exchanged = sum(n for (kind, _), n in found.items() if kind == "all-to-all")
    assert (exchanged > 0) == (MESHES[name].fsdp > 1)  # the embedding and its gradient


def test_evaluation_gathers_each_weight_once():
    mesh = mesh_of("all")
    batch = meshes.place_rows(mesh, jax.tree.map(np.asarray, tiny.batch(PLAIN, B, LONG)))
    evaluate = jax.jit(on_mesh(mesh, functools.partial(transformer.loss, cfg=PLAIN)))
    assert_gathered(
        collectives(evaluate.lower(plain("all")[1], batch).compile().as_text()), "all", passes=1
    )


@pytest.mark.parametrize("name", MESHES)
def test_which_tensors_are_all_reduced(name):
    """Scores are summed to three numbers a row; a table's gradient is summed over data once
    scattered over fsdp.
    """
    data, fsdp, tensor = MESHES[name].shape
    found = collectives(plain(name)[2].as_text())
    summed = {size: n for (kind, size), n in found.items() if kind == "all-reduce"}
    grads = {
        size // cut
        for size in sizes_of("matrix", "table", "vector")
        for cut in (1, tensor, fsdp, tensor * fsdp)
    }
    stream = B * LONG * PLAIN.channels // (data * fsdp)
    scores = B * LONG // (data * fsdp)
    assert set(summed) <= grads | {stream, scores, 1}
    if tensor > 1:
        # After the projections of attention and MLP; before q, k, v and the MLP; the embedding;
        # before the classifier.
        assert summed[stream] == (2 + 4) * PLAIN.num_layers + 2
        assert summed[scores] == 3
    if data * fsdp > 1:
        assert max(size for size in summed if size != stream) <= HEAD // tensor


def test_memory_falls_with_the_devices():
    """Parameters, moments and gradients each to 1 / N, but for the biases without channels."""
    total = 4 * sum(sizes_of("matrix", "table", "vector"))
    uncut = 4 * sum(
        math.prod(shape) for _, _, weight, shape in rows(PLAIN) if "C" not in weight.axes
    )
    for n in (2, 4, 8):
        mesh = make_mesh(MeshConfig(fsdp=n), PLAIN.axis_sizes, B)
        state, _, _ = steps.step_arguments(PLAIN, optimizer_of(PLAIN), (1, B, LONG), mesh)
        local = (total - uncut) / n + uncut
        assert steps.bytes_per_device(state.params) == local
        assert 2 * local < steps.bytes_per_device(state.opt_state) <= 2 * local + 12  # and counters
    arguments = {
        name: plain(name)[2].memory_analysis().argument_size_in_bytes for name in ("data", "fsdp")
    }
    ids = 2 * B * LONG * 4 // 8 + 64
    for name, part in (("data", total), ("fsdp", (total - uncut) / 8 + uncut)):
        # Parameters and gradient buffer, float64 here
        assert arguments[name] == pytest.approx(2 * 2 * part, abs=ids)
        # The gradient is written over the buffer
        assert plain(name)[2].memory_analysis().alias_size_in_bytes >= 2 * part
