"""Kernels of small programs, whose bytes and FLOPs are counted by hand."""

import pytest

from gptjax.parallel.devices import Device
from gptjax.plan.kernels import REACHED, Kernel, kernels, summed, total

DEVICE = Device(flops=1e12 / REACHED, memory=1e9, bandwidth=1e9, link=1e9, neighbours=8)
PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/run.py"
2 "/lib/gptjax/ops/norm.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=42 end_line=42 column=1 end_column=2}
3 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%scale (p: f32[64,8], q: f32[8]) -> bf16[64,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %wide = f32[64,8]{1,0} broadcast(%q), dimensions={1}
  %y = f32[64,8]{1,0} multiply(%p, %wide)
  ROOT %z = bf16[64,8]{1,0} convert(%y)
}

%rows (table: f32[1000,8], ids: s32[4]) -> f32[4,8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  ROOT %found = f32[4,8]{1,0} gather(%table, %ids), offset_dims={1}
}

%write (cache: f32[1000,8], row: f32[1,8], at: s32[]) -> f32[1000,8] {
  %cache = f32[1000,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[1000,8]{1,0} dynamic-update-slice(%cache, %row, %at, %zero)
}

%sum (x: f32[64,8], init: f32[]) -> f32[64] {
  %x = f32[64,8]{1,0} parameter(0)
  %init = f32[] parameter(1)
  ROOT %s = f32[64]{0} reduce(%x, %init), dimensions={1}, to_apply=%add
}

%body (state: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %twice = f32[64,8]{1,0} copy(%x)
  ROOT %next = (s32[], f32[64,8]{1,0}) tuple(%n, %twice)
}

ENTRY %main (a: bf16[64,16], b: bf16[16,8], t: f32[1000,8], i: s32[4], x: f32[64,8], q: f32[8]) -> f32[64] {
  %a = bf16[64,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %t = f32[1000,8]{1,0} parameter(2)
  %i = s32[4]{0} parameter(3)
  %x = f32[64,8]{1,0} parameter(4)
  %q = f32[8]{0} parameter(5)
  %zero = f32[] constant(0)
  %at = s32[] constant(7)
  %product = (bf16[64,8]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", metadata={op_name="f" stack_frame_id=1}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %scaled = bf16[64,8]{1,0} fusion(%x, %q), kind=kLoop, calls=%scale, metadata={op_name="g" stack_frame_id=3}
  %found = f32[4,8]{1,0} fusion(%t, %i), kind=kLoop, calls=%rows, metadata={op_name="g" stack_frame_id=2}
  %row = f32[1,8]{1,0} slice(%found), slice={[0:1], [0:8]}
  %new = f32[1000,8]{1,0} fusion(%t, %row, %at), kind=kLoop, calls=%write
  %start = (s32[], f32[64,8]{1,0}) tuple(%at, %x)
  %loop = (s32[], f32[64,8]{1,0}) while(%start), condition=%stop, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[64,8]{1,0} get-tuple-element(%loop), index=1
  %sent = f32[64,8]{1,0} all-reduce-start(%y), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %got = f32[64,8]{1,0} all-reduce-done(%sent)
  ROOT %out = f32[64]{0} fusion(%got, %zero), kind=kInput, calls=%sum
}
"""


@pytest.fixture(scope="module")
def found():
    return {kernel.name: kernel for kernel in kernels(PROGRAM, DEVICE)}


@pytest.mark.parametrize(
    ("name", "kind", "times", "read", "written", "flops"),
    [
        ("product", "cuBLAS product", 1, 2 * 64 * 16 + 2 * 16 * 8, 2 * 64 * 8, 2 * 64 * 8 * 16),
        ("scaled", "elementwise", 1, 4 * 64 * 8 + 4 * 8, 2 * 64 * 8, 0),
        ("found", "elementwise", 1, 4 * 4 * 8 + 4 * 4, 4 * 4 * 8, 0),  # of the table, 4 rows
        ("new", "elementwise", 1, 4 * 8 + 4, 4 * 8, 0),  # a row in place, and where
        ("twice", "copy", 3, 3 * 4 * 64 * 8, 3 * 4 * 64 * 8, 0),  # by each turn of the loop
        ("out", "reduction", 1, 4 * 64 * 8 + 4, 4 * 64, 0),
    ],
)
def test_what_a_kernel_reads_writes_and_computes(found, name, kind, times, read, written, flops):
    kernel = found[name]
    assert kernel[0] == kind
    assert kernel[2:6] == (times, read, written, flops)
    assert kernel.seconds == pytest.approx(max((read + written) / 1e9, flops / 1e12))


def test_collectives_and_operations_that_move_no_bytes_are_left_out(found):
    assert set(found) == {"product", "scaled", "found", "row", "new", "twice", "out"}


def test_a_kernel_comes_from_the_innermost_line_of_the_package(found):
    assert found["product"].source == "elsewhere"
    assert found["scaled"].source == found["found"].source == "ops/norm.py:42"


def test_a_product_that_is_no_library_s_has_flops():
    """As on a CPU: (4, 6) by (6, 5), with 2 FLOPs for each of the 6 terms of 20 sums."""
    text = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: f32[6,4], b: f32[6,5]) -> f32[4,5] {
  %a = f32[6,4]{1,0} parameter(0)
  %b = f32[6,5]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,5]{1,0} dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}
"""
    (kernel,) = kernels(text, DEVICE)
    assert (kernel.kind, kernel.flops, kernel.read) == ("dot", 240, 4 * (24 + 30))


def test_a_total_has_the_names_of_the_first():
    ran = [Kernel("a", "x", 1, 2.0, 3.0, 4.0, 5.0, "n"), Kernel("b", "y", 2, 20.0, 30.0, 40.0, 6.0)]
    assert total(ran) == Kernel("a", "x", 3, 22.0, 33.0, 44.0, 11.0, "n")


def test_sums_put_the_slowest_first():
    ran = [
        Kernel("a", "x", 1, 2.0, 3.0, 4.0, 5.0),
        Kernel("b", "x", 1, 2.0, 3.0, 4.0, 20.0),
        Kernel("a", "y", 2, 20.0, 30.0, 40.0, 6.0),
    ]
    by_kind = summed(ran, lambda kernel: kernel.kind)
    assert list(by_kind) == ["b", "a"]
    assert by_kind["a"][2:7] == (3, 22.0, 33.0, 44.0, 11.0)
