import dataclasses
import math

import numpy as np
import pytest

from analysis.evaluate.losses import Caching, plain_runner, score, var_runner
from analysis.resampling import Estimate
from tuning.objective import Objective, _predicted_speedup, upper_limit
from tuning.points import PREDICTED
from varjax.config import LayerPolicy
from varjax.model import VARModel
from varjax.table import build_table

READING = {"batch_size": 4, "max_length": 16}


@pytest.fixture(scope="module")
def objective(subject):
    return Objective(subject, speed="model")


def kept(subject, kept, residual=True):
    return dataclasses.replace(
        subject.config, default=LayerPolicy(experts_kept=kept, ngram_orders=(1, 2), use_answers=residual)
    )


def test_a_bound_on_the_answers_that_one_table_cannot_keep_is_refused(subject):
    bounded = dataclasses.replace(subject, config=dataclasses.replace(subject.config, answers_per_layer=3))
    with pytest.raises(ValueError, match="answers_per_layer=3: all configurations of a search share one table"):
        Objective(bounded, speed="model")


def test_an_open_config_costs_nothing_and_saves_nothing(subject, objective):
    found = objective.evaluate(subject.config)
    assert found.degradation == pytest.approx(0, abs=1e-6) and not found.hopeless
    assert found.upper == pytest.approx(0, abs=1e-6)
    assert (found.experts_per_token, found.learned_share, found.speedup) == (2.0, 1.0, 1.0)
    assert found.documents == len(subject.documents)


def test_the_cost_is_that_of_the_whole_evaluation(subject, objective):
    config = kept(subject, 1)
    found = dataclasses.replace(objective, limit=0.2).evaluate(config)  # nothing is given up
    var_model = VARModel(subject.model, config, table=build_table(config, subject.stats, subject.answers, top_k=2))
    plain, _ = score(plain_runner(subject.model), None, subject.documents, **READING, progress=False)
    scores, _ = score(var_runner(var_model), var_model.init(), subject.documents, **READING, progress=False)
    assert found.documents == len(subject.documents) and 1 <= found.experts_per_token < 2
    expected = math.expm1(scores.nll_per_token - plain.nll_per_token)
    assert found.degradation == pytest.approx(expected, abs=1e-5)
    assert found.upper > found.degradation
    assert found.speedups == {PREDICTED: Estimate(found.speedup, found.speedup, found.speedup)}


def test_a_hopeless_config_is_given_up_and_can_never_be_chosen(subject, objective):
    found = dataclasses.replace(objective, limit=0.0005).evaluate(kept(subject, 0, residual=False))
    assert found.hopeless and found.documents < len(subject.documents) and found.degradation > 0.01
    assert not found.within(math.inf)


def test_the_same_config_gives_the_same_outcome(subject, objective):
    again = Objective(dataclasses.replace(subject), speed="model")
    assert again.evaluate(kept(subject, 1)) == objective.evaluate(kept(subject, 1))


def test_measured_speeds_are_paired_by_phase(subject):
    found = Objective(subject, phases=("prefill",), repeats=2).evaluate(kept(subject, 1))
    assert list(found.speedups) == ["prefill"] and found.speedup == found.speedups["prefill"].value > 0


def test_prices_are_of_every_layer_with_answers_and_are_kept_on_disk(subject, tmp_path):
    kept_on_disk = dataclasses.replace(subject, folder=tmp_path)
    prices = Objective(kept_on_disk, speed="model").prices
    assert prices.layers == (0, 1) and (prices.cost > 0).all()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("prices-*.json")}
    assert len(files) == 1
    again = Objective(dataclasses.replace(kept_on_disk), speed="model").prices
    np.testing.assert_array_equal(again.cost, prices.cost)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("prices-*.json")}


def test_the_upper_limit_covers_the_truth_as_often_as_it_says():
    """Documents of very different length whose loss per token varies from one to the next."""
    rng = np.random.default_rng(0)
    truth, covered = 0.01, 0
    for _ in range(2000):
        tokens = rng.integers(20, 400, 60)
        change = tokens * rng.normal(truth, 0.02, 60)
        covered += math.log1p(upper_limit(change, tokens, 0.9)[1]) >= truth
    assert 0.87 < covered / 2000 < 0.93
    assert upper_limit(np.array([1.0]), np.array([10]), 0.95)[1] == math.inf


def test_predicted_speed_grows_with_every_expert_that_is_saved(saved_model):
    speeds = [_predicted_speedup(saved_model.config, 64, experts) for experts in (2.0, 1.5, 1.0, 0.0)]
    assert speeds[0] == 1.0 and speeds == sorted(speeds) and speeds[-1] > 1
    assert speeds[1] > _predicted_speedup(saved_model.config, 64, 1.5, answer_rank=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"limit": 0.0}, "limit=0.0"),
        ({"phases": ("prefil",)}, "prefil"),
        ({"phases": ()}, "expected one or more of prefill, decode"),
    ],
)
def test_settings_out_of_range_are_refused(subject, settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(subject, **settings)


def test_programs_of_many_cache_sizes_do_not_pile_up(subject, objective, monkeypatch):
    cleared = []
    monkeypatch.setattr("tuning.objective.jax.clear_caches", lambda: cleared.append(1))
    monkeypatch.setattr("tuning.objective.PROGRAMS", 2)
    fresh = dataclasses.replace(objective)
    for size in (4, 4, 8, 12, 4):
        fresh._make_room(dataclasses.replace(subject.config, cache_size=size, context_window_size=2))
    assert len(cleared) == 1  # for the third size; then there is room for the first again


def test_the_time_to_live_counts_where_documents_share_a_cached_tier(subject):
    """At a second per token a batch of four documents lasts for 64 s."""
    never = LayerPolicy(frequency_threshold=10**9)
    config = dataclasses.replace(
        subject.config, default=never, cache_size=64, confidence_threshold=0.01, context_window_size=2
    )
    shared = dataclasses.replace(subject, caching=Caching(shared=True, seconds_per_token=1.0))
    found = [
        Objective(shared, speed="model", limit=0.2).evaluate(dataclasses.replace(config, cache_ttl_seconds=seconds))
        for seconds in (10.0, 300.0)
    ]
    assert found[0].learned_share == 1.0 > found[1].learned_share
    assert shared.digest != subject.digest
