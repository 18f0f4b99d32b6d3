import json
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from analysis.questions.data import TraceSettings
from analysis.questions.nulls import known_keys
from analysis.questions.predictability import predictability
from analysis.traces.trace import Trace
from tests.synthetic_traces import make_trace, zipf_ids


def random_experts(rng, tokens, layers, num_experts, top_k):
    return rng.random((tokens, layers, num_experts)).argsort(axis=-1)[..., :top_k]


def random_trace(seed, num_experts=8, tokens=3000, layers=2, top_k=2, vocabulary=200):
    rng = np.random.default_rng(seed)
    probs = -np.sort(-rng.random((tokens, layers, top_k)).astype(np.float32) / top_k, axis=-1)
    experts = random_experts(rng, tokens, layers, num_experts, top_k)
    return make_trace(experts, num_experts, token_id=zipf_ids(rng, tokens, vocabulary), probs=probs, length=100)


@pytest.mark.parametrize("num_experts", [8, 64])
def test_independent_routing_lies_within_the_band(num_experts):
    outside = Counter()
    for seed in range(25):
        found = predictability(random_trace(seed, num_experts), TraceSettings((1, 2), permutations=19, samples=10))
        for name in ("agreement", "recall", "mass"):
            one = found.measures[name]
            outside[name] += np.any((one.value < one.null_low) | (one.value > one.null_high))
    # Each family leaves its band with 5 %: 5 of 25 or more with 0.7 %.
    assert all(count <= 4 for count in outside.values()), outside


