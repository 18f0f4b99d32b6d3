"""Two runs: differences that were planted, none where there is none, and ids that only one run knows."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.questions.paired_runs import _compare
from varjax.stats import Moments, RoutingStats


def run(ids, entropy, confidence, counts=20) -> RoutingStats:
    """One layer per row of entropy and confidence [L, R]."""
    entropy, confidence = np.atleast_2d(entropy), np.atleast_2d(confidence)
    empty = RoutingStats.empty(np.asarray(ids)[:, None], (1,), len(entropy), 4)
    top1 = np.random.default_rng(len(ids)).multinomial(counts, [0.4, 0.3, 0.2, 0.1], entropy.shape)
    made = replace(empty, count=top1.sum(axis=-1), top1_counts=top1, sum_probs=top1.astype(float))
    zero = np.zeros_like(entropy)
    return replace(
        made,
        entropy=Moments(entropy, zero, entropy, entropy),
        confidence=Moments(confidence, zero, confidence, confidence),
    )


def test_tests_agree_with_scipy_and_find_the_planted_difference():
    rng = np.random.default_rng(0)
    entropy, confidence = rng.random((2, 60)) + 0.5, rng.random((2, 60))
    moved = entropy + rng.normal([[0.1], [0]], 0.1, (2, 60))
    first = run(np.arange(60), entropy, confidence)
    second = run(np.arange(60)[::-1], moved[:, ::-1], np.round(confidence[:, ::-1] + rng.normal(0, 0.1, (2, 60)), 1))
    measures = {one.name: one for one in _compare(first, second)}
    assert list(measures) == ["entropy", "confidence"]

    found = measures["entropy"].figures
    difference = moved - entropy
    raw = []
    for layer in range(2):
        oracle = scipy_stats.ttest_rel(moved[layer], entropy[layer])
        raw.append(oracle.pvalue)
        interval = oracle.confidence_interval()
        assert found["difference"][layer] == pytest.approx(difference[layer].mean())
        assert found["low"][layer] == pytest.approx(interval.low)
        assert found["high"][layer] == pytest.approx(interval.high)
        assert found["d"][layer] == pytest.approx(difference[layer].mean() / difference[layer].std(ddof=1))
    assert found["p, t-test"][0] == pytest.approx(raw[0] * 4)  # the least of two figures in two layers
    ranks = scipy_stats.rankdata(np.abs(difference[0])) * np.sign(difference[0])
    z = ranks.sum() / np.sqrt(np.square(ranks).sum())  # exact variance, ties included
    assert found["p, Wilcoxon"][0] == pytest.approx(4 * 2 * scipy_stats.norm.sf(abs(z)), rel=1e-9)
    assert found["rank r"][0] == pytest.approx(ranks.sum() / np.abs(ranks).sum()) and found["rank r"][0] > 0.5
    assert found["p, t-test"][0] < 0.001 < 0.05 < found["p, t-test"][1]


def test_ids_of_one_run_and_unknown_figures_stay_out():
    entropy = np.linspace(0.5, 1, 30)
    holes = entropy + np.linspace(0, 0.1, 30)
    holes[[2, 7]] = np.nan
    first = run(np.arange(30), entropy, entropy)
    second = run(np.arange(5, 35), holes, holes)
    found = _compare(first, second)[0]
    assert found.used.number[0] == 25 - 2
    assert first.keys[found.used.left_out[0], -1].tolist() == [7, 12]


@pytest.mark.parametrize(
    ("shift", "number", "reason"),
    [(0.0, 20, "every difference is 0"), (0.25, 20, "every difference is 0.25"), (0.1, 4, "4 common token ids")],
)
def test_what_cannot_be_tested_says_why(shift, number, reason):
    entropy = np.arange(number) / 8
    found = _compare(run(range(number), entropy, entropy), run(range(number), entropy + shift, entropy))[0]
    assert reason in found.used.untestable[0] and np.isnan(found.figures["p, t-test"][0])


def test_other_models_are_refused():
    one = np.ones(12)
    with pytest.raises(ValueError, match="1 and 2 layers"):
        _compare(run(range(12), one, one), run(range(12), [one, one], [one, one]))
