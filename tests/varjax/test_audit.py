"""The audit on a tiny checkpoint: what it computes is true, costs nothing when off, and leads where it should."""

import dataclasses
import json
import warnings
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax import LEARNED, VARConfig, VARModel, drift, step
from varjax.audit import Auditor, _audited, _choose, _tally, audited
from varjax.drift import ERROR_CAP, DriftWarning, observe, watched
from varjax.routing import LayerRules, Plan, Routing, resolve

SHARE = 0.4


@pytest.fixture
def ids(documents):
    return np.stack([document.ids[:16] for document in documents if len(document.ids) >= 16][-8:])


@pytest.fixture
def calibration(small_var_model, ids):
    """Of the texts of `ids`, eight times over."""
    streams = watched(small_var_model.config, 2)
    state, key, seen = small_var_model.init(), jax.random.key(9), []
    for _ in range(8):
        state = step.begin(state, len(ids))
        _, state, sums, key = audited(small_var_model, state, jnp.asarray(ids), jnp.ones(ids.shape, bool), key, SHARE)
        seen.append(observe(jax.device_get(sums), streams))
    origin = {"fingerprint": small_var_model.model.fingerprint, "config_sha256": small_var_model.digest}
    return drift.calibrate(np.concatenate(seen), streams, share=SHARE, **origin)


def broken(var_model: VARModel) -> VARModel:
    """Its answers are far too large."""
    answers = tuple(dataclasses.replace(known, answers=1000 * known.answers) for known in var_model.table.answers)
    table = dataclasses.replace(var_model.table, answers=answers)
    return VARModel(var_model.model, var_model.config, table=table)


def drifting(auditor: Auditor, ids: np.ndarray) -> tuple:
    """(state, audit state) after enough calls to notice what is broken."""
    state, audit_state = auditor.var_model.init(), auditor.init()
    with pytest.warns(DriftWarning) as issued:
        for _ in range(10):
            _, state, audit_state = auditor(ids, state, audit_state)
    assert len(issued) == 1
    return state, audit_state, str(issued[0].message)


def test_errors_equal_a_full_computation_of_each_layer(small_var_model, ids):
    model, table = small_var_model.model, small_var_model.table
    ids = jnp.asarray(ids)
    plan = step.plan(table, small_var_model.init(len(ids)), ids, 0.0, small_var_model.settings)
    tokens = jnp.array([0, 5, -1, 17, 100, ids.size - 1], jnp.int32)

    def run(plan, **options):
        return model.network.forward(model.params, ids, plan=plan, **options)

    out = run(plan, recorded_layers=(0, 1), audit=tokens)
    for layer in range(2):
        # The same past, but this layer is left to its router.
        opened = dataclasses.replace(plan, tier=plan.tier.at[layer].set(LEARNED))
        full = np.asarray(run(opened, recorded_layers=(0, 1)).recorded[layer].outputs.sum(-2))
        known = table.answers[layer]
        _, dropped = resolve(out.router_probs[layer], 2, dataclasses.replace(plan.layer(layer), answers=known))
        added = known.total(dropped)
        under_var = np.asarray(out.recorded[layer].outputs.sum(-2)) + added
        wanted = np.linalg.norm(under_var - full, axis=-1) / np.linalg.norm(full, axis=-1)
        expected = np.where(tokens >= 0, wanted.reshape(-1)[tokens], 0)
        assert (expected > 0.05).sum() >= 2
        np.testing.assert_allclose(out.audit[layer], expected, rtol=1e-4, atol=1e-5)


def test_what_nothing_is_planned_for_has_no_error(saved_model, ids):
    tokens = jnp.arange(ids.size, dtype=jnp.int32)
    out = saved_model.network.forward(saved_model.params, jnp.asarray(ids), audit=tokens)
    np.testing.assert_allclose(out.audit, 0, atol=1e-5)


def test_the_audit_changes_no_answer_and_is_absent_when_off(small_var_model, ids):
    plain, state = small_var_model(ids, small_var_model.init())
    mask = jnp.ones(ids.shape, bool)
    out, other, _, _ = audited(
        small_var_model, small_var_model.init(len(ids)), jnp.asarray(ids), mask, jax.random.key(0), SHARE
    )
    np.testing.assert_allclose(out.logits, plain.logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, out.plan, plain.plan)
    jax.tree.map(np.testing.assert_array_equal, other, state)
    model = small_var_model.model
    assert model(ids).audit is None


