import dataclasses
import math

import numpy as np
import pytest

from analysis.evaluate.certificate import (
    LIMIT,
    TESTS,
    certify,
    certify_results,
    report,
    sentences,
)
from analysis.evaluate.comparison import Result, degradation
from analysis.evaluate.losses import Losses, LossesError, Scores
from analysis.report.provenance import write_json
from analysis.report.report import text
from analysis.resampling import allowed
from analysis.text.encoding import Drawn
from benchmarks.certificate_simulation import GOOD, POPULATIONS, coverage, family_wise
from varjax.bounds import upper_bound
from varjax.checksums import read_json

CLIP = 0.2
DOCUMENTS = 400
TOKENS = np.random.default_rng(0).integers(30, 500, DOCUMENTS)
GROUPS = ["prose", "code"] * 195 + ["verse"] * 10
IDS = [f"document {i}" for i in np.random.default_rng(1).permutation(DOCUMENTS)]


def losses(increase=0.0):
    """Documents of 3 nats per token plus `increase`."""
    return Losses(IDS, GROUPS, TOKENS * (3.0 + increase), TOKENS)


def increases(mean, deviation=0.01, seed=2):
    return mean + deviation * np.random.default_rng(seed).standard_normal(DOCUMENTS)


def certificate(candidates, baseline=None, **changes):
    settings = {"clip": CLIP, "model_sha256": "m", "config_sha256": {name: f"c-{name}" for name in candidates}}
    return certify(baseline or losses(), candidates, **settings | changes)


def only(result):
    (one,) = result.configurations
    return one


def test_the_overall_bound_is_that_of_the_clipped_increases_per_token_in_order_of_their_ids():
    increase = increases(0.005, 0.1)
    increase[7] = 5.0
    one = only(certificate({"bold": losses(increase)})).overall
    clipped = np.clip(increase[np.argsort(IDS)], -CLIP, CLIP)
    assert one.mean == pytest.approx(clipped.mean())
    assert one.bound == pytest.approx(upper_bound(clipped, -CLIP, CLIP))
    assert one.perplexity_bound == pytest.approx(math.exp(one.bound) - 1)
    assert one.clipped == np.mean(np.abs(increase) > CLIP) > 0.02
    assert one.pooled == pytest.approx(np.sum(increase * TOKENS) / TOKENS.sum())  # neither clipped nor per document


def test_the_order_of_the_documents_plays_no_part():
    increase = increases(0.005)
    there, back = np.arange(DOCUMENTS), np.arange(DOCUMENTS)[::-1]

    def taken(order, more):
        nll = TOKENS * (3.0 + more)
        return Losses([IDS[i] for i in order], [GROUPS[i] for i in order], nll[order], TOKENS[order])

    sorted_ = certificate({"var": taken(there, increase)}, taken(there, 0 * increase))
    assert certificate({"var": taken(back, increase)}, taken(np.roll(there, 5), 0 * increase)) == sorted_


def test_groups_share_the_error_and_a_small_one_is_not_certified():
    increase = increases(0.002)
    one = only(certificate({"var": losses(increase)}))
    assert set(one.groups) == {"prose", "code", "verse"}
    prose = np.array([group == "prose" for group in GROUPS])
    order = np.argsort(np.array(IDS)[prose])
    expected = upper_bound(increase[prose][order], -CLIP, CLIP, 0.975)  # two groups of 20 or more
    assert one.groups["prose"].bound == pytest.approx(expected)
    assert one.groups["prose"].level == pytest.approx(0.975) and one.overall.level == 0.95
    assert one.groups["verse"].documents == 10
    assert one.groups["verse"].bound is None and not one.groups["verse"].within_limit
    assert one.groups["prose"].within_limit


def test_certified_is_what_stays_within_the_limit_in_the_order_given():
    good, bad = losses(increases(0.002)), losses(increases(0.012))
    assert certificate({"good": good, "bad": bad}).certified == ("good",)
    assert certificate({"bad": bad, "good": good}).certified == ()
    assert certificate({"bad": bad, "good": good}, testing="holm").certified == ("good",)
    assert certificate({"bad": bad}, limit=0.05).certified == ("bad",)


def test_the_verdict_on_one_configuration_agrees_with_its_bound():
    verdicts = []
    for mean in np.linspace(0, 0.012, 13):
        one = only(certificate({"var": losses(increases(mean))}))
        assert one.certified == one.overall.within_limit == (one.overall.bound <= LIMIT) == (one.p <= 0.05)
        verdicts.append(one.certified)
    assert verdicts == sorted(verdicts, reverse=True) and len(set(verdicts)) == 2


def test_procedures_reject_what_the_definitions_say():
    def rejected(testing, *p):
        return (TESTS[testing](np.array(p)) <= 0.05).tolist()

    assert rejected("fixed_sequence", 0.04, 0.001, 0.2, 0.01) == [True, True, False, False]
    assert rejected("holm", 0.04, 0.001, 0.2, 0.01) == [False, True, False, True]  # 0.001 * 4, 0.01 * 3, then 0.04 * 2
    assert rejected("holm", 0.03, 0.03) == [False, False]


