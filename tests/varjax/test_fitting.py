"""Maps of affine answers: against plain least squares, on planted and on independent outputs, merged and by windows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax import answers as answering
from varjax import fitting
from varjax.answers import Answers
from varjax.errors import InputError
from varjax.fitting import Moments
from varjax.keys import ANY, KeyIndex, find_rows
from varjax.routing import Routing
from varjax.shrinkage import shrunk

EXPERTS, TOP_K, HIDDEN, IDS = 3, 2, 6, 5
KEYS = np.array([[ANY, token] for token in range(IDS)], np.int32)
SHRINKAGE = 1.0


@dataclasses.dataclass
class Text:
    ids: np.ndarray  # [B, T]
    inputs: np.ndarray  # [1, B, T, D]
    outputs: np.ndarray  # [1, B, T, K, D], weighted
    routing: Routing  # [1, B, T, K]


def text(seed, respond, batch=40, length=8):
    """Inputs that vary around a mean per token; `respond(x, expert, ids)` says what the experts say."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, IDS, (batch, length)).astype(np.int32)
    inputs = np.random.default_rng(1).normal(size=(IDS, HIDDEN))[ids] + rng.normal(size=(batch, length, HIDDEN))
    experts = np.argsort(rng.random((batch, length, EXPERTS)))[..., :TOP_K]
    weights = -np.sort(-rng.dirichlet(np.ones(TOP_K), size=(batch, length)))
    outputs = np.stack([respond(inputs, experts[..., k], ids) for k in range(TOP_K)], axis=2) * weights[..., None]
    routing = Routing(jnp.asarray(experts[None], jnp.int32), jnp.asarray(weights[None], jnp.float32))
    return Text(ids, inputs[None].astype(np.float32), outputs[None].astype(np.float32), routing)


def batches(one, size=10):
    for start in range(0, len(one.ids), size):
        part = slice(start, start + size)
        rows = find_rows(KeyIndex.build(EMPTY.keys), jnp.asarray(one.ids[part]), EMPTY.ngram_orders)
        routing = jax.tree.map(lambda leaf, part=part: leaf[:, part], one.routing)
        yield rows, one.outputs[:, part], routing, jnp.ones(one.ids[part].shape, bool), one.inputs[:, part]


EMPTY = Answers.empty(KEYS, (0,), EXPERTS, HIDDEN, inputs=True)


def collected(one):
    sums = answering.init(EMPTY)
    for batch in batches(one):
        sums = answering.update(sums, *batch)
    return answering.absorb(sums, EMPTY)


def summed(one, answers, own_text, basis=None, windows=1):
    target = fitting.targets(answers, SHRINKAGE, own_text=own_text, basis=basis)
    moments = (Moments.empty(EXPERTS, HIDDEN, None if basis is None else basis.shape[-1]),)
    parts = list(batches(one))
    for number in range(windows):
        window = fitting.init(moments)
        for batch in parts[number::windows]:
            window = fitting.update(window, *batch, target)
        moments = fitting.merge(window, moments)
    return moments


MAPS = np.random.default_rng(2).normal(size=(EXPERTS, HIDDEN, HIDDEN))
OFFSETS = np.random.default_rng(3).normal(size=(IDS, EXPERTS, HIDDEN))


def planted(inputs, experts, ids, rank=HIDDEN):
    left, values, right = np.linalg.svd(MAPS[:1] if rank < HIDDEN else MAPS, full_matrices=False)
    maps = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    maps = np.broadcast_to(maps, MAPS.shape) * np.arange(1, EXPERTS + 1)[:, None, None]
    return np.einsum("...d,...df->...f", inputs, maps[experts]) + OFFSETS[ids, experts]


def plain_deviations(one, answers, own_text):
    """{expert: (dx, dy)} slot by slot, from the definition: the shrunk mean of the other occurrences."""
    estimate, found = shrunk(answers, 0, SHRINKAGE), {e: ([], []) for e in range(EXPERTS)}
    prior = SHRINKAGE * answers.mass[0].sum() / answers.count[0].sum()
    experts, weights = (np.asarray(leaf)[0] for leaf in (one.routing.experts, one.routing.weights))
    for b, t, k in np.ndindex(*one.ids.shape, TOP_K):
        expert, w = experts[b, t, k], float(weights[b, t, k])
        n = answers.entry[0, 1 + one.ids[b, t], expert]
        x, wf = one.inputs[0, b, t].astype(float), one.outputs[0, b, t, k].astype(float)
        means = []
        for value, own, rows in ((x, answers.inputs, estimate.inputs), (wf / w, answers.mean, estimate.answers)):
            mass, parent = answers.mass[0, n], rows[estimate.parent[n]]
            others = mass * own[0, n] - own_text * w * w * value
            means.append((others + prior * parent) / (mass - own_text * w * w + prior))
        found[expert][0].append(w * (x - means[0]))
        found[expert][1].append(wf - w * means[1])
    return {e: tuple(map(np.array, pair)) for e, pair in found.items()}