def test_documents_with_preferences_of_their_own_lie_within_the_band_too():
    rng = np.random.default_rng(1)
    tokens, length = 6000, 100
    ids = zipf_ids(rng, tokens, 50) + 50 * (np.arange(tokens) // length % 2)  # two kinds of documents: ids ...
    favorite = (np.arange(tokens) // length % 2)[:, None]  # ... and favorite expert
    first = np.where(rng.random((tokens, 1)) < 0.6, favorite, rng.integers(0, 8, (tokens, 1)))
    trace = make_trace(first[..., None], 8, token_id=ids, length=100)
    found = predictability(trace, TraceSettings(permutations=39, samples=10))
    agreement = found.measures["agreement"]
    assert agreement.value.min() > 0.5  # far above 1 / 8, but not because of the tokens
    assert np.all((agreement.null_low <= agreement.value) & (agreement.value <= agreement.null_high))


def test_routing_by_the_last_two_ids_is_found_and_one_id_knows_what_theory_says():
    rng = np.random.default_rng(2)
    vocabulary, num_experts = 12, 8
    ids = zipf_ids(rng, 60_000, vocabulary)
    share = np.bincount(ids) / len(ids)
    function = rng.integers(0, num_experts, (vocabulary, vocabulary))  # [previous, current]
    first = function[np.roll(ids, 1), ids]
    first[::100] = 0  # a document's first token has no previous one
    experts = np.stack([first, (first + 1) % num_experts], axis=-1)[:, None]
    trace = make_trace(experts, num_experts, token_id=ids, length=100)
    found = predictability(trace, TraceSettings((1, 2, 3), permutations=19, samples=50))
    agreement, recall = found.measures["agreement"].value[:, 0], found.measures["recall"].value[:, 0]
    # One id: the previous ids mix; the table knows the expert with the most of them behind it.
    mixture = np.stack([np.bincount(function[:, one], share, num_experts) for one in range(vocabulary)])
    assert agreement[0] == pytest.approx(share @ mixture.max(axis=-1), abs=0.01)
    assert agreement[1] > 0.999 and recall[1] > 0.999 and agreement[2] > 0.99
    assert np.all(found.measures["agreement"].p == 1 / 20)
    # Where the longest key is known it is right; the first token of each document has only itself.
    assert agreement[3] > 0.985
    assert found.measures["coverage"].value[3, 0] == 1


def test_a_longer_order_that_knows_no_more_is_no_better_at_the_same_tokens():
    rng = np.random.default_rng(8)
    ids = zipf_ids(rng, 30_000, 60)
    sure = np.linspace(0.9, 0.1, 60)[ids]  # frequent ids, which make the frequent pairs, are the easy ones
    first = np.where(rng.random(len(ids)) < sure, ids % 8, rng.integers(0, 8, len(ids)))
    trace = make_trace(first[:, None, None], 8, token_id=ids, length=100)
    found = predictability(trace, TraceSettings((1, 2), min_count=40, permutations=19, samples=10))
    agreement, shortest = (found.measures[name].value[:, 0] for name in ("agreement", "agreement_of_shortest"))
    assert agreement[1] > agreement[0] + 0.03  # it looks better, ...
    assert agreement[1] == pytest.approx(shortest[1], abs=0.01) and shortest[0] == agreement[0]  # ... and is not
    assert found.measures["coverage"].value[-1, 0] == found.measures["coverage"].value[0, 0]
    assert shortest[-1] == agreement[0]
    assert found.measures["agreement_of_shortest"].null[1, 0] < 0.3


def slow_scores(trace, layer, order, min_count):
    """Key -> evidence in dictionaries; (agreement, recall, mass) of every held-out token that is known."""
    build = trace.build_documents()
    first, chosen, history = defaultdict(Counter), defaultdict(Counter), []
    scores, held_out = {}, []
    for token in range(len(trace.token_id)):
        document, position = trace.document[token], trace.position[token]
        if not history or history[-1][:2] != (document, position - 1):
            history = []
        history.append((document, position, trace.token_id[token]))
        key = tuple(entry[2] for entry in history[-order:])
        if len(key) < order:
            held_out += [] if build[document] else [(token, None)]
            continue
        if not build[document]:
            held_out.append((token, key))
            continue
        first[key][trace.experts[token, layer, 0]] += 1
        for expert, prob in zip(trace.experts[token, layer], trace.probs[token, layer], strict=True):
            chosen[key][expert] += float(prob / trace.probs[token, layer].sum())
    for token, key in held_out:
        if key is None or sum(first[key].values()) < min_count:
            continue
        experts = trace.experts[token, layer]
        best = min(first[key], key=lambda e: (-first[key][e], e))
        members = sorted(chosen[key], key=lambda e: (-chosen[key][e], e))[: trace.top_k]
        probs = trace.probs[token, layer]
        inside = [expert in members for expert in experts]
        scores[token] = best == experts[0], np.mean(inside), np.dot(inside, probs) / np.sum(probs)
    return scores, len(held_out)


def compare(trace, min_count, tolerance):
    found = predictability(trace, TraceSettings((1, 2, 3), min_count, permutations=0, samples=20))
    for layer in range(trace.num_layers):
        longest, shortest = {}, None
        for row, order in enumerate((1, 2, 3)):
            scores, held_out = slow_scores(trace, layer, order, min_count)
            longest |= scores
            shortest = shortest or scores
            assert found.held_out_tokens == held_out
            assert found.measures["coverage"].value[row, layer] == pytest.approx(len(scores) / held_out)
            slow = np.mean(list(scores.values()), axis=0)
            fast = [found.measures[name].value[row, layer] for name in ("agreement", "recall", "mass")]
            np.testing.assert_allclose(fast, slow, atol=tolerance)
            there = np.mean([shortest[token][0] for token in scores])
            assert found.measures["agreement_of_shortest"].value[row, layer] == pytest.approx(there, abs=tolerance)
        fast = [found.measures[name].value[-1, layer] for name in ("agreement", "recall", "mass")]
        np.testing.assert_allclose(fast, np.mean(list(longest.values()), axis=0), atol=tolerance)
        assert found.measures["coverage"].value[-1, layer] == pytest.approx(len(longest) / held_out)
    return found


def test_scores_are_those_of_dictionaries():
    trace = random_trace(3, tokens=4000, vocabulary=15)
    gaps = replace(trace, position=trace.position + (trace.position > 40) * 7)  # contexts begin anew after a gap
    found = compare(gaps, 5, 1e-6)
    assert found.build_tokens + found.held_out_tokens == 4000
    assert found.build_documents + found.held_out_documents == 40


def test_real_routing_scores_as_dictionaries_say(shared_data):
    path = shared_data / "traces" / "gpt_oss_20b.npz"
    header = json.loads(path.with_suffix(".json").read_text())
    with np.load(path) as file:
        rows = file["document"] < 40
        columns = {name: file[name][rows] for name in ("token", "document", "position", "experts", "probs")}
    trace = Trace(
        token_id=columns["token"],
        document=columns["document"],
        position=columns["position"],
        experts=columns["experts"][:, [0, 12]].astype(np.int16),
        probs=columns["probs"][:, [0, 12]].astype(np.float32),
        document_ids=tuple(f"document {i}" for i in range(40)),
        groups=tuple(header["document_group"][:40]),
        num_experts=header["num_experts"],
        probs_over="chosen",
    )
    found = compare(trace, 10, 0.01)
    agreement = found.measures["agreement"].value
    assert np.all(np.diff(agreement[:3, 0]) > -0.02) and agreement[0, 0] > 0.8  # the first layer is predicted well,
    assert np.all(agreement[:, 1] < agreement[:, 0])  # the middle one less


def test_what_a_trace_does_not_say_is_left_out():
    trace = random_trace(4)
    quick = TraceSettings(permutations=0, samples=10)
    everything = ["coverage", "agreement", "recall", "mass", "agreement_of_shortest"]
    assert list(predictability(trace, quick).measures) == everything
    bare = replace(trace, probs=None, probs_over=None, ranked=False)
    assert list(predictability(bare, quick).measures) == ["coverage", "recall", "recall_of_shortest"]
    one = replace(bare, experts=trace.experts[..., :1])  # one expert is the first, whatever the trace says
    found = predictability(one, quick)
    np.testing.assert_array_equal(found.measures["agreement"].value, found.measures["recall"].value)


def test_an_order_that_no_document_reaches_has_no_figures_and_no_coverage():
    settings = TraceSettings((101, 1, 1), permutations=19, samples=10)
    found = predictability(random_trace(5, tokens=6000), settings)
    assert settings.orders == (1, 101)
    assert np.all(found.measures["coverage"].value[1] == 0)
    agreement = found.measures["agreement"]
    for array in (agreement.value, agreement.low, agreement.null, agreement.null_low, agreement.p):
        assert np.isnan(array[1]).all() and np.isfinite(array[0]).all()
    np.testing.assert_array_equal(agreement.value[2], agreement.value[0])  # by the longest known key


def test_a_seed_repeats_the_figures():
    trace = random_trace(6, tokens=6000)
    first, second, other = (
        predictability(trace, TraceSettings(permutations=19, samples=50, seed=seed)) for seed in (0, 0, 1)
    )
    for name in ("low", "null_high", "p"):
        one, same, different = (getattr(found.measures["recall"], name) for found in (first, second, other))
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, different, equal_nan=True) or name == "p"


def test_known_keys():
    contexts = np.array([3, 3, 0, -1, 3, 0, 5])
    counted = np.array([True, True, True, True, False, False, True])
    np.testing.assert_array_equal(known_keys(contexts, counted, 2), [0, 0, -1, -1, 0, -1, -1])
    np.testing.assert_array_equal(known_keys(contexts, counted, 1), [1, 1, 0, -1, 1, 0, 2])


def test_errors():
    trace = random_trace(7)
    with pytest.raises(ValueError, match="1 documents are all on one side"):
        predictability(trace.of(np.arange(30) == 0), TraceSettings())
    with pytest.raises(
        ValueError, match=r"no context of 1, 2 ids occurs 5000 times in the build documents; .*min_count"
    ):
        predictability(trace, TraceSettings((1, 2), min_count=5000))
