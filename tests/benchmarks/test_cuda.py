"""What is read from a program that was compiled for an H100; the compiling itself needs jax's CUDA plugin."""

import pytest

from benchmarks.cuda import Check, Program

TEXT = """HloModule jit_step, entry_computation_layout={(bf16[1,8,4096,128])->bf16[1,8,4096,128]}

%fused_dynamic_update_slice (param_0: bf16[1,8,4096,128]) -> bf16[1,8,4096,128] {
  %transpose.1 = bf16[1,8,128,4096]{3,2,1,0} transpose(%param_0), dimensions={0,1,3,2}
}

ENTRY %main.1 (kv_keys_0_.1: bf16[1,8,4096,128]) -> bf16[1,8,4096,128] {
  %kv_keys_0_.1 = bf16[1,8,4096,128]{3,2,1,0} parameter(0)
  %bitcast.1 = bf16[8,4096,128]{2,1,0} bitcast(%kv_keys_0_.1)
  %loop_dynamic_update_slice_fusion = bf16[1,8,4096,128]{3,2,1,0} fusion(%kv_keys_0_.1), kind=kLoop
  %pair = (f32[4]{0}, bf16[1,8,128,4096]{3,2,1,0}) fusion(%bitcast.1), kind=kInput, calls=%fused_transpose
  %get-tuple-element = f32[4]{0} get-tuple-element(%pair), index=0
  %pallas_call.0 = bf16[16,64]{1,0} custom-call(%bitcast.1), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %copy.1 = f32[]{:T(128)} copy(%get-tuple-element)
}
"""


def test_kernels_and_written_arrays_are_those_of_a_call():
    program = Program(held=0, temporaries=0, text=TEXT)
    assert [operation for _, operation in program.entry] == [
        *("parameter", "bitcast", "fusion", "fusion", "get-tuple-element", "custom-call", "copy")
    ]
    assert (program.kernels, program.pallas_calls) == (4, 1)
    assert program.written(8 * 4096 * 128) == 1  # of the two outputs of a fusion the larger; an update in place is none
    assert program.written(8 * 4096 * 128 + 1) == 0 and program.written(1) == 3


@pytest.mark.parametrize(("value", "holds"), [(2.9, True), (3, True), (3.1, False)])
def test_a_bound_may_be_reached(value, holds):
    assert Check("GB of temporaries", value, 3).holds is holds
