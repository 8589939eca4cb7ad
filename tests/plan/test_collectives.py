"""What a program sends, counted in one whose collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.errors import FormatError
from gptjax.plan.collectives import Collective, _group, bytes_sent, collectives, summed

N, TURNS = 8, 3
FLOAT = 4  # bytes


def counted(body):
    """The collectives of ``body`` on 2 x 4 devices, each of which has 8 of 64 rows of 16 float32
    numbers.
    """
    mesh, rows = (
        Mesh(np.array(jax.devices()[:N]).reshape(2, 4), ("outer", "inner")),
        P(("outer", "inner")),
    )
    run = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return collectives(
        jax.jit(run).lower(jax.ShapeDtypeStruct((8 * N, 16), jnp.float32)).compile().as_text()
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            lambda x: lax.psum(x, ("outer", "inner")),
            Collective("all-reduce", 8, 1, 2 * 8 * 16 * FLOAT * 7 / 8),
        ),
        (
            lambda x: lax.psum(x, "inner"),
            Collective("all-reduce", 4, 1, 2 * 8 * 16 * FLOAT * 3 / 4),
        ),
        (
            lambda x: lax.all_gather(x, "outer")[0],
            Collective("all-gather", 2, 1, 2 * 8 * 16 * FLOAT / 2),
        ),
        (
            lambda x: jnp.tile(lax.psum_scatter(x, "inner", tiled=True), (4, 1)),
            Collective("reduce-scatter", 4, 1, 8 * 16 * FLOAT * 3 / 4),
        ),
        (
            lambda x: lax.all_to_all(x, "inner", 0, 0, tiled=True),
            Collective("all-to-all", 4, 1, 8 * 16 * FLOAT * 3 / 4),
        ),
        (
            lambda x: lax.ppermute(x, "inner", [(i, (i + 1) % 4) for i in range(4)]),
            Collective("collective-permute", 2, 1, 8 * 16 * FLOAT),
        ),
    ],
    ids=["all-reduce", "over an axis", "all-gather", "reduce-scatter", "all-to-all", "permute"],
)
def test_kind_group_and_bytes(body, expected):
    assert counted(body) == [expected]


def test_collectives_in_a_loop_count_once_per_iteration():
    def body(x):
        inner = lambda _, y: lax.psum(y, "inner") * 0.5  # noqa: E731
        outer = lambda _, y: lax.fori_loop(0, 2, inner, y)  # noqa: E731
        return lax.fori_loop(0, TURNS, outer, x)

    assert counted(body) == [
        Collective("all-reduce", 4, 2 * TURNS, 2 * TURNS * 2 * 8 * 16 * FLOAT * 3 / 4)
    ]


def test_bytes_sent_by_rings():
    assert bytes_sent("all-gather", 80, 8) == bytes_sent("reduce-scatter", 80, 8) == 70
    assert bytes_sent("all-reduce", 80, 8) == 140
    assert bytes_sent("all-reduce", 80, 1) == 0


TPU = """HloModule jit_f
%started (p: bf16[50,96]) -> bf16[50,768] {
  ROOT %g = bf16[50,768]{0,1:T(8,128)(2,1)} all-gather(%p), channel_id=25, replica_groups=mesh['a'=1,'b'=8] {'b'}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}
