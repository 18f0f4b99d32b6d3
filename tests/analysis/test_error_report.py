import dataclasses
import json

import numpy as np
import pytest

from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.error_report import main
from analysis.report.report import Report, fields, text
from analysis.resampling import Estimate
from analysis.studies.error_figures import draw
from analysis.studies.error_sections import sections
from analysis.studies.error_sources import Change, ErrorSources, Group, Groups, LayersAlone
from analysis.studies.generation_drift import NOTHING, Drift, Likelihood, agreement
from varjax import statsfile
from varjax.config import LayerPolicy, VARConfig


def change(name, nats, experts=2.0):
    return Change(name, Estimate(nats, nats - 0.001, nats + 0.001), experts)


@pytest.fixture(scope="module")
def sources():
    policy = change("the policy", 0.01, 1.25)
    kinds = (*(change(name, 0.02) for name in "abc"), policy)
    layers = LayersAlone(
        (0, 3), (change("layer 0 alone", 0.002), change("layer 3 alone", 0.005)), policy,
        Estimate(0.007, 0.006, 0.008), Estimate(0.003, 0.001, 0.005),
    )  # fmt: skip
    unknown = Estimate(0.02, float("nan"), float("nan"))  # too few documents
    two = (Group("the router", 60, unknown, unknown), Group("order 1", 40, policy.nats, policy.nats))
    return ErrorSources(12, 100, 20.0, kinds, layers, (policy, change("d", 0.5)), Groups(policy, two, two, two))


@pytest.fixture(scope="module")
def drifted():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 9, (20, 5))
    plain[3, 2:] = NOTHING
    parted = np.where(rng.random(plain.shape) < 0.3, 9, plain)
    likelihood = Likelihood(*(Estimate(value, value - 0.1, value + 0.1) for value in (-1.0, -1.1, -3.0, -0.1)))
    return Drift(20, 8, 5, agreement(plain, parted, plain, samples=20), likelihood)


def test_every_figure_that_the_sections_name_is_drawn(sources, drifted):
    made = sections(sources, drifted)
    assert [note.name for section in made for note in section.figures] == [name for name, _ in draw(sources, drifted)]
    assert [section.name for section in sections(sources)] == ["error_kinds", "error_layers", "error_groups"]
    assert [section.name for section in sections(drifted=drifted)] == ["generation_drift"]
    assert sections() == ()


def test_the_sections_say_what_was_measured(sources, drifted):
    report = Report("title", (), (), sections(sources, drifted))
    said = " ".join(text(report).split())
    assert "+2.02% if the table chooses" in said and "+1.01% under the policy at 1.25 experts" in said
    assert (
        "add up to +0.00700 nats per token, together they cost +0.01000; excess +0.00300 [+0.00100, +0.00500]" in said
    )
    assert "the largest part, +0.02000, where the longest key that answered was: the router (60% of the tokens)" in said
    assert "single steps agree at 100.0%" in said and "-0.100 [-0.200, +0.000] nats per token" in said
    json.dumps(fields(report)["sections"]["error_groups"]["outcome"])


def test_the_command_writes_a_report(saved_model, model_directory, corpus_file, documents, tmp_path):
    reading = {"batch_size": 8, "max_length": 16, "progress": False}
    some = [dataclasses.replace(document, ids=document.ids[:16]) for document in documents]
    stats = collect(saved_model, some, choose_keys(saved_model, some, 16, KeySettings((1,), 2)), **reading)
    statsfile.write(tmp_path / "stats.parquet", stats, {"fingerprint": saved_model.fingerprint})
    policy = LayerPolicy(experts_kept=1, use_answers=False, frequency_threshold=2, entropy_threshold=9.0)
    VARConfig(cache_size=0, default=policy).save(tmp_path / "policy.json")
    files = {"model": model_directory, "dataset": corpus_file, "split": "all", "output": tmp_path / "out"}
    files |= {"var_config": tmp_path / "policy.json", "routing_stats": tmp_path / "stats.parquet"}
    sizes = {"num_samples": 40, "batch_size": 8, "max_length": 16, "prompts": 2, "prompt_tokens": 8, "new_tokens": 4}
    main([f"--{name}={value}" for name, value in (files | sizes).items()])
    found = json.loads((tmp_path / "out" / "error_sources.json").read_text())
    assert list(found["sections"]) == ["error_kinds", "error_layers", "error_groups", "generation_drift"]
    assert found["provenance"]["model"]["fingerprint"] == saved_model.fingerprint
    pictures = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["error_groups", "error_kinds", "error_layers", "generation_drift"]


def test_a_bad_policy_file_ends_in_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*missing\.json"):
        main(["--var_config", str(tmp_path / "missing.json")])
