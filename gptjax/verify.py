"""Check the hand-written backward against JAX's: ``python -m gptjax.verify --config configs/124m.yaml``.

Prints, for each op and for each of the model's tensors, the relative L2 error of the gradient derived by hand, computed
in float64 and in float32, against JAX's gradient of the plain forward in float64. Reads the same configuration as
training; the parameters are initial ones with noise on all of them, so that no gradient is zero by symmetry. Exit
status 0 when all errors are within bounds, 1 when one is not.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import cli, ops
from gptjax.config import Config
from gptjax.models import gpt2
from gptjax.models.config import GPT2Config
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, init_params, stack
from gptjax.ops.attention import materialised_bwd, materialised_fwd
from gptjax.ops.blockwise import blockwise_bwd, blockwise_fwd

PROG = "python -m gptjax.verify"
WRONG = 1  # exit status
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
NOISE = 0.02  # standard deviation of what is added to the initial parameters


class OpCase(NamedTuple):
    """One op at one shape: its two halves as functions of the differentiable arguments."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    with cli.reported_errors(PROG):
        cfg, _ = cli.parse(Config, PROG, __doc__ or "", argv)
        cli.keep_freed_memory()
        jax.config.update("jax_enable_x64", True)
        rows = [*op_errors(), *model_errors(cfg)]
    print(f"{'gradient of':<24} {'float64':>10} {'float32':>10}")
    for name, *errors in rows:
        print(f"{name:<24} {errors[0]:>10.1e} {errors[1]:>10.1e}")
    worst = [float(np.max(errors)) for errors in ([row[1] for row in rows], [row[2] for row in rows])]  # NaN prevails
    right = all(error <= bound for error, bound in zip(worst, BOUNDS.values(), strict=True))
    bounds = ", ".join(f"{dtype} {error:.1e} (bound {BOUNDS[dtype]:.0e})" for dtype, error in zip(BOUNDS, worst, strict=True))
    print(f"{'all gradients agree' if right else 'A GRADIENT IS WRONG'}: worst {bounds}")
    return 0 if right else WRONG


def op_cases() -> list[OpCase]:
    """Every op, at a small shape."""
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (2, 9), 0, 5, jnp.int32)
    positions = jnp.arange(9, dtype=jnp.int32)
    targets = jax.random.randint(key, (6,), 0, 40, jnp.int32)
    weights = jnp.full(6, 1 / 6, jnp.float32)

    def embedding_bwd(wte: Any, wpe: Any, dy: Any) -> Any:
        return ops.embedding_bwd(tokens, positions, jnp.zeros_like(wte), jnp.zeros_like(wpe), dy)

    def cross_entropy(x: Any) -> Any:
        return ops.cross_entropy_fwd(x, targets, weights, 40)

    heads = ((2, 9, 3, 4),) * 3
    return [
        OpCase(
            "embedding",
            lambda wte, wpe: ops.embedding_fwd(tokens, positions, wte, wpe, wte.dtype),
            embedding_bwd,
            ((5, 8), (9, 8)),
        ),
        OpCase(
            "linear",
            lambda *a: ops.linear_fwd(*a)[0],
            lambda x, w, b, dy: ops.linear_bwd(x, w, dy),
            ((2, 9, 8), (8, 6), (6,)),
        ),
        OpCase(
            "layernorm",
            lambda *a: ops.layernorm_fwd(*a)[0],
            lambda x, w, b, dy: ops.layernorm_bwd(ops.layernorm_fwd(x, w, b)[1], w, dy),
            ((2, 9, 8), (8,), (8,)),
        ),
        OpCase("gelu", lambda x: ops.gelu_fwd(x)[0], lambda x, dy: (ops.gelu_bwd(x, dy),), ((2, 9, 8),)),
        OpCase(
            "dropout",
            lambda x: ops.dropout_fwd(x, 0.2, key)[0],
            lambda x, dy: (ops.dropout_bwd(ops.dropout_fwd(x, 0.2, key)[1], 0.2, dy),),
            ((2, 9, 8),),
        ),
        OpCase(
            "attention materialised",
            lambda *a: materialised_fwd(*a)[0],
            lambda q, k, v, do: materialised_bwd(materialised_fwd(q, k, v)[1], do),
            heads,
        ),
        OpCase(
            "attention blockwise",
            lambda q, k, v: blockwise_fwd(q, k, v, block_size=4)[0],
            lambda q, k, v, do: blockwise_bwd(blockwise_fwd(q, k, v, block_size=4)[1], do),
            heads,
        ),
        OpCase(
            "cross-entropy",
            lambda x: cross_entropy(x)[0],
            lambda x, dloss: (ops.cross_entropy_bwd(cross_entropy(x)[1], 40, dloss),),
            ((6, 64),),
        ),
    ]


def op_errors() -> list[tuple[str, float, float]]:
    """(op, worst error over its arguments in float64, in float32)."""
    rows = []
    for case in op_cases():
        keys = jax.random.split(jax.random.key(1), len(case.shapes) + 1)
        exact = [jax.random.normal(k, shape, jnp.float64) for k, shape in zip(keys[1:], case.shapes, strict=True)]
        dy = jax.random.normal(keys[0], jax.eval_shape(case.forward, *exact).shape, jnp.float64)
        reference = jax.vjp(case.forward, *exact)[1](dy)
        errors = []
        for dtype in BOUNDS:
            grads = case.backward(*(x.astype(dtype) for x in (*exact, dy)))
            errors.append(float(np.max([relative_l2(g, r) for g, r in zip(grads, reference, strict=True)])))
        rows.append((case.name, errors[0], errors[1]))
    return rows


def model_errors(cfg: Config) -> list[tuple[str, float, float]]:
    """(tensor, error in float64, in float32) of the whole model's gradient, each tensor over all its layers."""
    model = cfg.model.resolve("cpu", cfg.data.seq_len)  # on any device: cuDNN's attention has no float64
    ids = np.random.default_rng(cfg.seed).integers(0, model.vocab_size, (cfg.data.batch_size, cfg.data.seq_len + 1), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    key = jax.random.key(cfg.seed)
    params = jax.jit(lambda: noisy_params(key, model))()

    def gradient(f: Any, dtype: Any) -> Params:
        run = jax.jit(partial(f, cfg=dataclasses.replace(model, dtype=dtype)))
        return stack(run(jax.tree.map(lambda x: x.astype(dtype), params), batch, key=key))

    def by_hand(*args: Any, **kwargs: Any) -> Params:
        return gpt2.loss_and_grad(*args, **kwargs)[1]

    reference = gradient(jax.grad(gpt2.loss), "float64")
    errors = [list(map(relative_l2, gradient(by_hand, dtype), reference)) for dtype in BOUNDS]
    return list(zip(Params._fields, *errors, strict=True))


def noisy_params(key: Any, cfg: GPT2Config) -> Params:
    """float64 initial parameters, with noise on all but the vocabulary's pad rows."""
    params = init_params(key, cfg, jnp.float64)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    noisy: Params = jax.tree.unflatten(
        tree, [x + NOISE * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
    return noisy._replace(wte=noisy.wte.at[cfg.vocab_size :].set(0))


def relative_l2(ours: Any, reference: Any) -> float:
    """|ours - reference| / |reference|, in float64."""
    return float(jnp.linalg.norm((ours.astype(jnp.float64) - reference).ravel()) / jnp.linalg.norm(reference.ravel()))


if __name__ == "__main__":
    sys.exit(main())
