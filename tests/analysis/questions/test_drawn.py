"""Draws of documents give what a recount would give, and their intervals cover the truth where others miss it."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.questions import consistency, coverage, drawn, entropy_distribution, frequency_entropy, zipf
from analysis.questions.drawn import DocumentDraws, interval
from analysis.traces.statistics import trace_statistics
from analysis.traces.trace import Trace
from tests.synthetic_traces import zipf_ids

EXPERTS, VOCABULARY = 6, 400


def text(seed: int, documents: int = 40, layers: int = 1) -> Trace:
    """Documents of 20 to 100 tokens with a favorite expert, favorite ids and a mood of their own.

    Half of the choices are the id's own, three in ten the document's favorite; frequent ids have less entropy, and two
    probabilities p and 1 - p carry it.
    """
    world = np.random.default_rng(0)
    own = world.integers(0, EXPERTS, VOCABULARY)
    sure = 0.97 - 0.07 * np.log(np.arange(1, VOCABULARY + 1)) + world.normal(0, 0.02, VOCABULARY)
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), rng.integers(20, 100, documents))
    tokens = len(document)
    topic = rng.integers(0, VOCABULARY, (documents, 8))[document, rng.integers(0, 8, tokens)]
    token_id = np.where(rng.random(tokens) < 0.15, topic, zipf_ids(rng, tokens, VOCABULARY))
    kind = rng.random((tokens, layers))
    favorite = rng.integers(0, EXPERTS, documents)[document, None]
    free = rng.integers(0, EXPERTS, (tokens, layers))
    first = np.where(kind < 0.5, own[token_id, None], np.where(kind < 0.8, favorite, free))
    mood = rng.normal(0, 0.05, documents)[document, None]
    p = np.clip(sure[token_id, None] + mood + rng.normal(0, 0.05, (tokens, layers)), 0.5, 0.999)
    return Trace(
        token_id=token_id.astype(np.int32),
        document=document.astype(np.int32),
        position=np.arange(tokens, dtype=np.int32),
        experts=np.stack([first, (first + 1) % EXPERTS], axis=-1).astype(np.int16),
        probs=np.stack([p, 1 - p], axis=-1).astype(np.float32),
        document_ids=tuple(map(str, range(documents))),
        groups=("g",) * documents,
        num_experts=EXPERTS,
        probs_over="chosen",
    )


def points(trace: Trace) -> dict[str, np.ndarray]:
    """The figures as the questions compute them from statistics."""
    stats = trace_statistics(trace)
    ids, occurrences = entropy_distribution._entropy_distribution(stats).below
    return {
        "zipf": np.array(zipf._zipf(stats).exponent),
        "rho": frequency_entropy._frequency_entropy(stats).rho.value,
        "ids": ids.value,
        "occurrences": occurrences.value,
        "presets": coverage._coverage(stats).presets.value,
        "consistency": consistency._consistency(stats, samples=1).values.value,
    }


def figures(draws: DocumentDraws) -> dict[str, np.ndarray]:
    """The same figures in every draw."""
    return {
        "zipf": np.concatenate([zipf._drawn_exponents(block) for block in draws.blocks]),
        "rho": draws.by_layer(frequency_entropy._drawn_rho),
        "ids": draws.by_layer(entropy_distribution._drawn_ids),
        "occurrences": draws.by_layer(entropy_distribution._drawn_occurrences),
        "presets": draws.by_layer(coverage._drawn_presets),
        "consistency": draws.by_layer(consistency._drawn_groups),
    }


def drawn_text(trace: Trace, weights: np.ndarray) -> Trace:
    """The text of a draw written out: every document as often as it was drawn."""
    copies = np.repeat(np.arange(len(weights)), weights)
    rows = [np.flatnonzero(trace.document == one) for one in copies]
    at = np.concatenate(rows)
    return replace(
        trace,
        document=np.repeat(np.arange(len(copies)), [len(one) for one in rows]).astype(np.int32),
        position=np.arange(len(at), dtype=np.int32),
        document_ids=tuple(map(str, range(len(copies)))),
        groups=("g",) * len(copies),
        **{name: getattr(trace, name)[at] for name in ("token_id", "experts", "probs")},
    )


@pytest.mark.parametrize("drawn_at_once", [1 << 24, 5000])
def test_a_draw_is_what_the_tests_say_of_the_text_written_out(drawn_at_once, monkeypatch):
    monkeypatch.setattr(drawn, "_DRAWN", drawn_at_once)
    trace = text(1, layers=2)
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 3)
    weights[0] = 1  # the text itself
    found = figures(DocumentDraws(trace, weights.astype(float)))
    for draw, weight in enumerate(weights):
        for name, expected in points(drawn_text(trace, weight)).items():
            assert found[name][draw] == pytest.approx(expected, abs=1e-9), name


def test_the_gates_own_entropy_is_used_where_the_trace_has_it():
    trace = text(1)
    own = replace(
        trace, entropy=np.random.default_rng(0).uniform(0.2, 1.7, (len(trace.token_id), 1)).astype(np.float32)
    )
    found = figures(DocumentDraws(own, np.ones((1, 40))))
    for name, expected in points(own).items():
        assert found[name][0] == pytest.approx(expected, abs=1e-9), name


def test_draws_follow_the_seed_and_documents_whatever_their_numbers():
    trace = text(2)
    one = DocumentDraws(trace, None, 5, seed=3).by_layer(consistency._drawn_groups)
    gaps = replace(
        trace, document=trace.document * 2, document_ids=tuple(map(str, range(80))), groups=("g",) * 80
    )  # every second document has no token
    for other in (DocumentDraws(trace, None, 5, seed=3), DocumentDraws(gaps, None, 5, seed=3)):
        assert other.documents == 40 and np.array_equal(other.by_layer(consistency._drawn_groups), one)
    assert not np.array_equal(DocumentDraws(trace, None, 5, seed=4).by_layer(consistency._drawn_groups), one)


def test_an_interval_is_moved_to_its_point_and_stays_within_its_limits():
    draws = np.random.default_rng(0).normal(5, 1, (4000, 2))
    low, high = interval(np.array([1.0, np.nan]), draws)
    assert (low[0], high[0]) == pytest.approx((1 - 1.96, 1 + 1.96), abs=0.1) and np.isnan([low[1], high[1]]).all()
    low, high = interval(np.array([0.0, 0.9]), draws, 0, 1)
    assert low.tolist() == [0, 0] and high.tolist() == [1, 1]
    one = np.where(np.arange(4000)[:, None] == 0, draws, np.nan)
    assert np.isnan(interval(np.array([1.0, 1.0]), one)).all()  # one draw says nothing
    half = np.where(np.arange(4000)[:, None] % 2 == 0, draws, np.nan)
    assert np.isfinite(interval(np.array([1.0, 1.0]), half)).all()


def test_moved_intervals_hold_what_texts_of_this_size_have_where_percentiles_fail():
    many = [points(text(seed)) for seed in range(1000, 1120)]
    truth = {name: np.mean([one[name] for one in many], axis=0) for name in many[0]}
    texts = 40
    moved, plain = ({name: np.zeros(one.shape) for name, one in truth.items()} for _ in range(2))
    for seed in range(texts):
        trace = text(seed)
        draws = figures(DocumentDraws(trace, None, 60, seed))
        for name, point in points(trace).items():
            percentiles = np.nanquantile(draws[name], [0.025, 0.975], axis=0)
            for held, (low, high) in ((moved, interval(point, draws[name])), (plain, percentiles)):
                held[name] += (low - 1e-9 <= truth[name]) & (truth[name] <= high + 1e-9)
    for name, held in moved.items():
        assert np.all(held >= 0.75 * texts), name  # 38 expected; the truth itself is known to a third of an interval
        assert held.mean() >= 0.85 * texts, name
    groups = [0, 1]  # all ids, all occurrences
    assert np.all(plain["consistency"][0, groups] <= 0.2 * texts) and plain["zipf"] <= 0.7 * texts
