"""Residual sums against a slow loop; windows, shrinkage towards shorter keys, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from varjax import answersfile
from varjax.answers import Answers, Rule, flush, init, merge, parents, residual_rows, shrink, update
from varjax.config import LayerPolicy
from varjax.keys import ANY
from varjax.routing import FAST, LayerRules, Plan, Routing, resolve

LAYERS, BATCH, LENGTH, TOP_K, HIDDEN, ROWS, ORDERS = 3, 2, 5, 2, 4, 6, 2
KEYS = np.array([[ANY, 1], [ANY, 2], [ANY, 3], [1, 2], [2, 3], [3, 3]], np.int32)
RULES = (Rule(2, 0), Rule(2, 1), Rule(0, 2, 0.5), Rule(0, 1, 0.9))


def random_batch(rng):
    rows = rng.integers(-1, ROWS, size=(ORDERS, BATCH, LENGTH)).astype(np.int32)
    outputs = rng.normal(size=(2, BATCH, LENGTH, TOP_K, HIDDEN)).astype(np.float32)
    outputs[rng.random(outputs.shape[:-1]) < 0.05] = np.nan
    weights = -np.sort(-rng.dirichlet(np.ones(TOP_K), size=(LAYERS, BATCH, LENGTH))).astype(np.float32)
    routing = Routing(jnp.zeros(weights.shape, jnp.int32), jnp.asarray(weights))
    return rows, outputs, routing, rng.random((BATCH, LENGTH)) < 0.8


def slow_sums(batches):
    total, count = np.zeros((len(RULES), ROWS, HIDDEN)), np.zeros((len(RULES), ROWS), np.int64)
    nonfinite = np.zeros(len(RULES), np.int64)
    for rows, outputs, routing, mask in batches:
        weights = np.asarray(routing.weights)
        for p, rule in enumerate(RULES):
            for b, t in np.argwhere(mask):
                w = weights[rule.layer, b, t]
                gone = [j for j in range(TOP_K) if j >= rule.kept or (j and w[j] < rule.gate_ratio * w[0])]
                what = sum((outputs[{0: 0, 2: 1}[rule.layer], b, t, j] for j in gone), np.zeros(HIDDEN))
                if gone and not np.isfinite(what).all():
                    nonfinite[p] += 1
                elif gone:
                    for row in rows[:, b, t]:
                        if row >= 0:
                            total[p, row] += what
                            count[p, row] += 1
    return total, count, nonfinite


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), windows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_means_equal_the_slow_loop_however_the_windows_fall(seed, windows):
    rng = np.random.default_rng(seed)
    answers, batches = Answers.empty(KEYS, RULES, HIDDEN), []
    sums = init(answers)
    assert sums.layers == (0, 2)
    for size in windows:
        for _ in range(size):
            batches.append(random_batch(rng))
            sums = update(sums, *batches[-1])
        sums, answers = flush(sums, answers)
    total, count, nonfinite = slow_sums(batches)
    np.testing.assert_array_equal(answers.count, count)
    np.testing.assert_array_equal(answers.nonfinite, nonfinite)
    np.testing.assert_allclose(answers.mean * count[..., None], total, atol=1e-5)


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(7)
    first, second = ([random_batch(rng) for _ in range(2)] for _ in range(2))

    def collected(batches, keys):
        answers = Answers.empty(keys, RULES, HIDDEN)
        sums = init(answers)
        for batch in batches:
            sums = update(sums, *batch)
        return flush(sums, answers)[1]

    whole, parts = collected(first + second, KEYS), [collected(part, KEYS) for part in (first, second)]
    merged = merge(*parts)
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_array_equal(merged.nonfinite, whole.nonfinite)
    np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-6)
    # A key that one part does not have keeps the other's mean.
    fewer = Answers(KEYS[:4], RULES, parts[1].mean[:, :4], parts[1].count[:, :4], parts[1].nonfinite)
    mixed = merge(fewer, parts[0])
    np.testing.assert_array_equal(mixed.keys, KEYS)
    np.testing.assert_allclose(mixed.mean[:, 4:], parts[0].mean[:, 4:])
    np.testing.assert_allclose(mixed.mean[:, :4], merged.mean[:, :4])
    with pytest.raises(ValueError, match="same rules"):
        merge(parts[0], Answers.empty(KEYS, RULES[:2], HIDDEN))


def test_a_residual_is_what_the_plan_of_its_policy_leaves_out():
    """One occurrence per key: kept experts plus residual are the full output exactly."""
    rng = np.random.default_rng(0)
    policy = LayerPolicy(kept=2, gate_ratio=0.6)
    probs = jnp.asarray(rng.dirichlet(np.full(4, 0.5), size=(1, ROWS)), jnp.float32)
    outputs = rng.normal(size=(1, 1, ROWS, TOP_K, HIDDEN)).astype(np.float32)
    learned, _ = resolve(probs, TOP_K, None)
    routing = jax.tree.map(lambda leaf: leaf[None], learned)
    rows = np.arange(ROWS, dtype=np.int32).reshape(1, 1, ROWS)
    answers = Answers.empty(KEYS, [Rule.of(0, policy)], HIDDEN)
    _, answers = flush(update(init(answers), rows, outputs, routing, np.ones((1, ROWS), bool)), answers)

    plan = Plan(
        tier=jnp.full((1, ROWS), FAST, jnp.int8),
        kept=jnp.full((1, ROWS), policy.kept, jnp.int8),
        row=jnp.asarray(rows[0]),
        routing=Routing.unused((1, ROWS, TOP_K), 4),
        rules=LayerRules(jnp.float32(policy.gate_ratio), *[jnp.asarray(False)] * 3),
    )
    executed, row = resolve(probs, TOP_K, plan)
    residual = residual_rows(answers, Rule.of(0, policy), 0.0)
    runs = np.asarray(executed.experts) < 4
    assert 0 < runs.sum() < runs.size
    kept = (outputs[0] * runs[..., None]).sum(-2)
    answer = kept + np.where(np.asarray(row)[..., None] >= 0, residual[np.asarray(row)], 0)
    np.testing.assert_allclose(answer, outputs[0].sum(-2), rtol=1e-6)


def test_rows_shrink_towards_the_key_one_id_shorter():
    keys = np.array([[7, 1, 2], [ANY, ANY, 2], [ANY, 1, 2], [ANY, ANY, 5], [6, 4, 5]], np.int32)
    assert parents(keys).tolist() == [2, -1, 1, -1, 3]  # [4, 5] is no key: its parent is [5]
    mean, count = np.array([[1.0], [2.0], [4.0], [8.0], [0.0]]), np.array([1, 3, 4, 12, 0])
    unigram = 3 * 2.0 / 7
    bigram = (4 * 4.0 + 4 * unigram) / 8
    five = 12 * 8.0 / 16
    expected = [(1.0 + 4 * bigram) / 5, unigram, bigram, five, five]
    np.testing.assert_allclose(shrink(mean, count, parents(keys), 4.0)[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(shrink(mean, count, parents(keys), 0.0)[:, 0], [1, 2, 4, 8, 8], rtol=1e-6)


def test_distilled_rows_are_used_as_they_are():
    rng = np.random.default_rng(1)
    mean = rng.normal(size=(1, ROWS, HIDDEN)).astype(np.float32)
    nonfinite = np.zeros(1, np.int64)
    answers = Answers(KEYS, RULES[:1], mean, np.ones((1, ROWS), np.int64), nonfinite, distilled=True)
    np.testing.assert_array_equal(residual_rows(answers, RULES[0], 5.0), mean[0])


def test_errors():
    with pytest.raises(ValueError, match="each of them once"):
        Answers.empty(KEYS, [Rule(0, 1), Rule(0, 1)], HIDDEN)
    with pytest.raises(ValueError, match=r"no residuals for Rule\(layer=1"):
        residual_rows(Answers.empty(KEYS, RULES, HIDDEN), Rule(1, 1), 5.0)
    with pytest.raises(ValueError, match="leaves `kept` open"):
        Rule.of(0, LayerPolicy(kept=None, residual=False))
    with pytest.raises(ValueError, match=r"need the slot outputs of layers \(0, 2\), got 1"):
        rows, outputs, routing, mask = random_batch(np.random.default_rng(0))
        update(init(Answers.empty(KEYS, RULES, HIDDEN)), rows, outputs[:1], routing, mask)


@pytest.fixture
def collected() -> Answers:
    answers = Answers.empty(KEYS, RULES, HIDDEN)
    sums = update(init(answers), *random_batch(np.random.default_rng(3)))
    return flush(sums, answers)[1]


def test_the_file_gives_back_what_was_written(collected, tmp_path):
    path = tmp_path / "run" / "stats.residuals.safetensors"
    answersfile.write(path, collected, {"fingerprint": "abc", "provenance": {"seed": 1}})
    answers, meta = answersfile.read(path)
    assert meta == {"fingerprint": "abc", "provenance": {"seed": 1}}
    assert (answers.rules, answers.distilled) == (collected.rules, False)
    for name in ("keys", "count", "nonfinite"):
        np.testing.assert_array_equal(getattr(answers, name), getattr(collected, name))
    np.testing.assert_array_equal(answers.mean, collected.mean.astype(np.float32))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_bad_file_is_named_with_its_fault(collected, tmp_path):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(FileNotFoundError, match="collect residuals first"):
        answersfile.read(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a readable safetensors file"):
        answersfile.read(path)
    save_file({"keys": KEYS}, path)
    with pytest.raises(ValueError, match=r"bad\.safetensors: expected residuals of format 1, found None"):
        answersfile.read(path)
    header = {"varjax": '{"format": 1, "rules": [[0, 1, 0.0]], "distilled": false}'}
    save_file({"keys": KEYS}, path, metadata={"varjax": '{"format": 1}'})
    with pytest.raises(ValueError, match="the header lacks its rules"):
        answersfile.read(path)
    save_file({"keys": KEYS}, path, metadata=header)
    with pytest.raises(ValueError, match="count, mean, nonfinite are missing"):
        answersfile.read(path)
    tensors = {"keys": KEYS, "mean": np.zeros((2, ROWS, 3), np.float32)}
    tensors |= {"count": np.zeros((1, ROWS), np.int64), "nonfinite": np.zeros(1, np.int64)}
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=r"tensor mean is float32 \[2, 6, 3\], expected float32 \[1, 6, 3\]"):
        answersfile.read(path)
    with pytest.raises(ValueError, match="the file itself says rules"):
        answersfile.write(path, collected, {"rules": []})


def test_the_second_batch_compiles_nothing():
    rng = np.random.default_rng(5)
    sums = update(init(Answers.empty(KEYS, RULES, HIDDEN)), *random_batch(rng))
    before = update._cache_size()
    update(sums, *random_batch(rng))
    assert update._cache_size() == before
