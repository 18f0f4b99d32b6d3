"""Points with known results, so that what is said of them can be known beforehand."""

import numpy as np
import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.evaluate.points import Subject
from analysis.resampling import Estimate
from tuning.points import PREDICTED, Outcome, Point
from tuning.space import Parameter
from varjax.config import VARConfig

READING = {"batch_size": 4, "max_length": 16}
SPACE = (
    Parameter("loss_budget", "float", 0.001, 0.03, log=True),
    Parameter("frequency_threshold", "int", 10, 200, log=True, unit="occurrences"),
    Parameter("context_window_size", "int", 2, 8, unit="ids"),
    Parameter("cached_tier", "bool"),
)


@pytest.fixture(scope="session")
def space():
    return SPACE


@pytest.fixture(scope="session")
def make_point():
    """A point whose upper limit is a little above its degradation; its values are random, its config is its own."""

    def made(number, speedup=1.2, degradation=0.005, *, hopeless=False, phase=PREDICTED, config=None, **values):
        rng = np.random.default_rng(number)
        values = {
            "loss_budget": float(rng.uniform(0.001, 0.03)),
            "frequency_threshold": int(rng.integers(10, 201)),
            "context_window_size": int(rng.integers(2, 9)),
            "cached_tier": bool(rng.integers(2)),
        } | values
        outcome = Outcome(
            degradation=degradation,
            upper=degradation + 0.002,
            documents=40 if hopeless else 200,
            hopeless=hopeless,
            experts_per_token=2 / speedup,
            learned_share=0.1,
            speedups={phase: Estimate(speedup, speedup - 0.01, speedup + 0.01)},
            speedup=speedup,
        )
        own = VARConfig(frequency_threshold=values["frequency_threshold"], entropy_threshold=abs(values["loss_budget"]))
        return Point(number, values, own if config is None else config, outcome)

    return made


@pytest.fixture(scope="session")
def searches(make_point):
    """Searches by name: one of many points, and some that say little."""
    rng = np.random.default_rng(0)
    many = [
        make_point(i, float(rng.uniform(1, 1.5)), float(rng.uniform(-0.001, 0.03)), hopeless=i % 5 == 0)
        for i in range(40)
    ]
    return {
        "none": [],
        "one": [make_point(0)],
        "many": many,
        "none feasible": [make_point(i, 1.3 + i / 100, 0.02 + i / 1000) for i in range(25)],
        "all given up": [make_point(i, 1.5, 0.1 + i / 10, hopeless=True) for i in range(25)],
        "all the same": [make_point(i, **many[1].values) for i in range(25)],
    }


@pytest.fixture(scope="session")
def subject(saved_model, even_documents):
    """Statistics and answers of 57 documents, to be judged on the others."""
    known = even_documents[:57]
    keys = choose_keys(saved_model, known, 16, KeySettings((1, 2), min_count=3))
    stats = collect(saved_model, known, keys, **READING, progress=False)
    answers = collect_answers(saved_model, known, stats.keys, range(2), **READING, progress=False)
    config = VARConfig(frequency_threshold=3, entropy_threshold=5.0, cache_size=0, default=None)
    return Subject(saved_model, stats, answers, config, even_documents[57:], **READING, progress=False)
