"""The validation as a command and as a library: own files, files of others, traces, and what is wrong with them."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import hypothesis_validation
from analysis.hypothesis_validation import main, open_source, validate
from analysis.questions.data import RoutingData, Source, TraceSettings, trace_source
from analysis.questions.registry import ROUTING_QUESTIONS
from analysis.report import files
from analysis.report.report import Report, text
from analysis.traces import trace
from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import Trace
from varjax import statsfile

OPTIONS = ("--permutations", "19", "--samples", "20", "--min_count", "3", "--orders", "1", "2")
SETTINGS = TraceSettings(orders=(1, 2), min_count=3, permutations=19, samples=20)


def small_trace(tokens=1200, layers=2, probs=True, seed=0) -> Trace:
    """30 documents over 40 ids; in layer 0 the id names its expert nine times of ten, elsewhere nothing does."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.08, tokens) - 1, 39)
    rest = np.argsort(rng.random((tokens, layers, 4)), axis=-1)
    own = np.where(rng.random(tokens) < 0.9, ids % 4, rest[:, 0, 0])
    rest[:, 0] = np.where(rest[:, 0] == own[:, None], rest[:, 0, :1], rest[:, 0])
    rest[:, 0, 0] = own
    first = rng.uniform(0.5, 1, (tokens, layers))
    return Trace(
        token_id=ids.astype(np.int32),
        document=np.repeat(np.arange(30), tokens // 30).astype(np.int32),
        position=np.tile(np.arange(tokens // 30), 30).astype(np.int32),
        experts=rest[..., :2].astype(np.int16),
        probs=np.stack([first, 1 - first], axis=-1).astype(np.float32) if probs else None,
        document_ids=tuple(f"document {i}" for i in range(30)),
        groups=("g",) * 30,
        num_experts=4,
        probs_over="chosen" if probs else None,
        token_strings={0: " the\n", 1: "<b>"},
        origin={"model": "tiny"},
    )


def report_on(source: Source, *names: str, trace: Trace | None = None, settings: TraceSettings = SETTINGS) -> Report:
    """The report on a source and on its trace or another one, with all questions or the named ones."""
    questions = [one for one in ROUTING_QUESTIONS if one.name in names or not names]
    return validate(RoutingData(source, trace or source.trace, settings=settings), questions)[0]


def rows(said: Report, name: str, table: int = 0) -> list[dict]:
    """The rows of a section's table, by the names of its columns."""
    one = next(section for section in said.sections if section.name == name).tables[table]
    return [dict(zip([column.name for column in one.columns], row, strict=True)) for row in one.rows]


def verdicts(said: Report) -> dict[str, str]:
    return {section.name: section.verdict for section in said.sections}


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "some_trace.parquet"
    trace.write(path, small_trace())
    return path


@pytest.fixture
def own_file(tmp_path) -> Path:
    """Statistics of the small trace in the format of this project."""
    source = trace_source(small_trace())
    about = {name: source.meta[name] for name in ("model", "entropy_from", "top_k")}
    statsfile.write(tmp_path / "in" / "routing_stats.parquet", source.stats, about, source.strings)
    return tmp_path / "in" / "routing_stats.parquet"


@pytest.fixture
def others_file(tmp_path) -> Path:
    """The single-layer layout: no layer, no experts but the commonest; two ids with NaN, one of them frequent."""
    rng = np.random.default_rng(1)
    frequency = np.sort(rng.geometric(0.01, 60))[::-1] + 1
    entropy = np.clip(1.4 - 0.15 * np.log(frequency) + rng.normal(0, 0.02, 60), 0, None)
    entropy[[0, 5]] = np.nan
    table = {
        "token_id": np.arange(100, 160),
        "token_str": [f"t{i}" for i in range(60)],
        "frequency": frequency,
        "mean_entropy": entropy,
        "std_entropy": np.full(60, 0.1),
        "mean_confidence": np.full(60, 0.5),
        "std_confidence": np.full(60, 0.1),
        "routing_consistency": np.where(np.isnan(entropy), np.nan, 0.7),
        "top_expert": rng.integers(0, 8, 60),
        "min_entropy": np.zeros(60),
        "max_entropy": np.full(60, 2.0),
    }
    pq.write_table(pa.table(table), tmp_path / "single_layer.parquet")
    return tmp_path / "single_layer.parquet"


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes most of the time."""
    monkeypatch.setattr(files, "save", lambda figure, folder, name: (folder / f"{name}.png").write_bytes(b""))


def test_the_command_writes_everything_and_prints_the_overview(trace_file, tmp_path, capsys):
    main(["--input", str(trace_file), "--output", str(tmp_path), *OPTIONS])
    figures = {"frequency_entropy", "entropy_distribution", "routing_consistency", "token_experts"}
    figures |= {"fast_path_coverage", "predictability", "choice_entropy", "repetition", "expert_load", "co_activation"}
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == expected | {f"hypotheses.{kind}" for kind in ("txt", "json", "html")} | {"index.html"}

    said = (tmp_path / "hypotheses.txt").read_text()
    printed = capsys.readouterr().out
    assert str(tmp_path / "hypotheses.txt") in printed and "Per layer" not in printed and "Per layer" in said
    assert "1,200 tokens, 30 documents" in printed and len(printed.splitlines()) < 25
    assert all(title in printed for title in ("Frequency follows Zipf's law", "Experts are chosen together"))
    assert (
        "of 2 layers" in said
        and "Holm" in said
        and "ln 2" in said
        and "experts' probabilities only" in " ".join(said.split())
    )
    saved = json.loads((tmp_path / "hypotheses.json").read_text())
    assert saved["provenance"]["files"]["input"]["path"] == str(trace_file)
    assert len(saved["provenance"]["files"]["input"]["sha256"]) == 64
    assert saved["provenance"]["settings"]["orders"] == [1, 2]
    tables = saved["sections"]["predictability"]["tables"]
    rows = next(table["rows"] for table in tables if table["title"].startswith("agreement ["))
    assert [row["verdict"] for row in rows] == ["PASS", "FAIL"]  # only layer 0 follows the ids
    assert saved["sections"]["predictability"]["verdict"] == "FAIL"
    assert np.shape(saved["expert_load"]["value"]) == (4, 2)
    page = (tmp_path / "hypotheses.html").read_text()
    assert page.count("<img") == len(figures) and "http" not in page


def test_statistics_alone_need_a_trace_for_the_rest(others_file, tmp_path, no_figures):
    main(["--input", str(others_file), "--output", str(tmp_path / "out")])
    saved = json.loads((tmp_path / "out" / "hypotheses.json").read_text())["sections"]
    for name in ("predictability", "choice_entropy", "repetition", "load", "co_activation"):
        assert saved[name]["verdict"] == "not measured" and "needs a trace" in saved[name]["outcome"]
    assert saved["paired"]["verdict"] == "not measured"
    assert saved["consistency"]["verdict"] == "reported"


def test_a_trace_beside_the_statistics_is_used(own_file, trace_file, tmp_path, no_figures):
    (own_file.parent / hypothesis_validation.TRACE_FILE).write_bytes(trace_file.read_bytes())
    main(["--input", str(own_file.parent), "--output", str(tmp_path / "out"), *OPTIONS])  # the folder will do
    saved = json.loads((tmp_path / "out" / "hypotheses.json").read_text())
    assert saved["sections"]["predictability"]["verdict"] == "FAIL"
    assert set(saved["provenance"]["files"]) == {"input", "trace"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_experts": 5}, "experts: 5, the statistics have 4"),
        ({"layers": 3}, "layers: 3, the statistics have 2"),
        ({"origin": {"revision": "b"}}, "revision: b, the statistics are of the model with fingerprint a"),
    ],
)
def test_a_trace_of_another_model_is_left_out_or_refused(change, why, tmp_path, capsys, no_figures):
    source = trace_source(small_trace())
    path = tmp_path / "routing_stats.parquet"
    statsfile.write(path, source.stats, {"model": "tiny", "fingerprint": "a"}, source.strings)
    other = replace(small_trace(layers=change.pop("layers", 2)), **change)
    trace.write(tmp_path / "strange.parquet", other)
    with pytest.raises(SystemExit) as stop:
        main(["--input", str(path), "--trace", str(tmp_path / "strange.parquet"), "--output", str(tmp_path / "out")])
    assert why in str(stop.value) and "strange.parquet: not a trace of what" in str(stop.value)
    (tmp_path / "strange.parquet").rename(tmp_path / hypothesis_validation.TRACE_FILE)
    main(["--input", str(path), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "is left out" in printed and why in printed
    saved = json.loads((tmp_path / "out" / "hypotheses.json").read_text())
    assert saved["sections"]["load"]["verdict"] == "not measured" and set(saved["provenance"]["files"]) == {"input"}


def test_the_header_names_the_trace_and_sections_say_what_ids_cover():
    one = small_trace()
    fewer = replace(one.of(np.arange(30) < 20), origin={"model": "tiny", "phase": "decode"})
    stats = trace_statistics(one, min_count=40)
    said = report_on(Source(stats, {}), trace=fewer)
    assert dict(said.facts)["trace"] == "model tiny, phase decode, 800 tokens, 20 documents"
    share = stats.count[0].sum() / 1200
    assert share < 0.9 and f"they cover {share:.1%} of all occurrences" in " ".join(text(said).split())


def test_statistics_and_a_trace_differ_in_their_intervals_alone(own_file):
    names = ("zipf", "frequency_entropy", "entropy", "consistency", "coverage")
    mine, theirs = (report_on(source, *names) for source in (open_source(own_file), trace_source(small_trace())))
    for name in names:
        one, other = (next(s for s in said.sections if s.name == name) for said in (mine, theirs))
        assert one.verdict == other.verdict
        for ours, drawn in zip(rows(mine, name), rows(theirs, name), strict=True):
            ends = {key for key in ours if key.endswith(("low", "high")) and not key.startswith("null")}
            np.testing.assert_equal(
                [ours[key] for key in ours.keys() - ends], [drawn[key] for key in ours.keys() - ends]
            )
            assert any(ours[key] != drawn[key] for key in ends)
    assert np.isnan([row["low"] for row in rows(theirs, "consistency") if "decile" in row["group"]]).all()  # 4 ids each
    assert "too narrow rather" in " ".join(mine.notes)
    assert "20 bootstrap draws of the 30 documents" in " ".join(theirs.notes)


def test_one_document_has_no_intervals():
    one = small_trace()
    said = report_on(trace_source(replace(one.of(np.arange(30) == 3), document_ids=one.document_ids)))
    assert np.isnan([row["low"] for row in rows(said, "consistency")]).all()
    assert np.isfinite([row["consistency"] for row in rows(said, "consistency")]).all()
    assert "there is only one" in text(said)
    assert all(figure.draw() for section in said.sections for figure in section.figures)


def test_a_file_of_others_with_nan(others_file):
    source = open_source(others_file)
    assert source.meta["rows_with_nan"] == 2
    report = report_on(source)
    said = " ".join(text(report).split())
    assert "rows with NaN" in said and "'t0' (id 100), 't5' (id 105)" in said
    assert "0 of 1 layers" in said or "1 of 1 layers" in said
    assert "estimated" in said and "not in the file" in said
    assert verdicts(report)["frequency_entropy"] == "PASS"  # planted
    assert rows(report, "frequency_entropy")[0]["ids"] == rows(report, "consistency")[0]["ids"] == 58


def test_two_runs(own_file, tmp_path, no_figures):
    source = open_source(own_file)
    entropy = source.stats.entropy
    moved = replace(
        source.stats, entropy=replace(entropy, mean=entropy.mean + np.linspace(0.05, 0.1, 40)[: len(source.stats.keys)])
    )
    second = tmp_path / "second.parquet"
    statsfile.write(second, moved, {})
    main(["--input", str(own_file), "--output", str(tmp_path / "out"), "--compare", str(second)])
    paired = json.loads((tmp_path / "out" / "hypotheses.json").read_text())["sections"]["paired"]
    assert paired["verdict"] == "reported"
    assert "entropy 2 of 2, confidence 0 of 2;" in paired["outcome"]
    assert str(second) in paired["words"][0]


def test_a_trace_without_probabilities_is_not_testable_where_it_needs_them():
    source = trace_source(small_trace(probs=False))
    said = report_on(source)
    found = verdicts(said)
    assert [found[name] for name in ("frequency_entropy", "entropy", "coverage")] == ["not testable"] * 3
    assert found["consistency"] == found["repetition"] == "reported" and found["predictability"] == "FAIL"
    assert "0 of 40 token ids with a known entropy" in text(said)


def test_entropy_of_a_trace_needs_a_caution_unless_it_is_the_gates_own():
    one = small_trace()
    all_experts = replace(one, probs=one.probs / 2, probs_over="all")
    own = replace(all_experts, entropy=np.full((1200, 2), 1.3, np.float32) + one.probs[..., 0] / 100)
    cautions = [
        [word for section in report_on(trace_source(trace), "entropy").sections for word in section.words]
        for trace in (one, all_experts, own)
    ]
    assert ["here is a lower bound" in " ".join(words) for words in cautions] == [True, True, False]
    assert ["ln 4 = 1.386" in " ".join(words) for words in cautions] == [False, True, True]


def test_only_what_the_known_entropy_can_decide_is_judged():
    """All experts' entropy is little in layer 0 and much in layer 1; of the chosen two it is little in both."""
    one = replace(small_trace(), entropy=None)
    first = np.where(np.arange(2) == 0, 0.98, 0.3)[None] + np.zeros((1200, 1))
    spread = replace(one, probs=np.stack([first, (1 - first) / 3], axis=-1).astype(np.float32), probs_over="all")
    chosen = replace(spread, probs=spread.probs / spread.probs.sum(axis=-1, keepdims=True), probs_over="chosen")
    own = replace(spread, entropy=np.tile(np.array([0.1, 1.3], np.float32), (1200, 1)))
    names = ("frequency_entropy", "entropy", "coverage")
    seen = []
    for case in (chosen, spread, own, replace(own, probs=None, probs_over=None)):
        sections = {one.name: one for one in report_on(trace_source(case), *names).sections}
        seen.append([[row[-1] for row in sections[name].tables[0].rows] for name in names])
        assert all(not np.isnan(row[1]) for row in sections["entropy"].tables[0].rows)  # numbers are kept
    no, good, bad = "not testable", "PASS", "FAIL"
    assert seen[0] == [[no, no], [no, bad], [no, bad]]
    assert seen[1] == [[no, no], [no, bad], [no, bad]]
    assert seen[2][1:] == [[good, bad], [good, bad]] == seen[3][1:]
    sections = {one.name: one for one in report_on(trace_source(spread), *names).sections}
    assert [sections[name].verdict for name in names] == [no, bad, bad]
    assert sections["coverage"].outcome.endswith("(1 not testable); gate entropy is known as a lower bound only")
    sections = {one.name: one for one in report_on(trace_source(chosen), *names).sections}
    assert "of which the 2 chosen experts' is a lower bound" in sections["entropy"].outcome


def test_what_a_trace_cannot_answer_is_said():
    one = small_trace()
    alone = replace(one.of(np.arange(30) == 0), document_ids=one.document_ids)
    source = trace_source(alone)
    (section,) = report_on(source, "predictability").sections
    assert section.verdict == "not testable" and "one side of the split" in section.outcome


def test_without_permutations_nothing_is_above_a_band():
    source = trace_source(small_trace())
    settings = TraceSettings(orders=(1,), min_count=3, permutations=0, samples=20)
    said = report_on(source, "predictability", "choice_entropy", "repetition", settings=settings)
    assert verdicts(said)["predictability"] == "reported" and "no permutations" in text(said)
    assert all(figure.draw() for section in said.sections for figure in section.figures)


def test_no_rows_at_all(tmp_path):
    source = trace_source(small_trace().of(np.zeros(30, bool)))
    said = report_on(source)
    assert set(verdicts(said).values()) == {"not testable", "not measured"}
    assert not any(section.figures for section in said.sections)


def test_criteria_pass_only_if_every_testable_layer_does():
    source = trace_source(small_trace(layers=3))
    stats = source.stats
    count = stats.count.copy()
    count[2] = 0  # a layer that was not collected
    mean = stats.entropy.mean.copy()
    mean[0], mean[1] = 0.1, 0.1
    sure = replace(stats, count=count, entropy=replace(stats.entropy, mean=mean))
    (section,) = report_on(Source(sure, {}), "entropy").sections
    assert section.verdict == "PASS" and section.outcome.endswith("2 of 3 layers (1 not testable)")
    mean[1] = 1.0
    (section,) = report_on(Source(sure, {}), "entropy").sections
    assert section.verdict == "FAIL" and section.outcome.endswith("1 of 3 layers (1 not testable)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "missing.parquet"), "missing.parquet: no such file"),
        (("--input", "folder"), "folder: this folder has no routing_stats.parquet"),
        (("--input", "text.parquet"), "text.parquet: not a readable Parquet file"),
        (("--input", "own", "--trace", "own"), "no routing trace"),
        (("--input", "own", "--compare", "missing.parquet"), "missing.parquet: no such file"),
        (("--input", "own", "--permutations", "5"), "permutations is 5"),
        (("--input", "own", "--orders", "0"), "give one or more context lengths"),
        (("--input", "own", "--samples", "0"), "samples is 0; give at least 1"),
    ],
)
def test_bad_input_ends_in_one_message(own_file, tmp_path, arguments, message):
    (tmp_path / "text.parquet").write_text("no Parquet")
    (tmp_path / "folder").mkdir()
    paths = {
        "own": str(own_file),
        **{name: str(tmp_path / name) for name in ("missing.parquet", "text.parquet", "folder")},
    }
    with pytest.raises(SystemExit) as stop:
        main([*(paths.get(one, one) for one in arguments), "--output", str(tmp_path / "out")])
    assert message in str(stop.value) and str(stop.value).startswith("error: ")
    assert not (tmp_path / "out").exists()  # nothing half written


def test_it_runs_by_its_path(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hypothesis_validation.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(hypothesis_validation.__file__, run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--compare" in said
    assert "(default: results/hypotheses)" in said and "(default: None)" not in said


def test_what_sigmoid_scores_are_is_said_where_entropy_is_judged():
    for scores, said in (("softmax", False), ("logits", False), ("sigmoid", True)):
        source = trace_source(replace(small_trace(), scores=scores))
        caution = " ".join(RoutingData(source).entropy.caution)
        assert ("sigmoid scores; they are divided by their sum" in caution) == said
    source = trace_source(replace(small_trace(probs=False), scores="sigmoid"))
    assert not RoutingData(source).entropy.caution
