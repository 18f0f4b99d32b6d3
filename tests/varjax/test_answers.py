"""Means per key and expert against a slow loop; windows, parts, precision, and the file."""

import dataclasses
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from varjax import answersfile
from varjax.answers import Answers, absorb, bytes_a_pair, emptied, init, merge, pruned, update
from varjax.keys import ANY
from varjax.routing import FAST, NO_ANSWER, LayerAnswers, LayerRules, Plan, Routing, resolve
from varjax.shrinkage import shrunk

LAYERS, BATCH, LENGTH, TOP_K, EXPERTS, HIDDEN, ORDERS = 3, 2, 5, 2, 4, 3, 2
KEYS = np.array([[ANY, 1], [ANY, 2], [ANY, 3], [1, 2], [2, 3], [3, 3]], np.int32)
COLLECTED = (0, 2)
EMPTY = Answers.empty(KEYS, COLLECTED, EXPERTS, HIDDEN)  # not to be absorbed into
SUMMED = ("count", "mass", "m2")


def random_batch(rng, rows=7):
    rows = rng.integers(-1, rows, size=(ORDERS, BATCH, LENGTH)).astype(np.int32)
    shape = (LAYERS, BATCH, LENGTH)
    experts = np.argsort(rng.random((*shape, EXPERTS)))[..., :TOP_K]
    experts[rng.random(experts.shape) < 0.1] = EXPERTS  # slots that run nothing
    weights = -np.sort(-rng.dirichlet(np.ones(TOP_K), size=shape))
    spoken = weights[list(COLLECTED), ..., None]
    outputs = (spoken * rng.normal(size=(*spoken.shape[:-1], HIDDEN))).astype(np.float32)
    outputs[rng.random(outputs.shape[:-1]) < 0.05] = np.nan
    routing = Routing(jnp.asarray(experts, jnp.int32), jnp.asarray(weights, jnp.float32))
    return rows, outputs, routing, rng.random((BATCH, LENGTH)) < 0.8


def collected(batches, keys=KEYS):
    answers = Answers.empty(keys, COLLECTED, EXPERTS, HIDDEN)
    sums = init(answers)
    for batch in batches:
        sums = update(sums, *batch)
    return absorb(sums, answers)


def slow_answers(batches):
    """{(layer, row, expert): (count, mass, m2, mean)} from the definitions, and the slots left out in each layer."""
    seen, nonfinite = defaultdict(list), np.zeros(len(COLLECTED), np.int64)
    for rows, outputs, routing, mask in batches:
        experts, weights = np.asarray(routing.experts), np.asarray(routing.weights, np.float64)
        for a, layer in enumerate(COLLECTED):
            for (b, t), j in ((at, j) for at in np.argwhere(mask) for j in range(TOP_K)):
                if (expert := experts[layer, b, t, j]) == EXPERTS:
                    continue
                if not np.isfinite(outputs[a, b, t, j]).all():
                    nonfinite[a] += 1
                    continue
                for row in rows[:, b, t]:
                    if row >= 0:
                        seen[a, row, expert].append((weights[layer, b, t, j], outputs[a, b, t, j].astype(np.float64)))
    found = {}
    for pair, occurrences in seen.items():
        w, wf = (np.array(column) for column in zip(*occurrences, strict=True))
        mass = (w * w).sum()
        mean = (w[:, None] * wf).sum(0) / mass  # brings the sum of |w f - w r|^2 to its minimum
        found[pair] = len(w), mass, np.square(wf - w[:, None] * mean).sum(), mean
    return found, nonfinite


