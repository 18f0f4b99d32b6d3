"""Traces with known content give known times; of real ones only the order of magnitude is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.profiler import ProfileData

from models import load_model
from profiling.calls import prepare
from profiling.components import (
    OTHER,
    _capture,
    _component,
    _component_times,
    _describe,
    _Instruction,
    _Module,
    _owners,
    _parsed,
)
from profiling.costs import COMPONENTS
from varjax import VARModel

MODULE = _Module(
    "jit_f",
    {
        "while.1": _Instruction((("experts", 1.0),), control=True),
        "dot.1": _Instruction((("experts", 1.0),), control=False),
        "add.1": _Instruction((("norms", 1.0),), control=False),
        "fusion.1": _Instruction((("norms", 0.25), ("answers", 0.75)), control=False),
    },
)


def written(path, calls, *threads):
    """A trace file: calls (start, end), and per thread operations (name, start, end), in milliseconds."""
    names = [*sorted({name for thread in threads for name, _, _ in thread}), "call"]
    lines = [[("call", *call) for call in calls], *threads]

    def event(name, start, end):
        stats = f'stats {{ metadata_id: 1 str_value: "{name}" }} stats {{ metadata_id: 2 str_value: "jit_f" }}'
        span = f"offset_ps: {round(start * 1e9)} duration_ps: {round((end - start) * 1e9)}"
        return f"events {{ metadata_id: {names.index(name) + 1} {span} {stats if name != 'call' else ''} }}"

    text = 'planes { name: "/host:CPU" '
    text += " ".join(f'lines {{ name: "{index}" {" ".join(event(*one) for one in line)} }}'
                     for index, line in enumerate(lines))  # fmt: skip
    for index, name in enumerate(names, 1):
        text += f' event_metadata {{ key: {index} value {{ id: {index} name: "{name}" }} }}'
    for index, name in enumerate(("hlo_op", "hlo_module"), 1):
        text += f' stat_metadata {{ key: {index} value {{ id: {index} name: "{name}" }} }}'
    file = path / "known.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text + " }"))
    return file


def milliseconds(seconds):
    return {name: round(1e3 * float(value.sum()), 6) for name, value in seconds.items() if value.sum()}


def test_a_loop_is_not_counted_twice(tmp_path):
    path = written(tmp_path, [(0, 12)], [("while.1", 1, 9), ("dot.1", 2, 4), ("add.1", 5, 8), ("add.1", 9, 11)])
    times = _component_times(path, MODULE)
    # The loop's own time, 3 ms, counts where nothing else runs.
    assert milliseconds(times.seconds) == {"experts": 5.0, "norms": 5.0, OTHER: 2.0}
    np.testing.assert_allclose(times.idle, [0.002])
    assert times.recorded == dict.fromkeys((*COMPONENTS, OTHER), 0.0) | {"experts": 2.0, OTHER: 2.0}


def test_operations_at_the_same_time_share_the_wall(tmp_path):
    path = written(tmp_path, [(0, 10)], [("while.1", 0, 10), ("dot.1", 0, 4)], [("add.1", 2, 8)])
    times = _component_times(path, MODULE)
    # 0-2 dot; 2-4 both; 4-8 add, for a loop that waits does no work; 8-10 the loop.
    assert milliseconds(times.seconds) == {"experts": 5.0, "norms": 5.0}


def test_calls_are_kept_apart_and_what_is_between_them_is_left_out(tmp_path):
    path = written(tmp_path, [(0, 4), (6, 9)], [("add.1", 1, 3), ("dot.1", 4, 6), ("fusion.1", 7, 9)])
    times = _component_times(path, MODULE)
    np.testing.assert_allclose(times.wall, [0.004, 0.003])
    np.testing.assert_allclose(times.seconds["norms"], [0.002, 0.0005])
    np.testing.assert_allclose(times.seconds["answers"], [0, 0.0015])
    np.testing.assert_allclose(times.seconds["experts"], 0)
    np.testing.assert_allclose(sum(times.seconds.values()), times.wall)


def test_operations_that_no_program_knows_are_other(tmp_path):
    path = written(tmp_path, [(0, 4)], [("add.1", 0, 1), ("sort.9", 1, 3)])
    times = _component_times(path, MODULE)
    assert milliseconds(times.seconds) == {"norms": 1.0, OTHER: 3.0}
    np.testing.assert_allclose(times.idle, [0.001])


def test_a_trace_of_other_programs_is_an_error(tmp_path):
    path = written(tmp_path, [(0, 4)], [("sort.9", 1, 3)])
    with pytest.raises(ValueError, match="1 calls and no operation of jit_f"):
        _component_times(path, MODULE)


def test_the_larger_product_takes_the_time_in_a_loop_of_branches_too(tmp_path):
    @jax.jit
    def f(x, small, choice):
        with jax.named_scope("gate"):
            small = small @ small
        with jax.named_scope("experts"):
            branches = [lambda x: jnp.tanh(x @ x), lambda x: jnp.sin(x @ x)]
            x = lax.fori_loop(0, choice + 8, lambda i, x: lax.switch(i % 2, branches, x), x)
        return x, small @ small  # the second product has no scope

    arguments = jnp.ones((512, 512)) / 512, jnp.eye(8), jnp.int32(2)
    jax.block_until_ready(f(*arguments))
    path = _capture([lambda: f(*arguments)] * 3, tmp_path, "products")
    times = _component_times(path, _describe(f.trace(*arguments)))
    assert times.wall.shape == (3,)
    np.testing.assert_allclose(sum(times.seconds.values()), times.wall)
    assert times.seconds["experts"].sum() > 20 * times.seconds["gate"].sum() > 0
    assert times.seconds[OTHER].sum() > times.idle.sum() >= 0
    assert times.recorded["experts"] > 10 > times.recorded["gate"]


def test_the_folder_is_one_that_tensorboard_reads(tmp_path):
    f = jax.jit(lambda x: x + 1)
    for _ in range(2):  # the second takes the place of the first
        path = _capture([lambda: f(1.0)], tmp_path, "run")
    assert path.parent == tmp_path / "plugins" / "profile" / "run"
    assert list(path.parent.glob("*.xplane.pb")) == [path]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_component_of_a_var_step_is_found(small_var_model, model_directory, documents, tmp_path, phase):
    ids = next(one.ids[None, :16] for one in documents if len(one.ids) >= 16)  # one row: products are rewritten
    dispatching = load_model(model_directory, implementation="blocks")
    var_model = VARModel(dispatching, small_var_model.config, small_var_model.table)
    calls = prepare(var_model, ids, phase, max_calls=2)
    module = _describe(calls.traced())
    for call in calls.each():
        call()
    times = _component_times(_capture(calls.each(), tmp_path, phase), module)
    assert len(times.wall) == len(calls.inputs)
    missing = [name for name in COMPONENTS if not times.seconds[name].sum() > 0]
    assert missing == ([] if phase == "prefill" else ["dispatch"])  # one token's assignments need no order
    named = sum(float(times.seconds[name].sum()) for name in COMPONENTS)
    unnamed = float(times.seconds[OTHER].sum() - times.idle.sum())
    assert unnamed < named / 2


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
    module = _parsed(TEXT)
    assert module.name == "jit_f"
    assert shares(module, "fusion.1") == {"answers": 0.75, "norms": 0.25}  # by elements
    assert shares(module, "copy.2") == {"experts": 1.0}  # made for the loop
    assert shares(module, "copy.1") == {"experts": 1.0}  # inside it
    assert shares(module, "sine.1") == {OTHER: 1.0}  # says what it is, and that has no component
    assert shares(module, "dot.1") == {"norms": 1.0}  # nothing known but who uses it
    assert [name for name, one in module.instructions.items() if one.control] == ["while.1"]


def test_an_argument_of_one_component_tells_what_a_rewritten_product_is():
    assert shares(_parsed(TEXT, [OTHER, "projections"]), "dot.1") == {"projections": 1.0}
    assert shares(_parsed(TEXT, [OTHER, OTHER]), "dot.1") == {"norms": 1.0}


def test_arguments_that_were_left_out_are_an_error():
    f = lambda x, unused: x + 1  # noqa: E731
    with pytest.raises(ValueError, match="1 arguments of 2: unused ones were left out"):
        _describe(jax.jit(f).trace(1.0, 2.0))
    assert _describe(jax.jit(f, keep_unused=True).trace(1.0, 2.0)).name.startswith("jit_")


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
    assert _component(scope) == expected


def test_the_owner_of_an_argument_is_who_alone_reads_it():
    def f(x, weights, shared, unused):
        with jax.named_scope("gate"):
            x = jax.nn.silu(x @ weights) + shared
        with jax.named_scope("head"):
            return x * shared

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 4)), jnp.ones((4, 4)), 1.0, 1.0)
    assert _owners(jaxpr) == ["gate", "gate", OTHER, OTHER]  # also inside the call of silu