@pytest.mark.parametrize("own_text", [True, False])
def test_moments_are_those_of_the_deviations_from_the_other_occurrences(own_text):
    one = text(4, planted)
    answers = collected(one)
    (moments,) = summed(one, answers, own_text)
    for expert, (dx, dy) in plain_deviations(one, answers, own_text).items():
        assert moments.count[expert] == len(dx)
        sums = moments.gram[expert], moments.cross[expert], moments.power[expert]
        for found, expected in zip(sums, (dx.T @ dx, dx.T @ dy, (dy**2).sum()), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_full_maps_are_least_squares(monkeypatch):
    noise = np.random.default_rng(9)
    one = text(5, lambda *given: planted(*given) + noise.normal(size=given[0].shape))
    answers = collected(one)
    ridge = 1e-6
    monkeypatch.setattr(fitting, "RIDGES", (ridge,))
    moments = summed(one, answers, True)
    maps = fitting.fit(moments, moments, rank=HIDDEN)
    unit = np.trace(moments[0].gram, axis1=1, axis2=2).sum() / (EXPERTS * HIDDEN)
    for expert, (dx, dy) in plain_deviations(one, answers, True).items():
        padded = np.concatenate([dx, np.sqrt(ridge * unit) * np.eye(HIDDEN)])
        expected = np.linalg.lstsq(padded, np.concatenate([dy, np.zeros((HIDDEN, HIDDEN))]), rcond=None)[0]
        np.testing.assert_allclose(maps.read[0] @ maps.mix[0, expert] @ maps.write[0], expected, atol=1e-4)


@pytest.mark.parametrize("rank", [2, HIDDEN])
def test_planted_maps_are_recovered(rank):
    respond = functools.partial(planted, rank=rank)
    one, other = text(6, respond, batch=100), text(7, respond)
    answers = collected(one)
    maps = fitting.fit(summed(one, answers, True), summed(other, answers, False), rank)
    # What is left is the noise of the means: few occurrences say little about them.
    assert maps.unexplained.max() < 0.02
    at_zero = respond(np.zeros((EXPERTS, HIDDEN)), np.arange(EXPERTS), np.zeros(EXPERTS, int))
    for expert in range(EXPERTS):
        eye = respond(np.eye(HIDDEN), np.full(HIDDEN, expert), np.zeros(HIDDEN, int)) - at_zero[expert]
        found = maps.read[0] @ maps.mix[0, expert] @ maps.write[0]
        np.testing.assert_allclose(found, eye, atol=0.02 * np.abs(eye).max())
    np.testing.assert_allclose(maps.write[0] @ maps.write[0].T, np.eye(rank), atol=1e-5)


def test_maps_of_independent_outputs_shrink_to_nothing():
    noise = np.random.default_rng(8)
    one, other = (text(seed, lambda x, e, ids: noise.normal(size=x.shape)) for seed in (8, 9))
    answers = collected(one)
    maps = fitting.fit(summed(one, answers, True), summed(other, answers, False), rank=HIDDEN)
    size = np.abs(maps.read[0] @ maps.mix[0] @ maps.write[0]).max()
    assert size < 0.1 and maps.unexplained.min() > 0.97


def test_a_key_seen_once_does_not_explain_itself():
    """Every bigram occurs once: deviations from means that know the token would all be halves of themselves."""
    one = text(10, planted, batch=4)
    first = dataclasses.replace(one, ids=np.arange(one.ids.size, dtype=np.int32).reshape(one.ids.shape))
    keys = np.stack([np.full(first.ids.size, ANY), first.ids.ravel()], axis=1).astype(np.int32)
    empty = Answers.empty(keys, (0,), EXPERTS, HIDDEN, inputs=True)
    rows = find_rows(KeyIndex.build(empty.keys), jnp.asarray(first.ids), empty.ngram_orders)
    mask = jnp.ones(first.ids.shape, bool)
    sums = answering.update(answering.init(empty), rows, first.outputs, first.routing, mask, first.inputs)
    answers = answering.absorb(sums, empty)
    target = fitting.targets(answers, SHRINKAGE, own_text=True)
    window = fitting.init((Moments.empty(EXPERTS, HIDDEN),))
    (found,) = fitting.update(window, rows, first.outputs, first.routing, mask, first.inputs, target)
    weights, experts = np.asarray(first.routing.weights)[0], np.asarray(first.routing.experts)[0]
    # Alone, the estimate is the prior's: the mean over all tokens.
    root = answers.mean[0][answers.entry[0, 0]]
    expected = np.zeros(EXPERTS)
    for b, t, k in np.ndindex(*first.ids.shape, TOP_K):
        expected[experts[b, t, k]] += np.sum(
            (first.outputs[0, b, t, k] - weights[b, t, k] * root[experts[b, t, k]]) ** 2
        )
    np.testing.assert_allclose(found.power, expected, rtol=1e-4)


def test_windows_and_parts_add_up():
    one = text(11, planted)
    answers = collected(one)
    whole, parts = summed(one, answers, True), summed(one, answers, True, windows=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), whole, parts)