def test_padding_is_not_audited(small_var_model, ids):
    mask = np.ones(ids.shape, bool)
    mask[:, 10:] = False
    _, _, sums, _ = audited(
        small_var_model, small_var_model.init(len(ids)), jnp.asarray(ids), jnp.asarray(mask), jax.random.key(0), 1.0
    )
    np.testing.assert_array_equal(sums.tokens, 10)
    np.testing.assert_array_equal(sums.audited, sums.planned)  # a share of 1 takes every planned token
    assert sums.planned.max() <= 10


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_draws_are_planned_distinct_and_an_even_share(share):
    planned = jax.random.uniform(jax.random.key(0), (6, 40)) < jnp.arange(6)[:, None] / 5
    draws = np.asarray(jax.vmap(lambda key: _choose(key, planned, share))(jax.random.split(jax.random.key(1), 2000)))
    assert draws.shape == (2000, 6 * ceil(share * 40))
    hits = np.zeros((2000, 6 * 40), int)
    run, slot = np.nonzero(draws >= 0)
    np.add.at(hits, (run, draws[run, slot]), 1)
    assert hits.max() == 1
    hits = hits.reshape(2000, 6, 40)
    assert not hits[:, ~np.asarray(planned)].any()
    there = np.asarray(planned).sum(1)
    assert (np.abs(hits.sum(2) - share * there) < 1 + 1e-4).all()  # rounded up or down
    # Each planned token as often as any other: 5 standard deviations of 240 shares of 2,000.
    spread = 5 * np.sqrt(share * (1 - share) / 2000)
    assert (np.abs(hits.mean(0) - share)[np.asarray(planned)] <= spread + 1e-6).all()


def test_draws_follow_from_the_key_alone():
    planned = jnp.ones((2, 30), bool)
    same, again, other = (_choose(jax.random.key(seed), planned, 0.2) for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"share={share}: expected above 0"):
        _choose(jax.random.key(0), jnp.ones((1, 4), bool), share)


def test_tallies_equal_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    layers, batch, length, experts = 3, 4, 10, 5
    shape = (layers, batch, length)
    mask = np.arange(length) < np.array([10, 7, 1, 0])[:, None]
    tier = np.where(mask, rng.integers(0, 3, shape), LEARNED).astype(np.int8)
    predicted, probs = rng.integers(0, experts, (*shape, 2)), rng.random((*shape, experts), np.float32)
    tokens = np.array([3, 0, -1, 12, 15, -1, 20, -1, -1, -1, -1, -1], np.int32)  # 3 per text
    error = rng.uniform(0, 2, (layers, len(tokens))).astype(np.float32)
    error[1, 0] = np.nan
    routing = Routing(jnp.asarray(predicted, jnp.int32), jnp.zeros((*shape, 2)))
    nothing = jnp.zeros(shape, jnp.int32)
    plan = Plan(jnp.asarray(tier), nothing.astype(jnp.int8), nothing, routing, LayerRules.neutral(layers))
    sums = _tally(plan, jnp.asarray(probs), jnp.asarray(mask), jnp.asarray(tokens), jnp.asarray(error))

    expected = {name: np.zeros((batch, layers, 2)) for name in ("planned", "agreed", "audited", "error")}
    for l, b, t in np.argwhere(tier < LEARNED):
        at = b, l, tier[l, b, t]
        expected["planned"][at] += 1
        expected["agreed"][at] += predicted[l, b, t, 0] == probs[l, b, t].argmax()
        for place in np.flatnonzero(tokens == b * length + t):
            expected["audited"][at] += 1
            value = error[l, place]
            expected["error"][at] += value if value <= ERROR_CAP else ERROR_CAP
    assert expected["audited"].sum() > 3 and 0 < expected["agreed"].sum() < expected["planned"].sum()
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(sums, name), values, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(sums.tokens, mask.sum(1))

    # And what becomes of them: one text's means, over all layers and in one layer and tier.
    config = VARConfig()
    streams = watched(config, layers)
    seen = dict(zip(streams, observe(sums, streams).T, strict=True))
    for (signal, layer, tier_name), values in seen.items():
        chosen = (
            slice(None) if layer is None else layer,
            slice(None) if tier_name is None else step.TIERS.index(tier_name),
        )
        of = {name: sum_[:, *chosen].reshape(batch, -1).sum(1) for name, sum_ in expected.items()}
        fast = expected["planned"][:, chosen[0], 0].reshape(batch, -1).sum(1)
        every = mask.sum(1) * (layers if layer is None else 1)
        above, below = {
            "error": (of["error"], of["audited"]),
            "agreement": (of["agreed"], of["planned"]),
            "open": (every - fast, every),
        }[signal]
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(values, above / below, rtol=1e-6)


