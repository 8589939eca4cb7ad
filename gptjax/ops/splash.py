"""Attention by JAX's splash kernel for TPU, a Pallas kernel that keeps scores in on-core memory."""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.config import SPLASH_MULTIPLE
from gptjax.parallel.sharding import RULES, num_shards

LANES = SPLASH_MULTIPLE
LARGEST_BLOCK = 512  # most queries, and most keys, in a block

Heads = Float[Array, "B T H D"]
KeyHeads = Float[Array, "B T K D"]
Segments = Int[Array, "B T"]


def splash_fwd(
    q: Heads, k: KeyHeads, v: KeyHeads, segments: Segments | None = None
) -> tuple[Heads, Any]:
    """`materialised_fwd` by the splash kernel, which skips blocks above the diagonal.

    Needs a TPU (or `jax.experimental.pallas.tpu.force_tpu_interpret_mode`), a dtype of at most 32
    bits, and T a multiple of `LANES`.

    Saved: the function of `jax.vjp` that runs the kernel's own backward and holds q, k, v, o, lse.
    """
    return jax.vjp(lambda q, k, v: splash(q, k, v, segments), q, k, v)


def splash(q: Heads, k: KeyHeads, v: KeyHeads, segments: Segments | None = None) -> Heads:
    """The kernel alone, for JAX to differentiate."""
    T, D = q.shape[1], q.shape[3]

    def one_device(q: Heads, k: KeyHeads, v: KeyHeads, segments: Segments | None) -> Heads:
        # The kernel does not scale the scores.
        heads_first = (x.swapaxes(1, 2) for x in (q * (1 / math.sqrt(D)), k, v))
        pairs = None if segments is None else _segment_ids(segments)
        return jax.vmap(_kernel(T, q.shape[2]))(*heads_first, pairs).swapaxes(1, 2)

    if num_shards() == 1:
        return one_device(q, k, v, segments)
    # XLA cannot partition a kernel, so each device runs its own.
    rows, heads = (RULES[axis].compute for axis in ("B", "H"))
    cut = PartitionSpec(rows, None, heads, None)
    cuts = cut, cut, cut, None if segments is None else PartitionSpec(rows, None)
    return jax.shard_map(one_device, in_specs=cuts, out_specs=cut, check_vma=False)(
        q, k, v, segments
    )


def _segment_ids(segments: Segments) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    return kernel.SegmentIds(segments, segments)


def _kernel(T: int, H: int) -> Any:
    """The kernel that maps (H, T, D) queries and (K, T, D) keys and values to (H, T, D)."""
    # Imported here because only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if T % size == 0)
    # The last axis is stored in whole `LANES`: heads of 64 channels would be half padding
    layout = kernel.QKVLayout.SEQ_MINOR
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * H)
    return kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