%further (p: bf16[50,96]) -> bf16[50,768] {
  ROOT %g = bf16[50,768]{0,1:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=25, replica_groups=mesh['a'=1,'b'=8] {'b'}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}
%all-reduce-scatter.9 (p: f32[16,8]) -> f32[2,8] {
  %r = f32[16,8]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}
%all-reduce-scatter.10 (p: f32[16,8]) -> f32[2,8] {
  %r = f32[16,8]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
%condition (p: (s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
}
%body (p: (s32[])) -> (s32[]) {
  %f = f32[2,8] fusion(%p), kind=kOutput, calls=%all-reduce-scatter.10
  %s = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=7
  %b = bf16[50,768] fusion(%p), kind=kCustom, calls=%further
}
%condition_of_unrolled (p: (f32[4], u32[])) -> pred[] {
  %c = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %l = pred[]{:T(512)} compare(%i, %c), direction=LT
}
%unrolled (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %first = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=8
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="f"}
  ROOT %t = (f32[4]{0}, u32[]{:T(128)}) tuple(%x, /*index=1*/%next)
}
%never (p: f32[2]) -> f32[2] {
  %r = f32[2] all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %a = bf16[50,768] fusion(%p), kind=kCustom, calls=%started
  %b = bf16[50,768] fusion(%a), kind=kCustom, calls=%further
  %w = (s32[]{:T(128)}) while(%b), condition=%condition, body=%body
  %c = f32[2,8] fusion(%p), kind=kOutput, calls=%all-reduce-scatter.9
  %v = (f32[4]{0}, u32[]{:T(128)}) while(%w), condition=%condition_of_unrolled, body=%unrolled
}
"""


def test_collectives_of_a_tpu_program_are_counted():
    """One gather spread over fusions, sums that are scattered, loops that do not say how often they
    turn, dead code.
    """
    assert summed(collectives(TPU)) == [
        Collective("all-gather", 8, 1, 50 * 768 * 2 * 7 / 8),
        Collective("reduce-scatter", 8, 1 + 3, 4 * 16 * 8 * FLOAT * 7 / 8),
        Collective("collective-permute", 2, 3 + 8 / 2, (3 * 4 + 8 / 2 * 8) * FLOAT),
    ]


CUDA = """HloModule jit_f
ENTRY %main (p: bf16[64,16]) -> bf16[64,32] {
  %g = ((bf16[64,16]{1,0}, bf16[8,4]{1,0}), (bf16[64,32]{1,0}, bf16[16,4]{1,0})) all-gather-start(%p, %q), \
replica_groups=[4,2]<=[8], dimensions={1}
  %s = (f32[64,32]{1,0}, f32[64,16]{1,0}) reduce-scatter-start(%p), replica_groups=[4,2]<=[8], dimensions={1}
}
"""


def test_gathers_that_a_gpu_program_starts_together_all_count():
    """Operands come first, then as many results."""
    assert summed(collectives(CUDA)) == [
        Collective("reduce-scatter", 2, 1, 64 * 32 * 4 / 2),
        Collective("all-gather", 2, 1, (64 * 32 + 16 * 4) * 2 / 2),
    ]


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("mesh['a'=1,'b'=8] {'b'}", 8),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0','axis_2'}", 8),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("{{0,1},{2,3}}", 2),
    ],
)
def test_group_sizes_are_read_from_every_notation(groups, devices):
    line = (
        f"%g = f32[16]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    )
    assert _group(line) == devices


def test_an_unknown_collective_is_reported():
    with pytest.raises(FormatError, match="in an unknown notation"):
        _group("%g = f32[16]{0} all-gather(%p), replica_groups=torus[2]")


OVERLAPPED = """ENTRY %main (a: f32[96,8]) -> f32[8] {
  %one = (f32[96,8]{0,1}, f32[768,8]{0,1}) all-gather-start(%a), channel_id=1, replica_groups=[1,8]<=[8]
  %one.done = f32[768,8]{0,1} all-gather-done(%one)
  %two = ((bf16[96,8]{1,0}, f32[96]{0}), (bf16[768,8]{1,0}, /*index=1*/f32[768]{0})) all-gather-start(%b, %c), channel_id=2, replica_groups=[1,8]<=[8]
  %x = f32[8]{0} fusion(%a), kind=kLoop, calls=%f
  %y = f32[8]{0} custom-call(%x), custom_call_target="g"
  %two.done = (bf16[768,8]{1,0}, f32[768]{0}) all-gather-done(%two)
  %three = ((f32[768,8]{1,0}, f32[768]{0}), (f32[96,8]{1,0}, f32[96]{0})) reduce-scatter-start(%d, %e), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %three.done = (f32[96,8]{1,0}, f32[96]{0}) reduce-scatter-done(%three)
  %four = ((bf16[8,4,2]{2,1,0}), bf16[8,4,2]{2,1,0}) all-to-all-start(%g), channel_id=4, replica_groups=[1,8]<=[8]
  %four.done = bf16[8,4,2]{2,1,0} all-to-all-done(%four)
  %five = f32[100]{0} all-reduce-start(%h), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%add
  %z = f32[8]{0} fusion(%y), kind=kLoop, calls=%f
  %five.done = f32[100]{0} all-reduce-done(%five)
}
"""


def test_asynchronous_cuda_collectives_and_the_kernels_they_overlap():
    """As an H100's programs write them: operands and results in one tuple, or two in a tuple."""
    one_by_one = collectives(OVERLAPPED, {"x": 1.0, "y": 0.5, "z": 0.25})
    assert [c.compute for c in one_by_one] == [0.0, 1.5, 0.0, 0.0, 0.25]
    found = {c.kind: c for c in summed(one_by_one)}
    gathered = 768 * 8 * 4 + 768 * 8 * 2 + 768 * 4
    assert found["all-gather"] == Collective("all-gather", 8, 2, gathered * 7 / 8, 1.5)
    scattered = 768 * 8 * 4 + 768 * 4
    assert found["reduce-scatter"] == Collective("reduce-scatter", 8, 1, scattered * 7 / 8, 0.0)
    assert found["all-to-all"] == Collective("all-to-all", 8, 1, 8 * 4 * 2 * 2 * 7 / 8, 0.0)
    assert found["all-reduce"] == Collective("all-reduce", 8, 1, 2 * 100 * 4 * 7 / 8, 0.25)