def test_more_documents_are_asked_for_only_where_they_may_help():
    near = only(certificate({"var": losses(increases(0.0092))})).overall
    assert not near.within_limit and near.needed_for_limit > DOCUMENTS
    good = only(certificate({"var": losses(increases(0.002))})).overall
    assert good.needed_for_limit < DOCUMENTS < good.needed_for_half
    assert only(certificate({"var": losses(increases(0.012))})).overall.needed_for_limit is None


def test_documents_without_a_scored_token_are_left_out_and_counted():
    tokens = TOKENS.copy()
    tokens[:3] = 0
    base, other = (Losses(IDS, GROUPS, tokens * loss, tokens) for loss in (3.0, 3.001))
    result = certificate({"var": other}, base)
    assert (result.unscored, result.documents) == (3, DOCUMENTS - 3)
    assert "3 documents" in paragraph(result)


def test_hashes_name_model_data_and_configuration(tmp_path):
    result = certificate({"var": losses(0.001)})
    assert (result.model_sha256, only(result).sha256) == ("m", "c-var")
    longer = [Losses(IDS, GROUPS, TOKENS * loss, TOKENS + 1) for loss in (3.0, 3.001)]
    assert certificate({"var": longer[1]}, longer[0]).data_sha256 != result.data_sha256
    write_json(tmp_path / "certificate.json", result)
    saved = read_json(tmp_path / "certificate.json", "")
    assert saved["configurations"][0]["overall"]["bound"] == only(result).overall.bound
    assert set(saved) == {field.name for field in dataclasses.fields(result)}


def test_the_text_says_what_is_certified_and_what_is_not_covered():
    result = certificate({"good": losses(increases(0.002)), "bad": losses(increases(0.012))})
    words = paragraph(result)
    assert words.startswith("Certified: good.")
    for promise in (
        "1.00%",
        "at most 5%",
        "text that the model writes itself",
        "0.2 nats",
        "in the order of the table",
    ):
        assert promise in words
    assert f"good: about {result.configurations[0].overall.needed_for_half:,} documents" in words
    said = report(result)
    lines, drawn = text(said).splitlines(), said.sections[0].figures[0].draw()
    row = next(line for line in lines if line.startswith("  good"))
    assert f"{result.configurations[0].overall.perplexity_bound:+.2%}" in row and row.endswith("yes")
    assert any("1 not certified, under 20 documents" in line for line in lines)
    assert [tick.get_text() for tick in drawn.axes[0].get_yticklabels()][:2] == ["good", "bad"]
    assert paragraph(certificate({"bad": losses(increases(0.012))})).startswith("Certified: none.")


def paragraph(result):
    return " ".join(sentences(result))


ORIGIN = {"model": {"fingerprint": "m"}, "config_sha256": "c-var", "data": {"split": "calibrate"}}


def result_of(path, source, **fields):
    usual = {"mode": "var", "max_length": 256, "stride": 256, "provenance": ORIGIN}
    return Result(path, usual | fields, source)


def baseline_of(path, source=None, **fields):
    return result_of(path, source or losses(), mode="baseline", **fields)


def test_evaluations_in_files_and_in_memory_give_the_same(tmp_path):
    increase = increases(0.004)
    base, other = baseline_of(tmp_path / "a"), result_of(tmp_path / "b", losses(increase))
    result = certify_results(base, {"var": other}, clip=CLIP)
    assert result == certificate({"var": losses(increase)})
    assert math.expm1(only(result).overall.pooled) == pytest.approx(degradation(base, other, samples=10).value)
    ones = np.ones(DOCUMENTS, int)
    scores = Scores(IDS, GROUPS, TOKENS * 3.0, TOKENS, ones, ones, 256, 256)
    assert certificate({"var": losses(increase)}, scores) == result


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 128}, "another stride"),
        ({"prefix_id": 1}, "another prefix_id"),
        ({"mode": "baseline"}, "of mode 'baseline', expected 'var'"),
        ({"provenance": ORIGIN | {"model": {"fingerprint": "m", "dtype": "bfloat16"}}}, "another model dtype"),
        ({"provenance": ORIGIN | {"data": {"split": None}}}, "all splits.*'calibrate' or 'test'"),
        ({"provenance": {}}, "names no model"),
        ({"provenance": {"model": {"fingerprint": "x"}, "config_sha256": "c"}}, "another model fingerprint"),
        (
            {"provenance": {"model": {"fingerprint": "m"}, "config_sha256": "c", "data": {"split": "tune"}}},
            "split 'tune'",
        ),
    ],
)
def test_evaluations_that_cannot_be_certified_are_named(tmp_path, fields, message):
    base, other = baseline_of(tmp_path / "a"), result_of(tmp_path / "b", losses(0.001), **fields)
    with pytest.raises(LossesError, match=message):
        certify_results(base, {"var": other}, clip=CLIP)


