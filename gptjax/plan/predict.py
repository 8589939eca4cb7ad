"""What a step needs and does on each device, from shapes and the rules of the mesh alone: nothing is compiled.

It knows what the hand-written backward saves, because the forward says so, and what has to be sent, because `RULES` do. What
a compiler adds or saves it does not know.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gptjax import steps
from gptjax.data import BatchShape
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import training_block
from gptjax.models.params import MATRICES, Block, num_matrix_params, param_shapes
from gptjax.ops import attention_fwd
from gptjax.optim import Optimizer
from gptjax.plan.collectives import Collective, sent, summed
from gptjax.sharding import MESH_AXES

CUT_BY_HEADS = ("att", "attproj", "gelu", "fcproj")  # of `BlockSaved`: tensor cuts their heads or hidden units


class Work(NamedTuple):
    """A step to plan: everything that decides what it needs."""

    model: GPT2Config
    """Resolved."""
    shape: BatchShape
    """On all devices together."""
    mesh: tuple[int, ...]
    """(data, fsdp, tensor)."""

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on one device."""
        return self.shape.batch_size // (self.mesh[0] * self.mesh[1])

    def with_rows(self, rows: int) -> "Work":
        """The same with so many."""
        return self._replace(shape=self.shape._replace(batch_size=rows * self.mesh[0] * self.mesh[1]))


def state_bytes(work: Work, optimizer: Optimizer) -> dict[str, int]:
    """Bytes on each device that last: exact."""
    mesh: Any = AbstractMesh(work.mesh, MESH_AXES, axis_types=(AxisType.Auto,) * 3) if math.prod(work.mesh) > 1 else None
    state = steps.step_arguments(work.model, optimizer, work.shape, mesh)[0]
    params = steps.bytes_per_device(state.params)
    return {"parameters": params, "optimizer": steps.bytes_per_device(state.opt_state), "gradients": params}


def saved_bytes(work: Work) -> int:
    """Bytes on each device that the hand-written backward keeps of the forward of a micro-batch, all layers and the end."""
    model, B, T, C = work.model, work.rows, work.shape.seq_len, work.model.channels
    stream = B * T * C * model.compute_dtype.itemsize
    end = 2 * stream + 2 * B * T * 4 + stream * bool(model.dropout)  # the last LayerNorm's input, statistics and output
    kept = stream if model.recompute == "block" else _block_bytes(work, model.recompute)
    return model.num_layers * kept + end