def test_second_step_compiles_nothing_whatever_the_table(small_var_model, calibration, ids):
    auditor = Auditor(small_var_model, calibration)
    _, state, audit_state = auditor(ids, small_var_model.init(), auditor.init())
    compiled = _audited._cache_size()
    auditor(ids, state, audit_state)
    other = Auditor(broken(small_var_model), calibration)
    other(ids, small_var_model.init(), other.init(seed=3))
    assert _audited._cache_size() == compiled


def test_quiet_on_the_texts_that_it_was_calibrated_on(small_var_model, calibration, ids):
    auditor = Auditor(small_var_model, calibration, on_drift="disable")
    state, audit_state = small_var_model.init(), auditor.init()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            out, state, audit_state = auditor(ids, state, audit_state)
    assert not auditor.disabled(audit_state) and out.plan is not None
    assert audit_state.monitor.texts == 10 * len(ids)


def test_warns_once_names_what_drifted_and_goes_on(small_var_model, calibration, ids):
    auditor = Auditor(broken(small_var_model), calibration)
    state, audit_state, message = drifting(auditor, ids)
    calibrated = calibration.values[0].mean
    # Wherever an answer was used the error is capped at 1; in one in a hundred nothing was dropped.
    assert "error over all layers is 0.990" in message and f"calibrated {calibrated:.3f}" in message
    out, _, _ = auditor(ids, state, audit_state)
    assert out.plan is not None

    report = json.loads(json.dumps(auditor.report(audit_state), allow_nan=False))
    assert report["on_drift"] == "warn" and not report["disabled"]
    assert {"signal": "error", "layer": 0, "tier": "fast"} in [found["stream"] for found in report["drifts"]]
    assert report["streams"][0]["calibrated"]["mean"] == calibrated


def test_disabled_is_the_switched_off_model_until_begun_anew(small_var_model, calibration, ids):
    auditor = Auditor(broken(small_var_model), calibration, on_drift="disable")
    state, audit_state, message = drifting(auditor, ids)
    assert message.endswith("The next calls run the plain model.") and auditor.disabled(audit_state)
    out, same_state, same_audit = auditor(ids, state, audit_state)
    assert out.plan is None and same_state is state and same_audit is audit_state
    off, _ = small_var_model.disabled()(ids, None)
    np.testing.assert_array_equal(out.logits, off.logits)
    assert auditor.report(audit_state)["disabled"]

    out, _, _ = auditor(ids, state, auditor.init())
    assert out.plan is not None


def test_what_does_not_fit_is_refused(small_var_model, calibration):
    other = dataclasses.replace(calibration, fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"fingerprint 000000000000…, this model .*; calibrate again"):
        Auditor(small_var_model, other)
    changed = dataclasses.replace(small_var_model.config, answer_shrinkage=2.0)
    with pytest.raises(ValueError, match="config_sha256"):
        Auditor(VARModel(small_var_model.model, changed, table=small_var_model.table), calibration)
    with pytest.raises(ValueError, match="on_drift='stop': expected 'warn' or 'disable'"):
        Auditor(small_var_model, calibration, on_drift="stop")
    auditor = Auditor(small_var_model, calibration)
    with pytest.raises(ValueError, match="VAR is on but state is None"):
        auditor(np.zeros((1, 4), int), None, auditor.init())
    with pytest.raises(ValueError, match="VAR is switched off"):
        Auditor(VARModel(small_var_model.model, VARConfig(enable_var=False)), calibration)


def test_a_config_that_moved_is_the_same(small_var_model, calibration):
    other = dataclasses.replace(small_var_model.table, files_sha256="of other files")
    with pytest.raises(ValueError, match="config_sha256"):
        Auditor(VARModel(small_var_model.model, small_var_model.config, other), calibration)