def test_swapped_arguments_are_refused(tmp_path):
    base, other = baseline_of(tmp_path / "a"), result_of(tmp_path / "b", losses(0.001))
    with pytest.raises(LossesError, match="of mode 'var', expected 'baseline'; give the baseline first"):
        certify_results(other, {"base": base}, clip=CLIP)


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        (None, "how they were drawn was not recorded"),
        (
            Drawn("source", 400, 1, ("documents",)),
            "the first 400 of the split as the source lists them (cut at a number of documents), not a random sample",
        ),
        (Drawn("source", 90, 0, ("documents", "tokens")), "(cut at a number of documents and of tokens), not a random"),
        (Drawn("source", 400), "all 400 of the split as the source lists them: a sample of the corpus, drawn by a"),
        (
            Drawn("hash", 400, 0, ("documents",)),
            "the first 400 of the split in the order of their texts' hashes (cut at a number of documents): a sample",
        ),
        (Drawn("source", 400, 1), "Texts of fewer than two tokens were left out (1)"),
    ],
)
def test_the_text_says_how_the_documents_were_drawn(tmp_path, drawn, words):
    data = {"split": "calibrate", "dataset": "a.txt", "limit": 400, "documents": 399}  # say nothing of it
    origin = {"provenance": ORIGIN | {"data": data | {"drawn": drawn and drawn.fields()}}}
    base, other = baseline_of(tmp_path / "a", **origin), result_of(tmp_path / "b", losses(0.001), **origin)
    assert words in paragraph(certify_results(base, {"var": other}, clip=CLIP))


def test_the_text_warns_of_a_cache_that_makes_documents_depend_on_each_other(tmp_path):
    for size in (0, 64):
        origin = {"provenance": ORIGIN | {"config": {"cache_size": size}}}
        result = certify_results(
            baseline_of(tmp_path / "a"), {"bold": result_of(tmp_path / "b", losses(0.001), **origin)}, clip=CLIP
        )
        assert ("bold ran with a cached tier" in paragraph(result)) == (size > 0)
        assert report(result).sections[0].verdict == ("not testable" if size else "PASS")


def changed(**fields):
    return dataclasses.replace(losses(0.001), **fields)


@pytest.mark.parametrize(
    ("candidates", "settings", "message"),
    [
        ({}, {}, "no configuration"),
        ({"var": losses()}, {"config_sha256": {}}, "'var' has no hash"),
        ({"var": losses()}, {"clip": 0.001}, "limit < clip"),
        ({"var": losses()}, {"level": 95}, "between 0 and 1"),
        ({"var": losses()}, {"testing": "bonferroni"}, "holm"),
        ({"var": changed(ids=[*IDS[:-1], "stranger"])}, {}, "shares 399 of its 400"),
        ({"var": changed(ids=[*IDS[:-1], IDS[0]])}, {}, f"{IDS[0]} twice"),
        ({"var": changed(tokens=TOKENS + 1)}, {}, "other tokens"),
        ({"var": changed(groups=["prose"] * DOCUMENTS)}, {}, "other group"),
        ({"var": changed(nll=np.full(DOCUMENTS, np.nan))}, {}, "loss nan"),
    ],
)
def test_losses_that_cannot_be_certified_are_named(candidates, settings, message):
    with pytest.raises(LossesError, match=message):
        certificate(candidates, **settings)


def test_a_handful_of_documents_is_refused():
    few = Losses(IDS[:19], GROUPS[:19], TOKENS[:19] * 3.0, TOKENS[:19])
    with pytest.raises(LossesError, match="19 documents"):
        certificate({"var": few}, few)


@pytest.mark.parametrize("name", POPULATIONS)
def test_simulated_calibrations_fail_no_more_often_than_promised(name):
    result = coverage(POPULATIONS[name], 200, 300, np.random.default_rng(3))
    assert result.failures["betting"] <= allowed(300, 0.05)
    assert result.failures["bernstein"] <= allowed(300, 0.05)
    assert result.widths["betting"] < result.widths["bernstein"]


def test_the_simulation_notices_a_bound_that_is_not_valid():
    result = coverage(POPULATIONS["rare disaster"], 50, 300, np.random.default_rng(4))
    assert result.failures["t-interval"] == pytest.approx(0.99**50, abs=0.1)  # it fails wherever no disaster was seen
    assert result.failures["betting"] <= allowed(300, 0.05)


def test_twelve_simulated_configurations_keep_the_family_wise_error():
    result = family_wise(400, 200, np.random.default_rng(5))
    for procedure in ("fixed_sequence", "holm"):
        assert result.errors[procedure] <= allowed(200, 0.05)
        assert result.found[procedure] > len(GOOD) - 1
    assert result.errors["mean below the limit"] > 0.5  # what the procedures are for