def assert_answers(answers, expected):
    """`answers` say what {(layer, row, expert): ...} says, and of all other pairs nothing."""
    for a, row, expert in np.ndindex(answers.entry.shape):
        n = answers.entry[a, row, expert]
        count, mass, m2, mean = expected.get((a, row, expert), (0, 0.0, 0.0, np.zeros(HIDDEN)))
        if n == NO_ANSWER:
            assert count == 0
            continue
        assert answers.count[a, n] == count
        np.testing.assert_allclose(answers.mass[a, n], mass, rtol=1e-5)
        np.testing.assert_allclose(answers.m2[a, n], m2, rtol=1e-4, atol=1e-5 * (1 + mass * mean @ mean))
        np.testing.assert_allclose(answers.mean[a, n], mean, rtol=1e-5, atol=1e-5 * np.sqrt(m2 / (mass or 1)) + 1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), windows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_answers_equal_the_slow_loop_however_the_windows_fall(seed, windows):
    rng = np.random.default_rng(seed)
    answers, batches = Answers.empty(KEYS, COLLECTED, EXPERTS, HIDDEN), []
    sums = init(answers)
    assert sums.layers == COLLECTED
    for size in windows:
        for _ in range(size):
            batches.append(random_batch(rng))
            sums = update(sums, *batches[-1])
        answers = absorb(sums, answers)
        sums = init(answers)
    expected, nonfinite = slow_answers(batches)
    assert_answers(answers, expected)
    assert_answers(pruned(answers), expected)
    assert (pruned(answers).entry != NO_ANSWER).sum() == len(expected)
    np.testing.assert_array_equal(pruned(answers).nonfinite, nonfinite)


def test_the_key_of_order_0_comes_first_and_room_is_for_every_pair():
    assert EMPTY.keys[0].tolist() == [ANY, ANY] and EMPTY.ngram_orders == (0, 1, 2)
    assert sorted(EMPTY.entry[1].ravel()) == list(range(7 * EXPERTS))
    assert Answers.empty(KEYS[:0], (1,), EXPERTS, HIDDEN).ngram_orders == (0,)


def test_only_the_pairs_asked_for_have_room():
    rng = np.random.default_rng(4)
    pairs = rng.random((len(COLLECTED), len(KEYS), EXPERTS)) < 0.3
    some = Answers.empty(KEYS, COLLECTED, EXPERTS, HIDDEN, pairs)
    np.testing.assert_array_equal(some.entry[:, 1:] != NO_ANSWER, pairs)
    assert (some.entry[:, 0] != NO_ANSWER).all()
    for entry in some.entry:  # numbered without a gap
        assert sorted(entry[entry != NO_ANSWER]) == list(range((entry != NO_ANSWER).sum()))
    assert some.count.shape[1] == EXPERTS + pairs.sum((1, 2)).max()

    batches = [random_batch(rng) for _ in range(2)]
    sums = init(some)
    for batch in batches:
        sums = update(sums, *batch)
    every, found = collected(batches), absorb(sums, some)
    for a, row, expert in np.argwhere(some.entry != NO_ANSWER):
        ours, theirs = found.entry[a, row, expert], every.entry[a, row, expert]
        assert found.count[a, ours] == every.count[a, theirs]
        np.testing.assert_allclose(found.mean[a, ours], every.mean[a, theirs], rtol=1e-6)


def test_a_window_is_joined_in_the_same_arrays(monkeypatch):
    monkeypatch.setattr("varjax.answers._JOINED", 5)  # in many parts
    rng = np.random.default_rng(9)
    answers, batches = Answers.empty(KEYS, COLLECTED, EXPERTS, HIDDEN), [random_batch(rng) for _ in range(3)]
    for batch in batches:
        kept = absorb(update(init(answers), *batch), answers)
        assert kept.mean is not answers.mean  # only where they are given up
        found = absorb(update(init(answers), *batch), answers, donate=True)
        assert found.mean is answers.mean
        np.testing.assert_array_equal(found.mean, kept.mean)
    assert_answers(answers, slow_answers(batches)[0])


def test_an_update_copies_no_means():
    """XLA copies them where something else still reads the old ones, which takes most of the time."""
    compiled = update.lower(init(EMPTY), *random_batch(np.random.default_rng(0))).compile().as_text()
    shape = ",".join(map(str, EMPTY.mean.shape))
    assert f"f32[{shape}]" in compiled and not re.search(rf"= f32\[{shape}\]\S* copy\(", compiled)


def test_bytes_a_pair_are_those_of_the_sums():
    """As many keys as pairs, each key with one."""
    pairs = np.zeros((len(COLLECTED), len(KEYS), EXPERTS), bool)
    pairs[..., 0] = True
    sums = jax.eval_shape(init, Answers.empty(KEYS, COLLECTED, EXPERTS, HIDDEN, pairs))
    one = bytes_a_pair(len(COLLECTED), EXPERTS, HIDDEN)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in (sums.entry, sums.mean, sums.mass, sums.m2, sums.count))
    room = EXPERTS + len(KEYS)
    assert held == room * one - 4 * len(COLLECTED) * EXPERTS * (EXPERTS - 1)  # order 0 has one row for all experts


