"""Replay against a slow one in plain Python, against routing whose truth is known, and on a part of the real trace."""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from analysis.replay import main, report_of
from analysis.report.report import text
from analysis.traces import replay_steps, replaying
from analysis.traces import trace as trace_file
from analysis.traces.importing import import_npz
from analysis.traces.replay_steps import gate, unlimited_cache
from analysis.traces.replaying import replay
from analysis.traces.trace import Trace, TraceError
from varjax.config import LayerPolicy, VARConfig
from varjax.routing import CACHED, FAST, LEARNED, resolve
from varjax.table import build_table

LAYERS, TOP_K, EXPERTS = 2, 2, 6
SECONDS = 0.5  # per token
CONFIG = VARConfig(
    frequency_threshold=12,
    entropy_threshold=0.6,
    confidence_threshold=0.6,
    cache_size=4096,  # nothing is evicted
    cache_ttl_seconds=40.0,
    context_window_size=3,
    mass_threshold=0.75,
    default=LayerPolicy(experts_kept=None, use_answers=False, ngram_orders=(1, 2)),
)


def random_trace(seed: int = 1, documents: int = 130, vocabulary: int = 5, noise: float = 0.3, **changes) -> Trace:
    """Routing that depends on the last two ids, and on chance; positions with gaps."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 50, documents)
    document = np.repeat(np.arange(documents, dtype=np.int32), lengths)
    tokens = len(document)
    token = rng.integers(0, vocabulary, tokens).astype(np.int32)
    by_context = rng.dirichlet(np.full(EXPERTS, 0.3), (vocabulary, vocabulary, LAYERS))
    probs = (1 - noise) * by_context[token, np.roll(token, 1)] + noise * rng.dirichlet(
        np.full(EXPERTS, 0.3), (tokens, LAYERS)
    )
    experts = np.argsort(-probs, axis=-1)[..., :TOP_K]
    probs = np.take_along_axis(probs, experts, axis=-1)
    fields = {
        "token_id": token,
        "document": document,
        "position": np.cumsum(rng.choice([1, 3], tokens, p=[0.95, 0.05])).astype(np.int32),
        "experts": experts.astype(np.int16),
        "probs": (probs / probs.sum(axis=-1, keepdims=True)).astype(np.float32),
        "document_ids": tuple(f"text {i}" for i in range(documents)),
        "groups": ("g",) * documents,
        "num_experts": EXPERTS,
        "probs_over": "chosen",
        "origin": {"model": "dice"},
    }
    return Trace(**(fields | changes))


def pieces(trace: Trace):
    """The tokens of each stretch without a gap: (first token, ids)."""
    starts = [*np.flatnonzero(trace.begins()), len(trace.token_id)]
    return [(a, trace.token_id[a:b].tolist()) for a, b in pairwise(starts)]


def slow_table(trace: Trace, config: VARConfig):
    """{(layer, context): (experts, kept)} of the contexts that may answer."""
    rows = defaultdict(list)
    for begin, ids in pieces(trace):
        for at in range(len(ids)):
            for order in (1, 2):
                if at >= order - 1:
                    rows[tuple(ids[at + 1 - order : at + 1])].append(begin + at)
    table = {}
    for layer in range(LAYERS):
        for context, tokens in rows.items():
            probs = trace.probs[tokens, layer].astype(float)
            entropy = float(np.mean(-np.sum(probs * np.log(probs), axis=-1)))
            if len(tokens) < config.frequency_threshold or entropy > config.entropy_threshold:
                continue
            mean = np.zeros(EXPERTS)
            for chosen, p in zip(trace.experts[tokens, layer], probs, strict=True):
                mean[chosen] += p / len(tokens)
            best = np.argsort(-mean, kind="stable")[:TOP_K].tolist()
            first = mean[best[0]] / mean[best].sum()
            table[layer, context] = best, 1 if first >= config.mass_threshold else 2
    return table


def slow_replay(trace: Trace, config: VARConfig, step: int):
    """Per token and layer: tier, predicted experts, kept, and the age of a cached decision in tokens."""
    building = trace.build_documents(0.7)
    table, scored = slow_table(trace.of(building), config), trace.of(~building)
    decisions = {}  # (layer, context) -> (token clock, experts, first weight)
    out = []
    for begin, ids in pieces(scored):
        for start in range(0, len(ids), step):
            learned = {}
            now = begin + start
            for at in range(start, min(start + step, len(ids))):
                window = tuple(ids[at - 2 : at + 1]) if at >= 2 else None
                confident = {}
                for layer in range(LAYERS):
                    experts = scored.experts[begin + at, layer].tolist()
                    probs = scored.probs[begin + at, layer]
                    known = [c for c in (tuple(ids[at - 1 : at + 1]), (ids[at],)) if (layer, c) in table]
                    known = [c for c in known if len(c) <= at + 1]
                    held = decisions.get((layer, window))
                    if known:
                        out.append((FAST, *table[layer, known[0]], None))
                    elif held and (now - held[0]) * SECONDS < config.cache_ttl_seconds:
                        kept = 1 if held[2] >= config.mass_threshold else 2
                        out.append((CACHED, held[1], kept, now - held[0]))
                    else:
                        out.append((LEARNED, [], TOP_K, None))
                        if probs[0] >= np.float32(config.confidence_threshold) and window:
                            confident[layer] = now, experts, probs[0] / probs.sum()
                if confident:
                    learned[window] = confident  # of equal contexts the last counts
            decisions |= {(layer, w): d for w, several in learned.items() for layer, d in several.items()}
    return scored, out


@pytest.mark.parametrize("step", [8, 1])
def test_the_replay_equals_a_slow_one(step):
    trace = random_trace(1)
    found = replay(trace, CONFIG, step=step, seconds_per_token=SECONDS)
    scored, expected = slow_replay(trace, CONFIG, step)
    sums = {
        name: np.zeros((LAYERS, 3)) for name in ("tokens", "active", "agreements", "recalled", "mass", "experts_kept")
    }
    sums["kept_chosen"] = np.zeros((LAYERS, 3))
    aged, aged_agreements = np.zeros((2, LAYERS, len(found.age_edges)))
    for n, (tier, predicted, kept, age) in enumerate(expected):
        token, layer = divmod(n, LAYERS)
        chosen, probs = scored.experts[token, layer].tolist(), scored.probs[token, layer]
        agrees = tier == LEARNED or predicted[0] == chosen[0]
        caught = [p for e, p in zip(chosen, probs, strict=True) if e in predicted]
        sums["tokens"][layer, tier] += 1
        sums["active"][layer, tier] += kept
        sums["agreements"][layer, tier] += agrees
        sums["recalled"][layer, tier] += len(caught)
        sums["mass"][layer, tier] += sum(caught) / probs.sum()
        sums["experts_kept"][layer, tier] += min(kept, len(predicted))
        sums["kept_chosen"][layer, tier] += len(set(predicted[:kept]) & set(chosen))
        if tier == CACHED:
            bucket = max(i for i, edge in enumerate(found.age_edges) if age >= edge)
            aged[layer, bucket] += 1
            aged_agreements[layer, bucket] += agrees
    assert (sums["tokens"] > 0).all() and found.tokens == len(scored.token_id)
    assert (sums["agreements"] < sums["tokens"])[:, :2].any(axis=0).all() and (aged > 0).sum() > 4
    for name, values in sums.items():
        np.testing.assert_allclose(getattr(found.sums, name), values, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found.sums.aged, aged)
    np.testing.assert_array_equal(found.sums.aged_agreements, aged_agreements)


@pytest.mark.parametrize(("step", "changes"), [(1, {}), (8, {"entropy_threshold": 0.0, "cache_layers": (1,)}), (8, {})])
def test_an_unlimited_cache_is_one_that_neither_evicts_nor_expires(step, changes):
    config = replace(CONFIG, cache_ttl_seconds=1e9, **changes)
    found = replay(random_trace(1), config, step=step, seconds_per_token=SECONDS)
    np.testing.assert_array_equal(found.sums.unlimited, found.sums.tokens[:, CACHED])
    np.testing.assert_array_equal(found.sums.unlimited_agreements, found.sums.agreements[:, CACHED])
    assert found.sums.unlimited[1] > 50 and (found.sums.unlimited_agreements < found.sums.unlimited)[1]
    assert (found.sums.tokens[:, FAST] > 0).any() == (not changes)

    short = replay(random_trace(1), replace(config, cache_ttl_seconds=20.0), step=step, seconds_per_token=SECONDS)
    np.testing.assert_array_equal(short.sums.unlimited, found.sums.unlimited)
    assert short.sums.tokens[1, CACHED] < short.sums.unlimited[1]


def test_without_a_cached_tier_there_is_no_unlimited_one():
    trace = random_trace(1)
    config = replace(CONFIG, cache_size=0)
    hits, agreements = unlimited_cache(trace, np.zeros((len(trace.token_id), LAYERS), bool), config, 8)
    assert hits.tolist() == agreements.tolist() == [0, 0]
    found = replay(trace, config, step=8)
    assert not found.sums.tokens[:, CACHED].any() and found.rates()["mispredictions_by_age"] == []
    (section,) = report_of(found).sections
    names = [column.name for column in section.tables[1].columns]
    assert (section.name, names[1:5]) == ("tiers", [f"fast: {one}" for one in ("agreement", "recall", "kept", "mass")])


def settled_trace(kind: str) -> Trace:
    """The token alone decides the experts, in every layer."""
    choice = {"probs": None, "probs_over": None} if kind != "probs" else {}
    trace = random_trace(1, ranked=kind != "unranked", **choice)
    rng = np.random.default_rng(1)
    by_token = rng.permuted(np.tile(np.arange(EXPERTS), (5, LAYERS, 1)), axis=-1)[..., :TOP_K]
    return replace(trace, experts=by_token[trace.token_id].astype(np.int16))


@pytest.mark.parametrize("kind", ["probs", "ranked", "unranked"])
def test_settled_routing_is_foretold_entirely(kind):
    """Layer 0 by the table, layer 1, where no key is frequent enough, by the cache."""
    policy = CONFIG.default
    rare = replace(policy, frequency_threshold=10_000)
    config = replace(CONFIG, entropy_threshold=9.0, mass_threshold=1.0, layers={1: rare})
    found = replay(settled_trace(kind), config, step=8)
    assert found.keys == 5 + 25
    fast, cached = found.rates(0), found.rates(1)
    assert fast["shares"] == {"fast": 1.0, "cached": 0.0, "learned": 0.0}
    assert cached["shares"]["fast"] == 0.0 and cached["shares"]["cached"] > 0.05
    for rates in (fast["fast"], cached["cached"], found.rates()["fast"]):
        assert rates["agreement"] == (None if kind == "unranked" else 1.0)
        assert rates["recall"] == rates["experts_kept"] == 1.0
        assert rates["mass"] == (pytest.approx(1) if kind == "probs" else None)
        assert rates["experts_per_token"] == TOP_K
    assert fast["cached"]["agreement"] is None and fast["experts_per_token"] == TOP_K
    wrong = [bucket["mispredictions"] for bucket in cached["mispredictions_by_age"]]
    assert wrong and set(wrong) == {None if kind == "unranked" else 0.0}


def test_thresholds_that_a_trace_cannot_judge_are_lifted():
    strict = replace(CONFIG, entropy_threshold=0.0, confidence_threshold=1.0, mass_threshold=0.1)
    strict = replace(strict, layers={1: LayerPolicy(experts_kept=1, gate_ratio=1.0, entropy_threshold=0.1)})
    judged = replay(settled_trace("probs"), strict, step=8)
    assert judged.keys == 0 and not judged.sums.tokens[:, CACHED].any()
    lifted = replay(settled_trace("ranked"), strict, step=8)
    assert lifted.rates()["shares"]["fast"] == 1.0
    assert [lifted.rates(layer)["experts_per_token"] for layer in (0, 1)] == [2.0, 1.0]
    assert (lifted.config.mass_threshold, lifted.config.confidence_threshold) == (1.0, 0.0)


def test_sigmoid_scores_do_not_make_experts_drop_out(tmp_path):
    """Four scores that hardly differ: the first two pass a mass of 0.9 before they are divided by their sum."""
    rng = np.random.default_rng(0)
    tokens, layers = 2000, 2
    experts = rng.permuted(np.tile(np.arange(8), (tokens, layers, 1)), axis=-1)[..., :4]
    arrays = {"token": rng.integers(0, 20, tokens), "experts": experts, "document": np.arange(tokens) // 50}
    np.savez(tmp_path / "log.npz", **arrays, probs=0.5 + 0.1 * rng.random(experts.shape))
    fields = {"num_layers": layers, "num_experts": 8, "top_k": 4, "scores": "sigmoid"}
    (tmp_path / "log.json").write_text(json.dumps(fields))
    policy = LayerPolicy(experts_kept=None, use_answers=False)
    config = VARConfig(entropy_threshold=9.0, confidence_threshold=0.2, mass_threshold=0.9, default=policy)
    found = replay(import_npz(tmp_path / "log.npz"), config)
    rates = found.rates()
    assert rates["shares"]["fast"] > 0.9 and rates["experts_per_token"] == 4
    assert "4.00 of 4 experts per token" in text(report_of(found)) and "a definition" in " ".join(found.notes)


def test_without_answers_a_tolerance_lets_all_run_and_order_0_plans_every_token():
    policies = {
        0: LayerPolicy(experts_kept=None, tolerance=0.5, ngram_orders=(0, 1)),
        1: LayerPolicy(experts_kept=TOP_K, use_answers=False, gate_mass=0.01, ngram_orders=(0,)),
    }
    trace, config = settled_trace("probs"), replace(CONFIG, layers=policies, cache_size=0)
    found = replay(trace, config, step=8)
    assert found.config.policy(0).experts_kept == TOP_K
    for layer, experts in ((0, TOP_K), (1, 1)):
        rates = found.rates(layer)
        assert rates["shares"]["fast"] == 1.0 and rates["experts_per_token"] == experts
    assert found.rates(1)["fast"]["recall"] == 0.0  # a key of every token predicts nothing
    assert replay(settled_trace("ranked"), config, step=8).rates(1)["experts_per_token"] == TOP_K  # nothing to judge by


NOTES = {
    "answers and tolerances are left out": ({}, {"default": LayerPolicy()}),
    "over the 2 chosen experts: entropy is at most ln 2 = 0.69": ({}, {}),
    "confidence is exact, entropy is the least": ({"probs_over": "all"}, {}),
    "no probabilities: .* lifted, .* how often and how early they": ({"probs": None, "probs_over": None}, {}),
    "not ranked: there is no agreement": ({"probs": None, "probs_over": None, "ranked": False}, {}),
    "no context occurs 10000 times": ({}, {"frequency_threshold": 10_000}),
}


@pytest.mark.parametrize("note", NOTES)
def test_what_gave_way_is_said(note):
    of_trace, of_config = NOTES[note]
    trace = random_trace(1, **of_trace)
    config, notes = replaying._applicable(replace(CONFIG, **of_config), trace)
    stats, more = replaying._table_statistics(replaying._with_stand_ins(trace), config)
    build_table(config, stats, top_k=TOP_K)  # which needs a key, even where no context is frequent enough
    assert any(re.search(note, one) for one in notes + more)
    assert not any(policy.use_answers for policy in (config.policy(0), config.policy(1)))


def test_a_table_has_no_more_keys_than_fit(monkeypatch):
    monkeypatch.setattr(replaying, "MAX_KEYS", 7)
    stats, notes = replaying._table_statistics(random_trace(1), CONFIG)
    assert len(stats.keys) == 7 and notes == ["the table holds the 7 most frequent keys only"]


def test_a_gate_that_says_what_the_trace_says():
    experts = jnp.asarray([[[4, 1, 3], [0, 5, 2]], [[2, 0, 1], [5, 4, 3]]], jnp.int16)
    probs = jnp.asarray([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [[0.125] * 3, [0.5, 0.25, 0.125]]], jnp.float32)
    for over_all in (False, True):
        full = gate(experts, probs, EXPERTS, over_all)
        assert full.shape == (2, 2, EXPERTS)
        routing, _ = resolve(full, 3, None)
        np.testing.assert_array_equal(routing.experts, np.moveaxis(np.asarray(experts), 1, 0))
        np.testing.assert_array_equal(full.max(axis=-1), np.asarray(probs)[..., 0].T)  # confidence is exact
        others = np.sort(np.asarray(full), axis=-1)[..., :3]
        rest = np.array([[0.0, 0.125], [0.0, 0.125 / 3]]) if over_all else np.zeros((2, 2))
        np.testing.assert_allclose(others, np.broadcast_to(rest[..., None], others.shape), rtol=1e-5)


def test_many_steps_and_another_policy_compile_once():
    trace, step = random_trace(1), 8
    before = replay_steps._advance._cache_size()
    first = replay(trace, CONFIG, step=step)
    compiled = replay_steps._advance._cache_size()
    assert first.tokens > step * replay_steps._AT_ONCE and compiled <= before + 1
    changes = {
        "confidence_threshold": 0.5,
        "cache_ttl_seconds": 1e9,
        "layers": {1: LayerPolicy(experts_kept=1, ngram_orders=(2,))},
    }
    second = replay(trace, replace(CONFIG, **changes), step=step)
    assert replay_steps._advance._cache_size() == compiled
    assert second.sums.tokens[:, CACHED].sum() > first.sums.tokens[:, CACHED].sum()


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        (replace(CONFIG, enable_var=False), {}, ValueError, "nothing to replay"),
        (CONFIG, {"step": 0}, ValueError, "step=0"),
        (CONFIG, {"seconds_per_token": math.inf}, ValueError, "seconds_per_token=inf"),
        (CONFIG, {"build_share": 1.0}, ValueError, r"build_share=1\.0"),
        (CONFIG, {"build_share": 1e-9}, TraceError, "130 documents with tokens, of which 0 build"),
        (replace(CONFIG, layers={7: None}), {}, ValueError, "layer 7: the statistics have only layers 0 to 1"),
        (replace(CONFIG, default=LayerPolicy(experts_kept=3)), {}, ValueError, "runs only 2 experts"),
    ],
)
def test_what_cannot_be_replayed_is_refused(config, settings, error, message):
    with pytest.raises(error, match=message):
        replay(random_trace(1), config, **settings)


def run_main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["replay", *map(str, arguments)])
    main()


def test_the_command_writes_report_numbers_and_figures(tmp_path, monkeypatch, capsys):
    trace_file.write(tmp_path / "trace.parquet", random_trace(1))
    CONFIG.save(tmp_path / "config.json")
    given = ("--trace", tmp_path / "trace.parquet", "--config", tmp_path / "config.json", "--step", 8)
    run_main(monkeypatch, *given, "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    found = replay(random_trace(1), CONFIG, step=8)
    assert text(report_of(found)) in printed and "dice: " in printed
    assert all(note in " ".join(printed.split()) for note in found.notes)
    saved = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert {name: saved[name] for name in found.fields()} == json.loads(json.dumps(found.fields()))
    assert saved["provenance"]["config"] == json.loads(CONFIG.to_json())
    assert len(saved["layers"]) == LAYERS and saved["notes"]
    names = {f"{name}.{kind}" for name in ("replay_tiers", "replay_mispredictions") for kind in ("png", "pdf")}
    names |= {"replay.json", "replay.txt", "replay.html", "index.html"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_a_trace_without_ranks_is_drawn_too(tmp_path, monkeypatch, capsys):
    trace_file.write(tmp_path / "trace.parquet", settled_trace("unranked"))
    CONFIG.save(tmp_path / "config.json")
    given = ("--trace", tmp_path / "trace.parquet", "--config", tmp_path / "config.json", "--step", 8)
    run_main(monkeypatch, *given, "--output", tmp_path / "out")
    assert "the experts are not ranked" in " ".join(capsys.readouterr().out.split())


def test_bad_input_ends_in_one_message(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*none\.parquet: no such file"):
        run_main(monkeypatch, "--trace", tmp_path / "none.parquet", "--output", tmp_path)


def test_a_part_of_the_real_trace(real_trace):
    """Known of gpt-oss-20b: the first layer is far more predictable than the middle, longer contexts predict better."""
    some = real_trace.of(np.arange(615) < 100)
    layers = [0, 0, 12, 12]  # each once with order 1, once with order 2
    some = replace(some, experts=some.experts[:, layers], probs=some.probs[:, layers])
    shorter, longer = (LayerPolicy(experts_kept=2, use_answers=False, ngram_orders=(order,)) for order in (1, 2))
    config = VARConfig(
        frequency_threshold=10,
        entropy_threshold=9.0,
        confidence_threshold=0.3,
        context_window_size=3,
        default=shorter,
        layers={1: longer, 3: longer},
    )
    found = replay(some, config)
    assert found.tokens + found.build_tokens == len(some.token_id)
    first, first_longer, middle, middle_longer = (found.rates(layer) for layer in range(4))
    assert 0.6 < first["shares"]["fast"] < 0.8
    assert 0.75 < first["fast"]["agreement"] < 0.95 and first["fast"]["mass"] > 0.85
    assert 0.3 < middle["fast"]["agreement"] < 0.6
    for order_1, order_2 in ((first, first_longer), (middle, middle_longer)):
        assert order_2["fast"]["agreement"] > order_1["fast"]["agreement"]
        assert order_2["shares"]["fast"] < order_1["shares"]["fast"]
        for rates in (order_1, order_2):
            assert rates["unlimited_cache"]["share"] >= rates["shares"]["cached"] > 0


def test_the_constant_table_is_the_layers_busiest_experts():
    trace = random_trace(3)
    building = trace.build_documents()
    ours, theirs = trace.of(building), trace.of(~building)
    agreements, recalled = replaying._constant_table(ours, theirs)
    for layer in range(LAYERS):
        firsts = ours.experts[:, layer, 0].tolist()
        chosen = ours.experts[:, layer].ravel().tolist()
        busiest = sorted(range(EXPERTS), key=lambda e: (-chosen.count(e), e))[:TOP_K]
        first = max(range(EXPERTS), key=lambda e: (firsts.count(e), -e))
        assert agreements[layer] == theirs.experts[:, layer, 0].tolist().count(first)
        assert recalled[layer] == sum(theirs.experts[:, layer].ravel().tolist().count(e) for e in busiest)
