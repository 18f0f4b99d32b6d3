"""What is read from a program that was compiled for an H100; the compiling itself needs jax's CUDA plugin."""

import pytest

from benchmarks.compiled import Launch, Program, launches_of
from benchmarks.cuda import Check, cases
from profiling.published import PUBLISHED

TEXT = """HloModule jit_step, entry_computation_layout={(bf16[1,8,4096,128])->bf16[1,8,4096,128]}

%fused_dynamic_update_slice (param_0: bf16[1,8,4096,128]) -> bf16[1,8,4096,128] {
  %transpose.1 = bf16[1,8,128,4096]{3,2,1,0} transpose(%param_0), dimensions={0,1,3,2}
}

ENTRY %main.1 (kv_keys_0_.1: bf16[1,8,4096,128]) -> bf16[1,8,4096,128] {
  %kv_keys_0_.1 = bf16[1,8,4096,128]{3,2,1,0} parameter(0)
  %bitcast.1 = bf16[8,4096,128]{2,1,0} bitcast(%kv_keys_0_.1)
  %loop_dynamic_update_slice_fusion = bf16[1,8,4096,128]{3,2,1,0} fusion(%bitcast.1), kind=kLoop
  %pair = (f32[4]{0}, bf16[1,8,128,4096]{3,2,1,0}) fusion(%bitcast.1), kind=kInput, calls=%fused_transpose
  %get-tuple-element = f32[4]{0} get-tuple-element(%pair), index=0
  %pallas_call.0 = bf16[16,64]{1,0} custom-call(%bitcast.1), custom_call_target="__gpu$xla.gpu.triton"
  %dot.1 = bf16[16,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  %reduce.1 = f32[] reduce(%dot.1, %zero), dimensions={0,1}
  ROOT %copy.1 = f32[]{:T(128)} copy(%get-tuple-element)
}
"""
PLAN = """001: kCopy         [source        | next=006 (5)] kCopy
002: kCustomKernel [source | next=003 (1)] loop_pad_fusion grid: [64, 1, 1] threads: [9, 1, 1] shared_memory: 8 bytes
003: kWhile        [prev=002 (1)  | next=009 (5)] while
    004: kCustomKernel [prev=003 (2)  | next=009 (4)] down grid: [1, 1, 1] threads: [64, 1, 1] shared_memory: 0 bytes
015: kCustomKernel [prev=014 (1) | sink ] attend grid: [8, 33, 1] threads: [9, 1, 1] shared_memory: 71680 bytes
"""


def test_launches_are_those_of_one_pass_through_a_program():
    assert launches_of(PLAN) == [
        Launch("kCopy", (1, 1, 1), 0),
        Launch("loop_pad_fusion", (64, 1, 1), 8),
        Launch("while", (1, 1, 1), 0),
        Launch("attend", (8, 33, 1), 71680),
    ]


def test_arrays_that_are_written_are_told_from_updates_in_place():
    program = Program(held=0, temporaries=0, launches=launches_of(PLAN), spills={}, text=TEXT)
    assert [launch.name for launch in program.pallas] == ["attend"]
    assert program.written(8 * 4096 * 128) == 1  # of the two outputs of a fusion the larger; an update in place is none
    assert program.written(8 * 4096 * 128 + 1) == 0 and program.written(1) == 5
    assert (program.sums("dot"), program.sums("reduce")) == (["bf16"], ["f32"])


@pytest.mark.parametrize(("value", "holds"), [(2.9, True), (3, True), (3.1, False)])
def test_a_bound_may_be_reached(value, holds):
    assert Check("GB of temporaries", value, 3).holds is holds
    assert Check("programs", -value, -3, at_least=True).holds is holds
    assert ("FAILS" in str(Check("GB of temporaries", value, 3))) is not holds


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_program_has_a_name_of_its_own(name):
    titles = [case.title for case in cases(name)]
    assert len(titles) == len(set(titles)) == 7