@pytest.mark.parametrize("noise", [0.001, 0.01, 1.0])
def test_a_hot_pair_loses_no_digits_over_many_tokens(noise):
    """Nearly equal summands round the same way each time: a plain float32 sum is off in its third digit by then."""
    rng, batches, tokens = np.random.default_rng(0), 64, 2048
    answers = Answers.empty(KEYS[:0], (0,), 1, HIDDEN)
    sums, seen = init(answers), []
    for _ in range(batches):
        weight = np.float32(rng.uniform(0.3, 0.3 + noise / 10, size=(1, 1, tokens, 1)))
        outputs = np.float32(
            weight[..., None] * (np.array([3.0, -1.0, 10.0]) + noise * rng.normal(size=(*weight.shape, HIDDEN)))
        )
        routing = Routing(jnp.zeros(weight.shape, jnp.int32), jnp.asarray(weight))
        sums = update(sums, jnp.zeros((1, 1, tokens), jnp.int32), outputs, routing, np.ones((1, tokens), bool))
        seen.append(np.concatenate([weight[..., None], outputs], axis=-1).reshape(-1, 1 + HIDDEN).astype(np.float64))
    w, wf = np.split(np.concatenate(seen), [1], axis=1)
    answers = absorb(sums, answers)
    mean = (w * wf).sum(0) / (w * w).sum()
    np.testing.assert_allclose(answers.mean[0, 0], mean, rtol=0, atol=1e-5 * np.linalg.norm(mean))
    deviation = np.sqrt(np.square(wf - w * mean).sum() / (w * w).sum())
    assert np.sqrt(answers.m2[0, 0] / answers.mass[0, 0]) == pytest.approx(deviation, rel=2e-3, abs=1e-4)


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(7)
    first, second = ([random_batch(rng) for _ in range(2)] for _ in range(2))
    expected, nonfinite = slow_answers(first + second)
    parts = [collected(part) for part in (first, second)]
    for merged in (merge(*parts), merge(*map(pruned, parts)), merge(parts[0], pruned(parts[1]))):
        assert_answers(merged, expected)
        np.testing.assert_array_equal(merged.nonfinite, nonfinite)
    assert (merge(*map(pruned, parts)).entry != NO_ANSWER).sum() == len(expected)  # nor does it make up pairs


def test_a_key_that_one_part_lacks_keeps_the_others_answers():
    rng = np.random.default_rng(8)
    batch = random_batch(rng, rows=4)
    fewer, more = collected([batch], KEYS[[2, 0, 1]]), collected([random_batch(rng)])
    merged = merge(pruned(fewer), pruned(more))
    np.testing.assert_array_equal(merged.keys, [[ANY, ANY], *KEYS[[2, 0, 1, 3, 4, 5]]])
    place = {tuple(key): row for row, key in enumerate(merged.keys.tolist())}
    for key, row in ((tuple(key), row) for row, key in enumerate(more.keys.tolist()) if key[0] != ANY):
        for a, expert in np.ndindex(len(COLLECTED), EXPERTS):
            n, there = more.entry[a, row, expert], merged.entry[a, place[key], expert]
            if more.count[a, n]:
                np.testing.assert_array_equal(merged.mean[a, there], more.mean[a, n])
                assert merged.m2[a, there] == more.m2[a, n]
            else:
                assert there == NO_ANSWER
    for name in SUMMED[:2]:
        np.testing.assert_allclose(
            getattr(merged, name).sum(), getattr(fewer, name).sum() + getattr(more, name).sum(), rtol=1e-12
        )


