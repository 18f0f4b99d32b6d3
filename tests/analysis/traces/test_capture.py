"""Layers that were not captured are recognized, marked, and left out of every figure."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.hypothesis_validation import validate
from analysis.questions.choice_entropy import choice_entropy
from analysis.questions.co_activation import _co_activation
from analysis.questions.data import RoutingData, TraceSettings, trace_source
from analysis.questions.expert_load import _expert_load
from analysis.questions.predictability import predictability
from analysis.questions.repetition import _repetition
from analysis.replay import report_of
from analysis.report.report import text
from analysis.traces import trace as trace_file
from analysis.traces.capture import captured_layers
from analysis.traces.importing import import_npz
from analysis.traces.replaying import replay
from analysis.traces.trace import TraceError
from tests.analysis.traces.test_importing import stored
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import InputError

EXPERTS, TOP_K = 6, 2
PLACES = [1, 4]  # of the layers that were captured, among five
SETTINGS = TraceSettings(orders=(1, 2), min_count=3, permutations=19, samples=20)


def routing(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Two layers in which 20 different ids decide most of the routing, in 30 documents."""
    rng = np.random.default_rng(seed)
    token = rng.integers(0, 20, tokens)
    gate = rng.dirichlet(np.full(EXPERTS, 0.3), (20, 2))[token] + 0.3 * rng.dirichlet(np.ones(EXPERTS), (tokens, 2))
    experts = np.argsort(-gate, axis=-1)[..., :TOP_K]
    probs = np.take_along_axis(gate, experts, axis=-1)
    return {
        "token": token,
        "experts": experts,
        "probs": probs / probs.sum(axis=-1, keepdims=True),
        "document": np.arange(tokens) * 30 // tokens,
    }