def _block_bytes(work: Work, recompute: str) -> int:
    """Of one block. cuDNN's and splash attention save what the blockwise one does: q, k, v, o and each row's lse."""
    attention: Any = "materialised" if work.model.attention == "materialised" else "blockwise"
    cfg: Any = dataclasses.replace(work.model, attention=attention)
    weights = Block(*(jax.ShapeDtypeStruct(s[1:], jnp.float32) for s in _block_shapes(cfg)))
    x = jax.ShapeDtypeStruct((work.rows, work.shape.seq_len, cfg.channels), cfg.compute_dtype)
    key = jax.eval_shape(lambda: jax.random.key(0)) if cfg.dropout else None
    _, saved = jax.eval_shape(partial(training_block, attention_fwd, cfg=cfg), weights, x, key=key)
    if attention == "blockwise":
        saved = saved._replace(attproj=None)  # it is o
    if recompute == "gelu":
        saved = saved._replace(fcproj=None)
    tensor = work.mesh[2]
    parts = {name: steps.bytes_per_device(part) for name, part in saved._asdict().items()}
    return sum(size // tensor if name in CUT_BY_HEADS else size for name, size in parts.items())


def working_bytes(work: Work) -> int:
    """Bytes on each device beside what is saved, at the largest of two moments: the classifier, and one block's backward."""
    model, (_, fsdp, tensor) = work.model, work.mesh
    item, T, C = model.compute_dtype.itemsize, work.shape.seq_len, model.channels
    stream = work.rows * T * C
    vocabulary = model.padded_vocab_size * C // tensor
    scores = 2 * work.rows * T * model.padded_vocab_size // tensor // model.loss_chunks  # and their gradient
    gathered = item + 4 if fsdp > 1 else 0  # bytes of a weight, and of its gradient before it is scattered
    classifier = item * (scores + stream) + vocabulary * gathered
    layer = sum(math.prod(s[1:]) for s in _block_shapes(model)) // tensor
    backward = item * (8 * stream // tensor + 4 * stream) + layer * gathered
    if model.recompute == "block":
        backward += _block_bytes(work, "none")
    narrow = item * num_matrix_params(model) // (fsdp * tensor) if item < 4 else 0  # the weights in the compute dtype
    summed_gradients = state_elements(work) * 4 if work.shape.accumulate > 1 else 0
    return max(classifier, backward) + narrow + summed_gradients + (_kept_gathered(work) if fsdp > 1 else 0)


def _kept_gathered(work: Work) -> int:
    """Bytes of the weights that stay gathered.

    XLA gathers them for the forwards of all micro-batches at once, before the loop over them; and for a block's recomputation
    it takes those of its forward. Only for the backward are they gathered anew. In a loop over layers it gathers a layer's.
    """
    model = work.model
    again = model.layers == "unroll" and (work.shape.accumulate > 1 or model.recompute == "block")
    return model.compute_dtype.itemsize * num_matrix_params(model) // work.mesh[2] if again else 0


def state_elements(work: Work) -> int:
    """Parameters on one device."""
    return sum(map(math.prod, param_shapes(work.model))) // (work.mesh[1] * work.mesh[2])


def step_flops(work: Work) -> float:
    """FLOPs of the products of a step on one device: 6 a weight and token, 12 L C T of attention, and what is recomputed.

    Attention is counted as if no block above the diagonal were skipped, as `flops_per_token` does.
    """
    model, T = work.model, work.shape.seq_len
    blocks = num_matrix_params(model) - model.padded_vocab_size * model.channels
    again = 2 * blocks + 4 * model.num_layers * model.channels * T if model.recompute == "block" else 0
    token = 6 * num_matrix_params(model) + 12 * model.num_layers * model.channels * T + again
    return token * work.shape.tokens / math.prod(work.mesh)


def step_traffic(work: Work) -> tuple[float, float]:
    """Bytes that a device's memory must move at least in a step: (forward and backward, update).

    What is saved is written and read once, weights are read for each pass over them and scores moved three times. The update
    reads and writes parameters and float32 moments once. Gradients are written once and read twice, first for their norm.
    """
    model, A, item = work.model, work.shape.accumulate, work.model.compute_dtype.itemsize
    passes = 3 if model.recompute == "block" else 2
    weights = passes * num_matrix_params(model) // work.mesh[2] * item
    scores = 3 * work.rows * work.shape.seq_len * model.padded_vocab_size // work.mesh[2] * item
    adding = 8 * state_elements(work) if A > 1 else 0
    return A * (2 * saved_bytes(work) + weights + scores + adding), (2 + 4 + 3) * 4 * state_elements(work)


def step_collectives(work: Work) -> list[Collective]:
    """What `RULES` make necessary in a step, weights' vectors and single numbers aside.

    Over fsdp each matrix is gathered for the forward and for each backward (see `_kept_gathered`), the gradient scattered, and
    the embedding exchanged; over data the gradient is summed; over tensor the residual stream is, and the matrix that gives
    q, k and v is exchanged, as its gradient is: a part of its columns is not the part of the heads. A recomputation does so
    anew, and gathers it anew for that. Scanned layers gather theirs in each forward.
    """
    model, A, (data, fsdp, tensor) = work.model, work.shape.accumulate, work.mesh
    L, item, block = model.num_layers, model.compute_dtype.itemsize, model.recompute == "block"
    vocabulary = model.padded_vocab_size * model.channels // tensor
    matrices = (num_matrix_params(model) // tensor) - vocabulary
    stream = work.rows * work.shape.seq_len * model.channels * item
    qkv, anew = L * 3 * model.channels**2 // tensor, A * block * (tensor > 1)
    count, streams = len(MATRICES) * L, (5 if block else 4) * L + 2
    times = A + (A if model.layers == "scan" else 1)  # each matrix is gathered

    def one(kind: str, group: int, times: float, whole: float) -> Collective:
        return Collective(kind, group, times, sent(kind, whole, group))

    return summed(
        [
            one("all-gather", fsdp, times * count + 1 + anew * L, (times * matrices + anew * qkv + vocabulary) * item),
            one("reduce-scatter", fsdp, A * (count + 1), A * (matrices + vocabulary) * 4),
            one("all-to-all", fsdp, 2 * A, 2 * A * stream),
            one("all-reduce", data, A * (count + 1), A * (matrices + vocabulary) * 4 / fsdp),
            one("all-reduce", tensor, A * streams, A * streams * stream),
            one("all-to-all", tensor, (times + A + anew) * L, qkv * ((times + anew) * item + A * 4) / fsdp),
        ]
    )


def _block_shapes(model: GPT2Config) -> Block:
    shapes = param_shapes(model)
    return Block(*(getattr(shapes, name) for name in Block._fields))
