"""What the instructions of a compiled program are held to be for."""

import jax
import jax.numpy as jnp
import pytest

from profiling.programs import describe, read
from profiling.scopes import OTHER, Program, component

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (param_0: f32[8], param_1: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %param_1 = f32[8]{0} parameter(1)
  %gather.1 = f32[3,8]{1,0} gather(%param_0, %param_1), metadata={op_name="jit(f)/answers/gather"}
  ROOT %add.1 = f32[8]{0} add(%param_0, %param_1), metadata={op_name="jit(f)/norms/add"}
}

%body (param_2: (f32[8])) -> (f32[8]) {
  %param_2 = (f32[8]{0}) parameter(0)
  %get-tuple-element.1 = f32[8]{0} get-tuple-element(%param_2), index=0
  %copy.1 = f32[8]{0} copy(%get-tuple-element.1)
  ROOT %tuple.1 = (f32[8]{0}) tuple(%copy.1)
}

ENTRY %main (Arg_0: f32[8], Arg_1: f32[8]) -> f32[8] {
  %Arg_0 = f32[8]{0} parameter(0)
  %Arg_1 = f32[8]{0} parameter(1)
  %dot.1 = f32[8]{0} dot(%Arg_0, %Arg_1)
  %fusion.1 = f32[8]{0} fusion(%dot.1, %Arg_0), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/norms/add"}
  %copy.2 = f32[8]{0} copy(%fusion.1), metadata={op_name="jit(f)/jit(g)"}
  %tuple.2 = (f32[8]{0}) tuple(%copy.2)
  %while.1 = (f32[8]{0}) while(%tuple.2), condition=%c, body=%body, metadata={op_name="jit(f)/experts/while"}
  %sine.1 = f32[8]{0} sine(%fusion.1), metadata={op_name="jit(f)/sin"}
  ROOT %get-tuple-element.2 = f32[8]{0} get-tuple-element(%while.1), index=0
}
"""


def shares(module, name):
    return dict(module.instructions[name].shares)


def test_a_program_is_read_from_its_text():
    module = read(TEXT)
    assert module.name == "jit_f"
    assert shares(module, "fusion.1") == {"answers": 0.75, "norms": 0.25}  # by elements
    assert shares(module, "copy.2") == {"experts": 1.0}  # made for the loop
    assert shares(module, "copy.1") == {"experts": 1.0}  # inside it
    assert shares(module, "sine.1") == {OTHER: 1.0}  # says what it is, and that has no component
    assert shares(module, "dot.1") == {"norms": 1.0}  # nothing known but who uses it
    assert [name for name, one in module.instructions.items() if one.control] == ["while.1"]


def test_an_argument_of_one_component_tells_what_a_rewritten_product_is():
    assert shares(read(TEXT, [OTHER, "projections"]), "dot.1") == {"projections": 1.0}
    assert shares(read(TEXT, [OTHER, OTHER]), "dot.1") == {"norms": 1.0}


def test_arguments_that_were_left_out_are_an_error():
    f = lambda x, unused: x + 1  # noqa: E731
    with pytest.raises(ValueError, match="1 arguments of 2: those not used were left out"):
        describe(jax.jit(f).trace(1.0, 2.0))
    assert describe(jax.jit(f, keep_unused=True).trace(1.0, 2.0)).name.startswith("jit_")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("jit(f)/attention/scores/dot_general", "scores"),
        ("jit(f)/experts/while/body/dispatch/gather", "dispatch"),
        ("jit(f)/transpose(jvp(gate))/mul", "gate"),
        ("jit(plan)/jit(commit)/add", OTHER),
        ("experts_of_mine/add", OTHER),
    ],
)
def test_the_innermost_scope_that_is_a_component_counts(scope, expected):
    assert component(scope) == expected


def test_the_owner_of_an_argument_is_who_alone_reads_it():
    def f(x, weights, shared, unused):
        with jax.named_scope("gate"):
            x = jax.nn.silu(x @ weights) + shared
        with jax.named_scope("head"):
            return x * shared

    program = Program.of(jax.make_jaxpr(f)(jnp.ones((4, 4)), jnp.ones((4, 4)), 1.0, 1.0))
    assert program.owners() == ["gate", "gate", OTHER, OTHER]
    assert {one.component for one in program.equations} == {"gate", "head"}  # the call of silu is opened up
