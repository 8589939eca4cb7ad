"""Predict memory, FLOPs and collectives of a step on each device, from shapes and sharding rules,
without compiling.

Tracing the forward shows what the hand-written backward saves, and `RULES` determine the
collectives. What a compiler adds or saves is not modelled.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gptjax.config import ModelConfig
from gptjax.datasets.batches import BatchShape
from gptjax.models.chunks import num_chunks
from gptjax.models.family import Weight, family_of
from gptjax.models.params import (
    is_weight,
    num_block_params,
    num_matrix_params,
    num_untied_params,
    rows,
    weight_table,
)
from gptjax.models.transformer import training_block
from gptjax.ops import attention_fwd
from gptjax.parallel.sharding import MESH_AXES, RULES
from gptjax.plan.collectives import Collective, bytes_sent, summed
from gptjax.train.optimizer import Optimizer
from gptjax.train.step import bytes_per_device, step_arguments

HEAD = ("Vp", "C")  # the classifier's axes


class Work(NamedTuple):
    """A step to plan."""

    model: ModelConfig
    """Resolved."""
    shape: BatchShape
    """The shape of the batch over all devices."""
    mesh: tuple[int, ...]
    """(data, fsdp, tensor)."""

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on one device."""
        return self.shape.batch_size // self.num_shards("B")

    def with_rows(self, rows: int) -> "Work":
        """The same work with ``rows`` sequences of a micro-batch on each device."""
        return self._replace(shape=self.shape._replace(batch_size=rows * self.num_shards("B")))

    def num_shards(self, axis: str, place: str = "compute") -> int:
        """The number of shards of a logical axis; ``place`` is a field of `Rule`."""
        sizes = dict(zip(MESH_AXES, self.mesh, strict=True))
        return math.prod(sizes[cut] for cut in getattr(RULES[axis], place))

    def local_shape(self, axes: tuple[str, ...], place: str = "compute") -> tuple[int, ...]:
        """The shape on one device of an array with these logical axes."""
        return tuple(self.model.axis_sizes[axis] // self.num_shards(axis, place) for axis in axes)

    def local_elements(self, axes: tuple[str, ...], place: str = "compute") -> int:
        """Elements on one device of an array with these logical axes."""
        return math.prod(self.local_shape(axes, place))

    @property
    def block_matrices(self) -> list[Weight]:
        """The matrices of one layer, as rows of the weight table."""
        return [
            weight
            for _, layered, weight, _ in rows(self.model)
            if layered and weight.kind == "matrix"
        ]

    def local_matrices(self, place: str = "compute") -> int:
        """Elements on one device of all layers' matrices."""
        return self.model.num_layers * sum(
            self.local_elements(weight.axes, place) for weight in self.block_matrices
        )

    @property
    def stream(self) -> int:
        """Elements of the residual stream, (B, T, C), on one device."""
        return self.rows * self.shape.seq_len * self.model.channels


def state_bytes(work: Work, optimizer: Optimizer) -> dict[str, int]:
    """The exact bytes on each device of parameters, optimizer state and gradients."""
    mesh: Any = (
        AbstractMesh(work.mesh, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        if math.prod(work.mesh) > 1
        else None
    )
    state = step_arguments(work.model, optimizer, work.shape, mesh)[0]
    params = bytes_per_device(state.params)
    return {
        "parameters": params,
        "optimizer": bytes_per_device(state.opt_state),
        "gradients": params,
    }


def saved_bytes(work: Work) -> int:
    """Bytes on each device that a micro-batch's forward saves for the hand-written backward, over
    all layers and the final norm.
    """
    model = work.model
    dropout = work.stream if model.dropout else 0  # a byte for each element of the embedding
    layer = (
        _nbytes(_stream(work))
        if model.recompute == "block"
        else _block_bytes(work, discard=model.recompute == "gelu")
    )
    return model.num_layers * layer + _norm_bytes(work) + dropout


def _block_bytes(work: Work, discard: bool) -> int:
    """Bytes that one block saves. cuDNN's and splash attention save the same as blockwise
    attention: q, k, v, o, and each row's log-sum-exp.
    """
    attention: Any = "materialised" if work.model.attention == "materialised" else "blockwise"
    cfg: Any = dataclasses.replace(work.model, attention=attention)
    family = family_of(cfg)
    positions = jax.ShapeDtypeStruct((work.shape.seq_len,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0)) if cfg.dropout or cfg.dropout_mlp else None

    def saved(w: Any, x: Any, positions: Any, key: Any) -> Any:
        _, saved = training_block(attention_fwd, w, x, positions, cfg, key)
        return family.discard(saved) if discard else saved

    return _distinct_bytes(saved, _weights(work).blocks, _stream(work), positions, key)


def _norm_bytes(work: Work) -> int:
    """Bytes that the final norm saves, and its output, which the classifier reads."""
    norm_fwd = partial(family_of(work.model).norm_fwd, cfg=work.model)
    return _distinct_bytes(norm_fwd, _weights(work), _stream(work))


def _weights(work: Work) -> Any:
    """Shapes of the weights on one device in computations; ``blocks`` is a single layer."""
    table: Any = weight_table(work.model, layered=False)
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(work.local_shape(w.axes), jnp.float32),
        table,
        is_leaf=is_weight,
    )


def _stream(work: Work) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        (work.rows, work.shape.seq_len, work.model.channels), work.model.compute_dtype
    )


