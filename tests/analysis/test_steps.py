"""What a step found is read back as it was, and a command that failed later goes on from there."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from analysis.checkpoints import CheckpointMismatchError
from analysis.command import run
from analysis.report.files import write_report
from analysis.report.output import Output
from analysis.report.provenance import plain
from analysis.report.report import Report, ReportFigure, Section
from analysis.steps import finished_steps, restored
from varjax import LayerPolicy, VARConfig
from varjax.errors import InputError


class Pair(NamedTuple):
    layer: int
    value: float


@dataclass(frozen=True)
class Inner:
    values: np.ndarray
    known: bool | None = None


@dataclass(frozen=True)
class Outer:
    config: VARConfig
    pairs: tuple[Pair, ...]
    both: tuple[float, int]
    by_name: dict[str, list[Inner]]
    kind: Literal["high", "low"]
    rest: dict[str, Any] = field(default_factory=dict)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, Inner | Outer):
        return type(a) is type(b) and all(same(one, vars(b)[name]) for name, one in vars(a).items())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(one, b[name]) for name, one in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_what_is_saved_is_read_back_as_it_was():
    inner = Inner(np.array([[1.5, math.nan], [math.inf, 0.1]], np.float32), True)
    value = Outer(
        config=VARConfig(layers={3: LayerPolicy(tolerance=0.3, experts_kept=None), 4: None}),
        pairs=(Pair(0, 0.1), Pair(1, -math.inf)),
        both=(math.nan, 7),
        by_name={"a": [inner, Inner(np.zeros((0, 3), np.int64))], "b": []},
        kind="low",
        rest={"speed": {"low": math.inf, "rows": [1, 2.5, "x", None]}},
    )
    assert same(restored(Outer, json.loads(json.dumps(plain(value, exact=True), allow_nan=False))), value)


def made(section: Section) -> Report:
    return Report("Report", (), (), (section,))


def command(output: Output, work, report, **settings: Any) -> None:
    with finished_steps(output, settings) as steps:
        found = steps.do("measurement", Pair, work)
        write_report(lambda: report(found), output, extra={"found": found})


def fails(*_: Any) -> Any:
    raise ZeroDivisionError("float division by zero")


def drawn_badly(found: Pair) -> Report:
    figure = ReportFigure("figure", "Figure", "", "", draw=fails)
    return made(Section("one", "One", "reported", f"{found.value}", figures=(figure,)))


@pytest.mark.parametrize("report", [fails, drawn_badly], ids=["summary", "figure"])
def test_a_report_that_fails_leaves_the_results_and_measures_nothing_again(tmp_path, report, capsys):
    output = Output.of(tmp_path / "out.json", "out")
    with pytest.raises(ZeroDivisionError) as error:
        command(output, lambda: Pair(2, 0.5), report, seed=1)
    said = "\n".join(error.value.__notes__)
    assert "The results are complete, in" in said and "out.json; only their report was not made" in said
    assert "What is finished (measurement) is kept in" in said
    assert json.loads(output.main(".json").read_text())["found"] == [2, 0.5]
    with pytest.raises(CheckpointMismatchError, match=r"seed = 1 .here 2."):
        command(output, fails, made, seed=2)
    command(output, fails, lambda found: made(Section("one", "One", "reported", f"{found.layer}")), seed=1)
    assert "measurement: read back from" in capsys.readouterr().out
    found = json.loads(output.main(".json").read_text())
    assert found["found"] == [2, 0.5] and found["sections"]["one"]["outcome"] == "2"
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.txt", "out.html"}  # no step is left


def test_without_a_finished_step_nothing_is_left(tmp_path):
    output = Output.of(tmp_path / "out.json", "out")
    with pytest.raises(ZeroDivisionError) as error:
        command(output, fails, made, seed=1)
    assert not hasattr(error.value, "__notes__") and not list(tmp_path.iterdir())
    with finished_steps(output, {}):
        pass


def test_a_step_that_fails_says_what_is_finished(tmp_path):
    def work() -> None:
        with finished_steps(Output.of(tmp_path / "out.json", "out"), {}) as steps:
            steps.do("first", int, lambda: 3)
            raise InputError("the second step has no documents; give some")

    with pytest.raises(SystemExit) as stop:
        run(work)
    first, second = str(stop.value).splitlines()
    assert first == "error: the second step has no documents; give some"
    assert second.startswith("What is finished (first) is kept in")