@pytest.mark.parametrize(("kept", "gate_ratio"), [(0, 0.0), (1, 0.0), (2, 0.6)])
def test_kept_experts_and_answers_are_the_full_output_where_each_pair_occurred_once(kept, gate_ratio):
    rng = np.random.default_rng(0)
    rows = np.arange(1, len(EMPTY.keys), dtype=np.int32).reshape(1, 1, -1)
    shape = rows.shape[1:]
    probs = jnp.asarray(rng.dirichlet(np.full(EXPERTS, 0.5), size=shape), jnp.float32)
    learned, _ = resolve(probs, TOP_K, None)
    outputs = rng.normal(size=(1, *shape, TOP_K, HIDDEN)).astype(np.float32)
    answers = Answers.empty(KEYS, (0,), EXPERTS, HIDDEN)
    sums = update(init(answers), rows, outputs, jax.tree.map(lambda leaf: leaf[None], learned), np.ones(shape, bool))
    answers = pruned(absorb(sums, answers))

    rows_ = shrunk(answers, 0, 0.0).answers
    known = LayerAnswers(jnp.asarray(answers.entry[0]), jnp.zeros(len(rows_)), jnp.asarray(rows_), None)
    rules = jax.tree.map(lambda leaf: leaf[0], LayerRules.neutral(1))
    plan = Plan(
        tier=jnp.full(shape, FAST, jnp.int8),
        experts_kept=jnp.full(shape, kept, jnp.int8),
        row=jnp.asarray(rows[0]),
        routing=Routing.unused((*shape, TOP_K), EXPERTS),
        rules=LayerRules(**vars(rules) | {"use_answers": jnp.array(True), "gate_ratio": jnp.float32(gate_ratio)}),
    )
    executed, dropped = resolve(probs, TOP_K, dataclasses.replace(plan, answers=known))
    runs = np.asarray(executed.experts) < EXPERTS
    assert runs.sum() < runs.size and (kept == 0) == (runs.sum() == 0)
    whole = (outputs[0] * runs[..., None]).sum(-2) + known.total(dropped)
    np.testing.assert_allclose(whole, outputs[0].sum(-2), rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"need the expert outputs of layers \(0, 2\), got 1"):
        rows, outputs, routing, mask = random_batch(np.random.default_rng(0))
        update(init(EMPTY), rows, outputs[:1], routing, mask)
    for other in (
        Answers.empty(KEYS, (0,), EXPERTS, HIDDEN),
        Answers.empty(KEYS, COLLECTED, 2, HIDDEN),
        Answers.empty(KEYS, COLLECTED, EXPERTS, 7),
    ):
        with pytest.raises(ValueError, match="same layers, experts and hidden size"):
            merge(EMPTY, other)
    distilled = Answers(**vars(EMPTY) | {"distilled": True})
    with pytest.raises(ValueError, match="before they are distilled"):
        merge(distilled, distilled)


def test_answers_of_no_occurrence_can_be_pruned_and_merged():
    nothing = pruned(EMPTY)
    assert (nothing.entry == NO_ANSWER).all() and nothing.count.shape == (2, 1)
    merged = merge(nothing, nothing)
    assert (merged.entry == NO_ANSWER).all() and not merged.count.any()


@pytest.fixture
def some() -> Answers:
    return pruned(collected([random_batch(np.random.default_rng(3))]))


