"""Traces of known content are read to known times; of real ones only gross orders are asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.profiler import ProfileData

from profiling.calls import jitted, prepare
from profiling.costs import COMPONENTS
from profiling.programs import Instruction, Module, describe
from profiling.scopes import OTHER
from profiling.traces import capture, component_times

MODULE = Module(
    "jit_f",
    {
        "while.1": Instruction((("experts", 1.0),), control=True),
        "dot.1": Instruction((("experts", 1.0),), control=False),
        "add.1": Instruction((("norms", 1.0),), control=False),
        "fusion.1": Instruction((("norms", 0.25), ("answers", 0.75)), control=False),
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
    times = component_times(path, [MODULE])
    # The loop's own time, 3 ms, counts where nothing else runs.
    assert milliseconds(times.seconds) == {"experts": 5.0, "norms": 5.0, OTHER: 2.0}
    np.testing.assert_allclose(times.idle, [0.002])
    assert times.busy["experts"] == pytest.approx(0.002)
    assert times.recorded == dict.fromkeys((*COMPONENTS, OTHER), 0.0) | {"experts": 2.0, OTHER: 2.0}


def test_operations_at_the_same_time_share_the_wall(tmp_path):
    path = written(tmp_path, [(0, 10)], [("while.1", 0, 10), ("dot.1", 0, 4)], [("add.1", 2, 8)])
    times = component_times(path, [MODULE])
    # 0-2 dot; 2-4 both; 4-8 add, for a loop that waits does no work; 8-10 the loop.
    assert milliseconds(times.seconds) == {"experts": 5.0, "norms": 5.0}
    assert (times.busy["experts"], times.busy["norms"]) == (pytest.approx(0.004), pytest.approx(0.006))


def test_calls_are_kept_apart_and_what_is_between_them_is_left_out(tmp_path):
    path = written(tmp_path, [(0, 4), (6, 9)], [("add.1", 1, 3), ("dot.1", 4, 6), ("fusion.1", 7, 9)])
    times = component_times(path, [MODULE])
    np.testing.assert_allclose(times.wall, [0.004, 0.003])
    np.testing.assert_allclose(times.seconds["norms"], [0.002, 0.0005])
    np.testing.assert_allclose(times.seconds["answers"], [0, 0.0015])
    np.testing.assert_allclose(times.seconds["experts"], 0)
    np.testing.assert_allclose(sum(times.seconds.values()), times.wall)


def test_operations_that_no_program_knows_are_other(tmp_path):
    path = written(tmp_path, [(0, 4)], [("add.1", 0, 1), ("sort.9", 1, 3)])
    times = component_times(path, [MODULE])
    assert milliseconds(times.seconds) == {"norms": 1.0, OTHER: 3.0}
    np.testing.assert_allclose(times.idle, [0.001])


def test_a_trace_of_other_programs_is_an_error(tmp_path):
    path = written(tmp_path, [(0, 4)], [("sort.9", 1, 3)])
    with pytest.raises(ValueError, match="1 calls and no operation of jit_f"):
        component_times(path, [MODULE])
    with pytest.raises(ValueError, match="trace them singly"):
        component_times(path, [MODULE, MODULE])


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
    path = capture([lambda: f(*arguments)] * 3, tmp_path, "products")
    times = component_times(path, [describe(f.trace(*arguments))])
    assert times.wall.shape == (3,)
    np.testing.assert_allclose(sum(times.seconds.values()), times.wall)
    assert times.seconds["experts"].sum() > 20 * times.seconds["gate"].sum() > 0
    assert times.seconds[OTHER].sum() > times.idle.sum() >= 0
    assert times.recorded["experts"] > 10 > times.recorded["gate"]


def test_the_folder_is_one_that_tensorboard_reads(tmp_path):
    f = jax.jit(lambda x: x + 1)
    for _ in range(2):  # the second takes the place of the first
        path = capture([lambda: f(1.0)], tmp_path, "run")
    assert path.parent == tmp_path / "plugins" / "profile" / "run"
    assert list(path.parent.glob("*.xplane.pb")) == [path]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_component_of_a_var_step_is_found(small_var_model, documents, tmp_path, phase):
    ids = np.stack([one.ids[:16] for one in documents if len(one.ids) >= 16][:2])
    calls = prepare(small_var_model, ids, phase, max_calls=2)
    step = jitted(calls.step)
    module = describe(calls.traced())
    for call in calls.each(step):
        call()
    times = component_times(capture(calls.each(step), tmp_path, phase), [module])
    assert len(times.wall) == len(calls.inputs)
    missing = [name for name in COMPONENTS if not times.seconds[name].sum() > 0]
    assert not missing
    named = sum(float(times.seconds[name].sum()) for name in COMPONENTS)
    unnamed = float(times.seconds[OTHER].sum() - times.idle.sum())
    assert unnamed < named / 2