def test_a_basis_looks_at_some_directions_only():
    one, other = text(12, planted, batch=100), text(13, planted)
    answers = collected(one)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(HIDDEN, HIDDEN)))[0][None].astype(np.float32)
    full = fitting.fit(summed(one, answers, True), summed(other, answers, False), HIDDEN)
    turned = fitting.fit(summed(one, answers, True, basis), summed(other, answers, False, basis), HIDDEN, basis)
    for expert in range(EXPERTS):
        product = [m.read[0] @ m.mix[0, expert] @ m.write[0] for m in (full, turned)]
        np.testing.assert_allclose(*product, atol=2e-3)
    few = fitting.fit(
        *(summed(t, answers, own, basis[..., :3]) for t, own in ((one, True), (other, False))), 3, basis[..., :3]
    )
    assert few.read.shape == (1, HIDDEN, 3)
    assert few.unexplained.mean() > full.unexplained.mean()


def test_leading_directions_are_those_in_which_mean_inputs_differ():
    rng = np.random.default_rng(3)
    plane = np.linalg.qr(rng.normal(size=(HIDDEN, 2)))[0]
    answers = dataclasses.replace(collected(text(16, planted)))
    inputs = 5 + rng.normal(size=(*answers.count.shape, 2)) @ plane.T + 1e-3 * rng.normal(size=answers.inputs.shape)
    (basis,) = fitting.leading_directions(dataclasses.replace(answers, inputs=inputs), 2)
    np.testing.assert_allclose(basis @ basis.T, plane @ plane.T, atol=1e-2)
    assert fitting.leading_directions(answers, HIDDEN) is None


@pytest.mark.parametrize("num_bytes", [0, 10_000, 5_000_000, 1 << 40])
def test_directions_fill_the_memory(num_bytes):
    layers, experts, hidden = 3, 4, 128
    seen = fitting.directions_within(num_bytes, layers, experts, hidden)
    sums = [
        jax.eval_shape(lambda q=q: jax.tree.map(jnp.asarray, Moments.empty(experts, hidden, q)))
        for q in (seen, seen + 1)
    ]
    size, more = (4 * layers * (one.gram.size + one.cross.size) for one in sums)
    assert 1 <= seen <= hidden
    assert (size <= num_bytes or seen == 1) and (more > num_bytes or seen == hidden)


def test_errors():
    one = text(14, planted, batch=10)
    answers = collected(one)
    moments = summed(one, answers, True)
    with pytest.raises(InputError, match="rank=7: expected an integer from 1 to 6"):
        fitting.fit(moments, moments, rank=7)
    with pytest.raises(InputError, match="no mean inputs"):
        fitting.targets(dataclasses.replace(answers, inputs=answers.inputs[..., :0]), SHRINKAGE, own_text=True)
    with pytest.raises(InputError, match="pass expert_inputs"):
        answering.update(answering.init(EMPTY), *next(batches(one))[:-1])


def test_the_second_batch_compiles_nothing():
    one = text(15, planted)
    answers = collected(one)
    target = fitting.targets(answers, SHRINKAGE, own_text=True)
    window = fitting.init((Moments.empty(EXPERTS, HIDDEN),))
    every = list(batches(one))
    for batch in every[:2]:  # the window is on the host first, then on the device
        window = fitting.update(window, *batch, target)
    before = fitting.update._cache_size()
    fitting.update(window, *every[2], target)
    assert fitting.update._cache_size() == before


def test_an_expert_whose_map_explains_nothing_has_none():
    """One of the experts answers at random; the others keep their maps."""
    noise = np.random.default_rng(17)

    def respond(inputs, experts, ids):
        said = planted(inputs, experts, ids)
        return np.where((experts == 1)[..., None], 10 * noise.normal(size=said.shape), said)

    for seed in range(18, 24):  # whether chance makes a map of noise look useful depends on the text
        one, other = text(seed, respond), text(seed + 10, respond)
        answers = collected(one)
        maps = fitting.fit(summed(one, answers, True), summed(other, answers, False), HIDDEN)
        useful = maps.mix[0].any(axis=(1, 2))
        assert useful[[0, 2]].all() and (maps.unexplained[0, [0, 2]] < 0.3).all()
        assert useful[1] == (maps.unexplained[0, 1] < 1)
        if not useful[1]:
            return
    pytest.fail("no map of noise was left out")


def test_a_layer_without_slots_has_no_map():
    empty = (Moments.empty(EXPERTS, HIDDEN),)
    maps = fitting.fit(empty, empty, 2)
    assert not maps.mix.any() and (maps.unexplained == 1).all()