def test_the_file_gives_back_what_was_written(some, tmp_path):
    path = tmp_path / "run" / "stats.answers.safetensors"
    answersfile.write(path, some, {"fingerprint": "abc", "layers": [1]})
    answers, meta = answersfile.read(path)
    assert meta == {"fingerprint": "abc", "layers": [1]}
    assert (answers.layers, answers.distilled) == (COLLECTED, False)
    for name in ("keys", "entry", "nonfinite", *SUMMED):
        np.testing.assert_array_equal(getattr(answers, name), getattr(some, name))
        assert getattr(answers, name).dtype == getattr(some, name).dtype
    np.testing.assert_array_equal(answers.mean, some.mean.astype(np.float32))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_bad_file_is_named_with_its_fault(some, tmp_path):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(FileNotFoundError, match="collect the answers first"):
        answersfile.read(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a readable safetensors file"):
        answersfile.read(path)
    save_file({"keys": KEYS}, path)
    with pytest.raises(ValueError, match=r"bad\.safetensors: expected answers of format 4, found None"):
        answersfile.read(path)
    save_file({"keys": KEYS}, path, metadata={"varjax": '{"format": 1, "rules": [[0, 1, 0.0]]}'})
    with pytest.raises(ValueError, match="expected answers of format 4, found 1"):
        answersfile.read(path)
    save_file({"keys": KEYS}, path, metadata={"varjax": '{"format": 3}'})
    with pytest.raises(ValueError, match="the header lacks its layers"):
        answersfile.read(path)

    answersfile.write(path, some, {})
    good, header = load_file(path), {"varjax": '{"format": 3, "answer_layers": [0, 2], "distilled": false}'}
    save_file({"keys": KEYS}, path, metadata=header)
    with pytest.raises(
        ValueError, match="count, entry, inputs, m2, mass, mean, nonfinite, outliers, typical are missing"
    ):
        answersfile.read(path)
    for name, tensor, fault in (
        ("mass", good["mass"][:1], r"tensor mass is float64 \[1, "),
        ("mean", good["mean"].astype(np.float64), r"tensor mean is float64 .*, expected float32"),
        ("entry", good["entry"] + np.int32(good["count"].shape[1]), "names answers beyond the"),
        ("entry", good["entry"] - np.int32(1), "names answers beyond the"),
    ):
        save_file({**good, name: tensor}, path, metadata=header)
        with pytest.raises(ValueError, match=fault):
            answersfile.read(path)
    save_file(good, path, metadata=header)
    with pytest.raises(ValueError, match="its checksum is missing or unreadable, so the file was damaged; restore"):
        answersfile.read(path)
    with pytest.raises(ValueError, match="the file itself says answer_layers"):
        answersfile.write(path, some, {"answer_layers": []})


def test_the_second_batch_compiles_nothing():
    rng = np.random.default_rng(5)
    sums = update(update(init(EMPTY), *random_batch(rng)), *random_batch(rng))  # of the host first, then of the device
    before = update._cache_size()
    update(sums, *random_batch(rng))
    assert update._cache_size() == before


def test_outliers_are_left_out_and_counted():
    """Outputs a hundred times larger, at the first token and at another one, leave the means as if they had not run."""
    rng = np.random.default_rng(8)
    rows, outputs, routing, mask = random_batch(rng)
    mask[:] = True
    outputs = np.nan_to_num(outputs)
    experts = np.array(routing.experts)
    experts[experts == EXPERTS] = 0
    routing = Routing(jnp.asarray(experts), routing.weights)
    massive, places = outputs.copy(), ([0, 0], [0, 3])  # of the first collected layer
    massive[0][places] *= 1000
    without = experts.copy()
    without[COLLECTED[0]][places] = EXPERTS
    expected = collected([(rows, outputs, Routing(jnp.asarray(without), routing.weights), mask)])
    found = collected([(rows, massive, routing, mask)])
    assert found.outliers.tolist() == [[TOP_K, TOP_K], [0, 0]] and not expected.outliers.any()
    for name in ("count", "mass", "m2", "mean"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-12)
    norms = np.linalg.norm(massive[0], axis=-1) / np.asarray(routing.weights)[COLLECTED[0]]
    assert found.typical[0] == pytest.approx(np.median(norms), rel=1e-5)
    both = merge(found, expected)
    np.testing.assert_array_equal(both.outliers, found.outliers)
    np.testing.assert_array_equal(both.typical, found.typical)


def test_what_is_typical_is_settled_by_the_first_batch():
    rng = np.random.default_rng(9)
    first, second = random_batch(rng), random_batch(rng)
    second = (second[0], second[1] * 3, *second[2:])
    alone, both = collected([first]), collected([first, second])
    np.testing.assert_array_equal(alone.typical, both.typical)
    again = absorb(update(init(alone), *second), alone)
    np.testing.assert_array_equal(again.typical, alone.typical)


def test_windows_are_emptied_on_their_devices_into_what_the_host_would_begin():
    """Also what is typical: that of the first device that has read something, for all of them."""
    rng, answers = np.random.default_rng(10), Answers.empty(KEYS, COLLECTED, EXPERTS, HIDDEN)
    rows, outputs, routing, mask = random_batch(rng)
    nothing = outputs.copy()
    nothing[1] = np.nan  # the first device knows no typical output of the second layer
    windows = [update(init(answers), rows, one, routing, mask) for one in (nothing, outputs)]
    again = emptied(jax.tree.map(lambda *leaves: jnp.stack(leaves), *windows))
    for window in windows:
        answers = absorb(window, answers)
    assert (answers.typical > 0).all() and windows[0].typical[1] == 0
    for device in range(2):
        jax.tree.map(lambda one, host, d=device: np.testing.assert_array_equal(one[d], host), again, init(answers))