def with_missing(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Five layers: one of zeros, one captured, one of -1, one with a constant choice, one captured."""
    shape = (len(values["token"]), 5, TOP_K)
    experts, probs = np.zeros(shape, np.int64), np.zeros(shape)
    experts[:, PLACES], probs[:, PLACES] = values["experts"], values["probs"]
    experts[:, 2], experts[:, 3], probs[:, 3] = -1, [5, 2], 0.5
    return values | {"experts": experts, "probs": probs}


def imported(folder, values, **fields):
    layers = values["experts"].shape[1]
    return import_npz(stored(folder, values, num_layers=layers, num_experts=EXPERTS, top_k=TOP_K, **fields))


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The trace with two layers, and the one with five of which three were not captured."""
    values = routing(1500)
    folder = tmp_path_factory.mktemp("traces")
    return imported(folder, values), imported(folder, with_missing(values))


def test_they_are_marked_and_named(tmp_path, traces):
    short, long = traces
    assert long.captured.tolist() == [False, True, False, False, True]
    assert long.remarks()[-1] == "Not captured: layers 0, 2, 3 of 5; left out of every mean, table and figure."
    part = long.captured_part()
    np.testing.assert_array_equal(part.experts, short.experts)
    np.testing.assert_array_equal(part.probs, short.probs)
    assert short.captured.all() and short.captured_part() is short
    trace_file.write(tmp_path / "trace.parquet", long)
    assert trace_file.read(tmp_path / "trace.parquet").remarks() == long.remarks()


def test_a_file_of_another_writer_is_looked_at_when_it_is_read(tmp_path, traces):
    _, long = traces
    experts = long.experts.copy()
    experts[:, [0, 2, 3]] = [5, 2]  # nothing is marked
    trace_file.write(tmp_path / "trace.parquet", replace(long, experts=experts, probs=np.full_like(long.probs, 0.5)))
    assert trace_file.read(tmp_path / "trace.parquet").captured.tolist() == long.captured.tolist()


def test_no_figure_knows_of_them(traces):
    """Every figure of the trace with three more layers is that of the trace without them, at its place."""
    data = [RoutingData(trace_source(trace), trace, settings=SETTINGS) for trace in traces]

    def estimates(estimate):
        """Of the longer and of the shorter trace."""
        return (one.on_trace(lambda trace: estimate(trace, SETTINGS)) for one in reversed(data))

    ours, theirs = (found.measures for found in estimates(predictability))
    for name in ("agreement", "recall", "mass"):
        for part in ("value", "low", "high", "null", "null_low", "null_high", "p"):
            np.testing.assert_array_equal(getattr(ours[name], part)[:, PLACES], getattr(theirs[name], part))
        assert np.isnan(np.delete(ours[name].value, PLACES, axis=1)).all()
    ours, theirs = (found.measures["first_choice"].p for found in estimates(_repetition))
    np.testing.assert_array_equal(ours[:, PLACES], theirs)
    ours, theirs = (found.unconditional.value for found in estimates(choice_entropy))
    np.testing.assert_array_equal(ours[:, PLACES], theirs)
    ours, theirs = (found.share.value for found in estimates(_expert_load))
    np.testing.assert_array_equal(ours[:, PLACES], theirs)
    ours, theirs = (found.share for found in estimates(_co_activation))
    np.testing.assert_array_equal(ours[PLACES], theirs)

    ours, theirs = (trace_source(trace).stats for trace in reversed(traces))
    assert not np.delete(ours.count, PLACES, axis=0).any()
    np.testing.assert_array_equal(ours.count[PLACES], theirs.count)
    np.testing.assert_array_equal(ours.entropy.mean[PLACES], theirs.entropy.mean)


def test_reports_and_figures_say_so(traces):
    reports = [validate(RoutingData(trace_source(trace), trace, settings=SETTINGS))[0] for trace in traces]
    said = reports[1]
    about = dict(said.facts)["about the trace"]
    assert "layers 0, 2, 3 of 5" in about and "does not declare what its scores are" in about
    written = text(said)
    assert "Not testable, layers 0, 2, 3: not captured" in written
    outcomes = [{one.name: one.outcome for one in found.sections} for found in reports]
    expected = outcomes[0]["predictability"].replace("2 layers", "5 layers (3 not testable)")
    assert outcomes[1]["predictability"] == expected
    assert outcomes[1]["load"] == outcomes[0]["load"]
    assert outcomes[1]["co_activation"] == outcomes[0]["co_activation"]
    (load,) = next(one for one in said.sections if one.name == "load").tables
    assert [row[0] for row in load.rows] == PLACES
    assert sum(figure.draw() is not None for section in said.sections for figure in section.figures) == 10


def test_a_replay_leaves_them_out(traces):
    by_table, by_cache = (
        LayerPolicy(experts_kept=1, use_answers=False, frequency_threshold=least) for least in (5, 10_000)
    )
    config = VARConfig(entropy_threshold=9.0, confidence_threshold=0.6, context_window_size=2, cache_layers=(0, 4))
    policies = dict(zip(PLACES, (by_table, by_cache), strict=True))
    long = replay(traces[1], replace(config, layers=policies))
    as_short = replace(config, layers=dict(enumerate(policies.values())), cache_layers=(1,))
    short = replay(traces[0], as_short)
    assert 0.1 < long.rates(4)["shares"]["cached"] == short.rates(1)["shares"]["cached"]
    assert [long.rates(place) for place in PLACES] == [short.rates(0), short.rates(1)]
    assert long.rates() == short.rates()
    assert long.rates(0)["experts_per_token"] is None
    assert any("Not captured: layers 0, 2, 3 of 5" in note for note in report_of(long).notes)
    table = report_of(long).sections[0].tables[0]
    names = ["0 (not captured)", "1", "2 (not captured)", "3 (not captured)", "4", "all"]
    assert [row[0] for row in table.rows] == names
    figures = [figure for section in report_of(long).sections for figure in section.figures]
    assert len(figures) == 2 and all(figure.draw() for figure in figures)
    with pytest.raises(InputError, match="layer 7: the trace has only layers 0 to 4"):
        replay(traces[1], replace(config, layers={7: None}))


def test_few_tokens_cannot_tell_a_constant_choice(tmp_path):
    values = routing(99)
    values["experts"][:, 1] = [5, 2]
    assert imported(tmp_path, values).captured.all()
    values = routing(100)
    values["experts"][:, 1] = [5, 2]
    assert imported(tmp_path, values).captured.tolist() == [True, False]
    same = np.tile([5, 2], (1000, 2, 1))
    same[:, 0] = np.arange(1000)[:, None] % 3 + [0, 1]
    assert captured_layers(same, np.arange(1000) % 9, EXPERTS).all()  # nine ids may all go to the same experts
    assert captured_layers(same, np.arange(1000) % 10, EXPERTS).tolist() == [True, False]
    assert captured_layers(np.tile([0, 1], (1000, 2, 1)), np.arange(1000), 2).all()  # there are no others


def test_a_trace_without_a_captured_layer_or_with_a_copied_one_is_refused(tmp_path):
    values = routing(200)
    with pytest.raises(TraceError, match=r"log\.npz: no layer was captured: in each of the 2 layers"):
        imported(tmp_path, values | {"experts": np.zeros((200, 2, TOP_K), int)})
    copied = np.repeat(values["experts"][:, :1], 3, axis=1)
    with pytest.raises(TraceError, match=r"log\.npz: all 3 captured layers have the same experts at every token"):
        imported(tmp_path, values | {"experts": copied, "probs": values["probs"][:, [0, 0, 0]]})