def _distinct_bytes(f: Callable[..., Any], *args: Any) -> int:
    """Bytes of the distinct arrays that ``f`` returns."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    distinct = {_origin(jaxpr, var): var.aval for var in jaxpr.outvars}
    return sum(
        _nbytes(x) for x in distinct.values() if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _origin(jaxpr: Any, var: Any) -> tuple[int, ...]:
    """The origin of ``var``: the calls of jitted functions that compute it, and the innermost
    variable.
    """
    for eqn in jaxpr.eqns:
        if "jaxpr" in eqn.params and var in eqn.outvars:
            inner = eqn.params["jaxpr"].jaxpr
            found = inner.outvars[eqn.outvars.index(var)]
            if found in inner.invars:  # an argument that the function returns
                return _origin(jaxpr, eqn.invars[inner.invars.index(found)])
            return (id(eqn), *_origin(inner, found))
    return (id(var),)


def _nbytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def working_bytes(work: Work) -> int:
    """Bytes of all other temporaries on each device at their peak, which is in the classifier or in
    a block's backward.
    """
    model, (_, fsdp, tensor) = work.model, work.mesh
    item, tokens = model.compute_dtype.itemsize, work.rows * work.shape.seq_len
    head = work.local_elements(HEAD)
    # The scores of one chunk and their gradient
    scores = 2 * tokens * model.padded_vocab_size // tensor // num_chunks(model, tokens)
    # Bytes per element of a gathered weight and of its gradient before it is scattered
    gathered = item + 4 if fsdp > 1 else 0
    classifier = item * (scores + work.stream) + head * gathered
    outputs = sum(
        work.local_elements(weight.axes[weight.inputs :]) for weight in work.block_matrices
    )
    # The elements of two matrices that may be gathered at the same time
    two_largest = sum(
        sorted(work.local_elements(weight.axes) for weight in work.block_matrices)[-2:]
    )
    backward = item * (tokens * outputs + 3 * work.stream) + two_largest * gathered
    if model.recompute == "block":
        backward += _block_bytes(work, discard=False)
    kept_in_compute_dtype = item * num_matrix_params(model) // (fsdp * tensor) if item < 4 else 0
    summed_gradients = state_elements(work) * 4 if work.shape.accumulate > 1 else 0
    return (
        max(classifier, backward)
        + kept_in_compute_dtype
        + summed_gradients
        + (_stays_gathered(work) if fsdp > 1 else 0)
    )


def _stays_gathered(work: Work) -> int:
    """Bytes of the weights that stay gathered over fsdp.

    XLA gathers them once before the loop over micro-batches, for all forwards, and a block's
    recomputation reuses those of its forward. They are gathered again for the backward. Scanned
    layers are gathered one at a time.
    """
    model = work.model
    stays = model.layers == "unroll" and (work.shape.accumulate > 1 or model.recompute == "block")
    return (
        model.compute_dtype.itemsize * (work.local_matrices() + work.local_elements(HEAD))
        if stays
        else 0
    )


def state_elements(work: Work) -> int:
    """Parameters on one device."""
    return sum(
        work.local_elements(weight.axes, "param") * (work.model.num_layers if layered else 1)
        for _, layered, weight, _ in rows(work.model)
    )


def step_flops(work: Work) -> float:
    """FLOPs of a step's products on one device: 6 for each weight and token, 12 L C T for
    attention, and the recomputation.

    Attention counts the blocks above the diagonal, too, as in `flops_per_token`.
    """
    model, T = work.model, work.shape.seq_len
    recomputed = (
        2 * num_block_params(model) + 4 * model.num_layers * model.channels * T
        if model.recompute == "block"
        else 0
    )
    token = 6 * num_matrix_params(model) + 12 * model.num_layers * model.channels * T + recomputed
    return token * work.shape.tokens / math.prod(work.mesh)


def step_traffic(work: Work) -> tuple[float, float]:
    """The least memory traffic of a step on one device, in bytes: (forward and backward, update).

    Saved activations are written and read once, weights are read in each pass, and logits are moved
    three times. The update reads and writes parameters and float32 moments once. Gradients are
    written once and read twice, first for their norm.
    """
    model, A, item = work.model, work.shape.accumulate, work.model.compute_dtype.itemsize
    passes = 3 if model.recompute == "block" else 2
    weights = passes * num_matrix_params(model) // work.mesh[2] * item
    scores = 3 * work.rows * work.shape.seq_len * model.padded_vocab_size // work.mesh[2] * item
    sums = 8 * state_elements(work) if A > 1 else 0
    return A * (2 * saved_bytes(work) + weights + scores + sums), (2 + 4 + 3) * 4 * state_elements(
        work
    )


def step_collectives(work: Work) -> list[Collective]:
    """The collectives that `RULES` imply for a step, except those of vectors and scalars.

    Over fsdp each matrix is gathered for the forward and for each backward (see `_stays_gathered`),
    its gradient is reduce-scattered, and the embedding is exchanged. Over data the gradient is
    all-reduced, and an untied embedding's, too. Over tensor the residual stream is all-reduced
    after each matrix whose inputs are sharded, and its gradient as often. Scanned layers gather
    their weights in each forward.
    """
    model, A, (data, fsdp, tensor) = work.model, work.shape.accumulate, work.mesh
    L, item = model.num_layers, model.compute_dtype.itemsize
    matrices, head, count = (
        work.local_matrices(),
        work.local_elements(HEAD),
        L * len(work.block_matrices),
    )
    untied = num_untied_params(model) // tensor
    gathers = A + (A if model.layers == "scan" else 1)  # times that each matrix is gathered
    cut = sum(
        any("tensor" in RULES[axis].compute for axis in w.axes[: w.inputs])
        for w in work.block_matrices
    )
    # All but the block's output are recomputed
    again = cut - 1 if model.recompute == "block" else 0
    streams, stream = L * (2 * cut + again) + 2, work.stream * item

    def collective(kind: str, group: int, times: float, nbytes: float) -> Collective:
        return Collective(kind, group, times, bytes_sent(kind, nbytes, group))

    return summed(
        [
            collective("all-gather", fsdp, gathers * count + 1, (gathers * matrices + head) * item),
            collective("reduce-scatter", fsdp, A * (count + 1), A * (matrices + head) * 4),
            collective("all-to-all", fsdp, 2 * A, 2 * A * stream),
            collective(
                "all-reduce",
                data,
                A * (count + 1 + (untied > 0)),
                A * (matrices + head + untied) * 4 / fsdp,
            ),
            collective("all-reduce", tensor, A * streams, A * streams * stream),
        ]
    )
