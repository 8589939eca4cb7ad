import jax
import jax.numpy as jnp
import pytest

from gptjax.bench.profile import KernelRun, busy, join, kernel_runs, profile, summed
from gptjax.errors import FormatError
from gptjax.parallel.devices import Device
from gptjax.plan.kernels import REACHED


def event(op, dur, tid=1, ts=0.0, module="jit_f"):
    args = {"hlo_op": op, "hlo_module": module} if op else {}
    return {"ph": "X", "pid": 7, "tid": tid, "name": "k", "ts": ts, "dur": dur, "args": args}


def thread(tid, name):
    return {"ph": "M", "pid": 7, "tid": tid, "name": "thread_name", "args": {"name": name}}


def test_kernels_add_up_by_op_without_their_numbers():
    events = [
        event("dot.12", 30.0),
        event("dot.7.clone", 10.0),
        event("fusion", 5.0),
        event("dot.12", 20.0),
    ]
    others = [{"ph": "M", "name": "process_name"}, event(None, 9.0), {}]
    found = summed(kernel_runs([*events, *others], on_gpu=False), 2)
    assert [(t.op, t.kernels) for t in found] == [("dot", 2), ("fusion", 0)]
    assert [t.seconds for t in found] == pytest.approx([30e-6, 2.5e-6])


def test_a_matrix_product_takes_the_time():
    x = jnp.ones((600, 600), jnp.float32)
    f = jax.jit(lambda x: jnp.sin((x @ x @ x)[:8]))
    jax.block_until_ready(f(x))
    found = profile(lambda: jax.block_until_ready(f(x)))
    assert found[0].seconds > 0
    assert "sin" not in found[0].op  # whatever this backend calls its products
    assert any("sin" in t.op for t in found)


def test_a_gpu_s_kernels_are_those_of_its_streams():
    """Not the lines that repeat them, nor what the host does; a kernel may lack an instruction."""
    stream = thread(1, "Stream #13(Compute,MemcpyD2D)")
    events = [
        thread(2, "XLA Ops"),
        event("while.3::fusion.1", 5.0, ts=2.0),
        event(None, 1.0, ts=8.0),
        event("fusion.1", 5.0, tid=2),
    ]
    assert kernel_runs(events, on_gpu=True) == []
    found = kernel_runs([stream, *events], on_gpu=True)
    assert [(run.module, run.op) for run in found] == [("jit_f", "fusion.1"), ("", "")]
    assert [run.start for run in found] == pytest.approx([2e-6, 8e-6])
    assert [run.seconds for run in found] == pytest.approx([5e-6, 1e-6])


def test_a_trace_without_kernels_is_no_profile():
    with pytest.raises(FormatError, match="recorded no kernels"):
        profile(lambda: None)


# A kilobyte takes 1 us, a megaflop, too
DEVICE = Device(1e12 / REACHED, 1e9, 1e9, 1e9, 8)
GRADIENT = """HloModule jit_gradient, is_scheduled=true

ENTRY %main (a: bf16[64,16], b: bf16[16,8], x: f32[64,8]) -> f32[64,8] {
  %a = bf16[64,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %x = f32[64,8]{1,0} parameter(2)
  %product.1 = bf16[64,8]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %lost.1 = f32[64,8]{1,0} copy(%x)
  ROOT %copy.2 = f32[64,8]{1,0} copy(%lost.1)
}
"""
UPDATE = """HloModule jit_update, is_scheduled=true

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %copy.2 = f32[1000]{0} copy(%x)
}
"""


@pytest.fixture(scope="module")
def joined():
    """Of two steps. The product is two kernels, one instruction is not traced, and one kernel has
    none.
    """
    step = [
        KernelRun("jit_gradient", "product.1", 0.0, 3e-6),
        KernelRun("jit_gradient", "product.1", 3e-6, 2e-6),
        KernelRun("jit_gradient", "copy.2", 5e-6, 8e-6),
        KernelRun("jit_update", "copy.2", 13e-6, 16e-6),
        KernelRun("", "", 29e-6, 1e-6),
    ]
    runs = step + [run._replace(start=run.start + 1) for run in step]
    return join([GRADIENT, UPDATE], DEVICE, runs, 2)


@pytest.mark.parametrize(
    ("name", "kind", "least", "launches", "seconds"),
    [
        ("product.1", "cuBLAS product", 2 * (64 * 16 + 16 * 8 + 64 * 8) / 1e9, 2, 5e-6),
        ("lost.1", "copy", 2 * 4 * 64 * 8 / 1e9, 0, 0),
        ("copy.2", "copy", 2 * 4 * 64 * 8 / 1e9, 1, 8e-6),
        ("copy.2", "copy", 2 * 4 * 1000 / 1e9, 1, 16e-6),
        ("", "not counted", 0, 1, 1e-6),
    ],
)
def test_an_instruction_is_joined_with_its_kernels(joined, name, kind, least, launches, seconds):
    """By the program's and its own name."""
    (one,) = (
        one
        for one in joined
        if one.counted.name == name and one.counted.seconds == pytest.approx(least)
    )
    assert one.counted.kind == kind
    assert (one.launches, one.seconds) == pytest.approx((launches, seconds))


def test_there_are_no_more_instructions_than_those(joined):
    assert len(joined) == 5


def test_programs_of_one_name_are_counted_together():
    (one,) = join([UPDATE, UPDATE], DEVICE, [KernelRun("jit_update", "copy.2", 0.0, 9e-6)], 1)
    assert (one.counted.times, one.counted.seconds) == (2, pytest.approx(16e-6))
    assert (one.launches, one.seconds) == (1, 9e-6)


def test_time_in_which_several_kernels_run_counts_once():
    """From 1 to 5 and from 7 to 8 of the 7 seconds from 1 to 8."""
    spans = [(7.0, 1.0), (1.0, 3.0), (2.0, 1.0), (3.0, 2.0)]
    assert busy([KernelRun("", "", *span) for span in spans]) == (5.0, 7.0)
