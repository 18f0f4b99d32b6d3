import dataclasses
import math

import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.evaluation.certificate import Losses, certify
from analysis.evaluation.comparison import Estimate
from analysis.policies.scored_points import Subject
from profiling.timing import Ratio
from tuning.validation import Repeat, Validated, Validation, validate
from tuning.validation_section import section
from varjax.config import LayerPolicy, VARConfig

LIMIT = 0.01


def validated(name, speeds, losses, searched=True):
    repeats = tuple(
        Repeat(50, Estimate(loss, loss - 0.001, loss + 0.001), {"prefill": Ratio(speed, speed, speed)}, speed)
        for speed, loss in zip(speeds, losses, strict=True)
    )
    mean = float(np.mean(losses))
    return Validated(name, searched, 1.0, Estimate(mean, mean - 0.001, mean + 0.001), repeats)


def certificate(means):
    """Of configurations whose loss rises by so much on each of 1,000 documents, about."""
    rng, tokens = np.random.default_rng(0), np.full(1000, 100)
    ids, groups = [str(i) for i in range(1000)], ["g"] * 1000
    base = Losses(ids, groups, np.full(1000, 300.0), tokens)
    others = {
        name: Losses(ids, groups, base.nll + 100 * rng.normal(mean, 0.001, 1000), tokens)
        for name, mean in means.items()
    }
    hashes = dict.fromkeys(means, "0" * 64)
    return certify(base, others, clip=0.2, model_sha256="0" * 64, config_sha256=hashes, limit=math.log1p(LIMIT))


def verdicts(found):
    table = next(table for table in section(found).tables if "criteria" in table.title)
    return {name: verdict for name, _, _, verdict in table.rows}


def test_the_fastest_certified_configuration_is_chosen():
    found = Validation(
        certificate({"slow": 0.002, "fast": 0.004, "dear": 0.02}),
        (
            validated("slow", [1.2, 1.2], [0.002, 0.002]),
            validated("fast", [1.4, 1.45], [0.004, 0.005]),
            validated("dear", [2.0, 2.0], [0.02, 0.02]),
            validated("preset a", [1.1, 1.1], [0.0, 0.0], searched=False),
        ),
        LIMIT,
    )
    assert found.chosen.name == "fast" and found.best_preset.name == "preset a"
    assert section(found).verdict == "PASS" and set(verdicts(found).values()) == {"PASS"}


@pytest.mark.parametrize(
    ("speeds", "losses", "preset", "missed"),
    [
        ([1.2, 1.25], [0.004, 0.004], 1.0, {"speed-up"}),
        ([1.25, 1.4], [0.004, 0.004], 1.0, {"consistent over 2 repeats"}),  # on both sides of 1.3x
        ([1.35, 1.8], [0.004, 0.004], 1.0, {"consistent over 2 repeats"}),  # far apart
        ([1.4, 1.4], [0.004, 0.012], 1.0, {"consistent over 2 repeats"}),
        ([1.4, 1.4], [0.012, 0.012], 1.0, {"degradation, test documents"}),
        ([1.4, 1.4], [0.004, 0.004], 1.5, {"faster than every preset within the limit"}),
    ],
)
def test_each_criterion_can_be_missed_alone(speeds, losses, preset, missed):
    configurations = (
        validated("one", speeds, losses),
        validated("preset a", [preset, preset], [0.0, 0.0], searched=False),
    )
    found = Validation(certificate({"one": 0.004}), configurations, LIMIT)
    assert {name for name, verdict in verdicts(found).items() if verdict == "FAIL"} == missed
    assert section(found).verdict == "FAIL"


def test_without_a_certified_configuration_the_section_says_so_first():
    found = Validation(certificate({"one": 0.02}), (validated("one", [2.0, 2.0], [0.02, 0.02]),), LIMIT)
    said = section(found)
    assert found.chosen is None and said.verdict == "FAIL"
    assert said.outcome.startswith("no configuration is certified to cost at most +1.00%; the nearest is one")


@pytest.fixture(scope="module")
def subject(saved_model, even_documents):
    reading = {"batch_size": 4, "max_length": 16, "progress": False}
    known = even_documents[:57]
    keys = choose_keys(saved_model, known, 16, KeySettings((1,), min_count=3))
    stats = collect(saved_model, known, keys, **reading)
    answers = collect_answers(saved_model, known, stats.keys, range(2), **reading)
    config = VARConfig(frequency_threshold=3, entropy_threshold=5.0, cache_size=0)
    return Subject(saved_model, stats, answers, config, even_documents[57:87], **reading)


def test_a_real_model_is_validated_on_different_documents_in_each_repeat(subject, even_documents):
    test = dataclasses.replace(subject, documents=even_documents[87:])
    nothing = dataclasses.replace(subject.config, default=None)
    half = dataclasses.replace(subject.config, default=LayerPolicy(kept=1, residual=False))
    candidates = {"nothing": nothing, "half": half}
    found = validate(subject, test, candidates, {"preset": half}, repeats=3, rounds=2, limit=0.2)
    assert [one.name for one in found.configurations] == ["nothing", "half", "preset"]
    first, second, preset = found.configurations
    assert first.degradation.value == pytest.approx(0, abs=1e-6) and first.experts_per_token == 2.0
    assert [repeat.documents for repeat in second.repeats] == [17, 17, 16]
    assert len({repeat.degradation.value for repeat in second.repeats}) == 3
    assert preset.degradation == second.degradation and not preset.searched
    assert [one.name for one in found.certificate.configurations] == ["nothing", "half"]
    assert found.certificate.documents == 30
    assert section(found).verdict in ("PASS", "FAIL")


def test_too_few_documents_for_the_repeats_are_refused(subject):
    test = dataclasses.replace(subject, documents=subject.documents[:2])
    with pytest.raises(ValueError, match="3 repeats of 2 test documents"):
        validate(subject, test, {}, {}, repeats=3)
