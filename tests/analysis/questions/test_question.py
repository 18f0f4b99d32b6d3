"""A question becomes a section in every file of a report; what it cannot answer is said; faults reach the user."""

import json

import numpy as np
import pytest

from analysis import command
from analysis.hypothesis_validation import validate
from analysis.questions.data import RoutingData, TraceSettings, trace_source
from analysis.questions.predictability import predictability
from analysis.questions.question import Finding, NotMeasuredError, Question
from analysis.questions.registry import ROUTING_QUESTIONS
from analysis.report.figures import subplots
from analysis.report.files import write_report
from analysis.report.output import Output
from analysis.report.report import Column, ReportFigure, Section, Table
from tests.synthetic_traces import make_trace
from varjax.errors import InputError, NotTestableError


def rarest(data: RoutingData) -> Finding:
    """A small question: how often does the rarest token id occur?"""
    count = int(data.stats.count[0].min())
    figure = ReportFigure("rarest", "The rarest id", "Look at the dot.", "There is only one.", lambda: subplots()[0])
    table = Table("", (Column("occurrences"),), ((count,),))
    section = RAREST.section("reported", f"{count} times", ["In layer 0."], [table], [figure], f"{count}")
    return Finding((section,), {"rarest_count": count})


RAREST = Question("rarest", "How rare is the rarest id?", rarest)


@pytest.fixture(scope="module")
def data() -> RoutingData:
    trace = make_trace(np.random.default_rng(0).permuted(np.tile(np.arange(4), (200, 2, 1)), axis=-1)[..., :2], 4)
    return RoutingData(trace_source(trace), trace, settings=TraceSettings((1,), permutations=0, samples=10))


def test_a_new_question_takes_one_file_and_one_place_in_a_list(data, tmp_path):
    report, fields = validate(data, (ROUTING_QUESTIONS[0], RAREST))
    assert [one.name for one in report.sections] == ["zipf", "rarest"] and report.sections[1].outcome == "200 times"
    write_report(report, Output.of(tmp_path, "hypotheses"), extra=fields)
    saved = json.loads((tmp_path / "hypotheses.json").read_text())
    assert saved["rarest_count"] == 200 and saved["sections"]["rarest"]["tables"][0]["rows"] == [{"occurrences": 200}]
    assert "How rare is the rarest id?" in (tmp_path / "hypotheses.txt").read_text()
    assert "data:image/png" in (tmp_path / "hypotheses.html").read_text() and (tmp_path / "rarest.pdf").is_file()


def test_names_are_unique():
    assert len({question.name for question in ROUTING_QUESTIONS}) == len(ROUTING_QUESTIONS)


def failing(raised) -> Question[RoutingData]:
    def examine(_: RoutingData) -> Section:
        raise raised("out of luck")

    return Question("luck", "Is there any luck?", examine)


@pytest.mark.parametrize(
    ("raised", "verdict"), [(NotTestableError, "not testable"), (NotMeasuredError, "not measured")]
)
def test_what_cannot_be_answered_becomes_its_reason(data, raised, verdict):
    (section,) = failing(raised).answer(data).sections
    assert (section.name, section.verdict, section.outcome) == ("luck", verdict, "out of luck")


@pytest.mark.parametrize("raised", [ValueError, RuntimeError, InputError])
def test_a_fault_is_not_an_answer(data, raised):
    with pytest.raises(raised, match="out of luck"):
        validate(data, (failing(raised),))


def test_a_fault_is_not_shortened_to_a_message(data):
    with pytest.raises(ValueError, match="out of luck"):  # and not SystemExit
        command.run(lambda: validate(data, (failing(ValueError),)))


def test_settings_that_nothing_can_be_estimated_with_are_refused():
    with pytest.raises(InputError, match="give 0 for no null, or at least"):
        TraceSettings(permutations=3)
    assert TraceSettings(orders=(2, 1, 2)).orders == (1, 2)


def of(experts: np.ndarray, num_experts: int, **fields) -> RoutingData:
    trace = make_trace(experts, num_experts, **fields)
    return RoutingData(trace_source(trace), trace, settings=TraceSettings((1,), permutations=0, samples=10))


def test_with_one_expert_there_is_no_routing():
    report, _ = validate(of(np.zeros((200, 2, 1)), 1, ranked=True))
    said = {one.name: one for one in report.sections if one.name != "zipf"}
    assert {one.verdict for one in said.values()} == {"not testable"}
    assert {one.outcome for one in said.values()} == {
        "every layer has one expert, which every token runs: there is no routing in this model"
    }


def test_where_all_experts_run_there_is_a_first_choice_but_no_selection():
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(3), (400, 2, 1)), axis=-1)
    report, _ = validate(of(experts, 3, ranked=True))
    said = {one.name: one for one in report.sections}
    for name in ("load", "co_activation"):
        assert said[name].outcome == "every token runs all 3 experts of a layer: the router selects none"
    assert said["repetition"].verdict == "reported"
    assert [table.title.split()[0] for table in said["predictability"].tables] == ["coverage", "agreement"]
    with pytest.raises(NotTestableError, match="every token runs all 3 experts"):
        predictability(make_trace(experts, 3, ranked=False), TraceSettings((1,), permutations=0, samples=10))
