"""The audit: while VAR runs, a share of the planned tokens is also computed in full, and drift is noticed.

Letters: L layers, B texts, T positions, E experts, Q tokens per text that may be audited, M watched streams.

    auditor = Auditor(var_model, calibration, on_drift="warn")      # calibration: analysis.evaluate.auditing.calibrate
    audit_state = auditor.init()
    out, state, audit_state = auditor(input_ids, state, audit_state)

Three things are looked at, by layer: the relative error of the layer's output where the plan answered (`error`, on the
audited share, because all experts must run for it), whether the predicted first expert is the one that the learned
router prefers (`agreement`, on every planned token: the gate runs anyway), and the share of tokens that the table does
not know (`open`). On the device they are summed per text; `varjax.drift` judges the texts' means.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from varjax import drift, step
from varjax.drift import ERROR_CAP, TIERS, Calibration, DriftWarning, Monitor, Tally, observe
from varjax.errors import InputError
from varjax.model import Network, VARModel, VAROutput, copied
from varjax.routing import LEARNED, Plan
from varjax.step import Settings, VARState
from varjax.table import RouteTable
from varjax.transfer import passing_scalars, random_key

OnDrift = Literal["warn", "disable"]


@dataclass(frozen=True)
class AuditState:
    """What one audited call hands to the next."""

    key: Array  # PRNG key of the next call's draw
    monitor: Monitor


class Auditor:
    """A VARModel under audit. Immutable after construction; what was seen so far is in the AuditState."""

    def __init__(self, var_model: VARModel, calibration: Calibration, on_drift: OnDrift = "warn"):
        """
        Args:
            var_model: with VAR switched on.
            calibration: of this model under these settings; it also says which share of the tokens is audited.
            on_drift: "warn" issues one DriftWarning; "disable" issues it too, and later calls run the plain model.

        Raises:
            InputError: VAR is switched off, the calibration is of another model or other settings, or `on_drift` is
                neither of the two.
        """
        if var_model.table is None:
            raise InputError("VAR is switched off (enable_var=False): there is nothing to audit")
        if on_drift not in get_args(OnDrift):
            raise InputError(f"on_drift={on_drift!r}: expected {' or '.join(map(repr, get_args(OnDrift)))}")
        ours = {"fingerprint": var_model.model.fingerprint, "config_sha256": var_model.digest}
        for name, value in ours.items():
            theirs = getattr(calibration, name)
            if theirs != value:
                raise InputError(
                    f"the calibration has {name} {theirs[:12]}…, this model {value[:12]}…; calibrate again with "
                    "analysis.evaluate.auditing.calibrate"
                )
        self.var_model, self.calibration, self.on_drift = var_model, calibration, on_drift

    def init(self, seed: int = 0) -> AuditState:
        """The state before the first call, and the way to begin again after a drift: no evidence, no drift.

        Args:
            seed: of the draw of tokens.

        Returns:
            The state.
        """
        return AuditState(random_key(seed), drift.begin(self.calibration))

    def disabled(self, audit_state: AuditState) -> bool:
        """Whether the next call will run the plain model.

        Args:
            audit_state: from the call before.

        Returns:
            True after a drift with `on_drift="disable"`.
        """
        return self.on_drift == "disable" and bool(audit_state.monitor.drifts)

    def __call__(
        self, input_ids: Any, state: VARState | None, audit_state: AuditState, attention_mask: Any | None = None
    ) -> tuple[VAROutput, VARState | None, AuditState]:
        """Run whole texts, as `VARModel.__call__` does; each row is one text, the unit of evidence.

        Issues a DriftWarning in the call that first finds drift. A call of the plain model changes neither state.

        Args:
            input_ids: integers [B, T].
            state: from `VARModel.init` or the call before; it stays valid.
            audit_state: from `init` or the call before.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].

        Returns:
            The output, and the VARState and the AuditState for the next call.

        Raises:
            InputError: no state, though VAR is on, or inputs that `models.Model.check_inputs` refuses.
        """
        ids, mask = self.var_model.model.check_inputs(input_ids, attention_mask)
        if self.disabled(audit_state):
            out, _ = self.var_model.advance(None, ids, mask)
            return out, state, audit_state
        if state is None:
            raise InputError("VAR is on but state is None; begin with var_model.init(batch_size)")
        state = step.begin(copied(state), batch_size=len(ids))
        out, state, tally, key = audited(self.var_model, state, ids, mask, audit_state.key, self.calibration.share)
        observed = observe(jax.device_get(tally), self.calibration.streams)
        monitor = drift.watch(audit_state.monitor, observed)
        if monitor.drifts and not audit_state.monitor.drifts:
            then = " The next calls run the plain model." if self.on_drift == "disable" else ""
            warnings.warn(drift.message(monitor) + then, DriftWarning, stacklevel=2)
        return out, state, AuditState(key, monitor)

    def report(self, audit_state: AuditState) -> dict[str, Any]:
        """What was calibrated and what was observed, ready for JSON.

        Args:
            audit_state: from the last call.

        Returns:
            Fields.
        """
        found = drift.report(audit_state.monitor)
        return {"on_drift": self.on_drift, "disabled": self.disabled(audit_state), **found}


def audited(
    var_model: VARModel, state: VARState, ids: Array, mask: Array, key: Array, share: float, now: float | None = None
) -> tuple[VAROutput, VARState, Tally, Array]:
    """New texts under VAR and under audit; one step of a library loop.

    Args:
        var_model: with VAR switched on.
        state: from `varjax.step.begin`; given up, not to be used again.
        ids: int32 [B, T].
        mask: bool [B, T].
        key: PRNG key of this call's draw; or [B], one for each text, which are given back as they are.
        share: of the planned tokens that are also computed in full.
        now: as in `VARModel.advance`.

    Returns:
        Output, state, tally of each text and the next key.
    """
    assert var_model.table is not None, "there is nothing to audit with VAR switched off"
    moment = step.timestamp(var_model.clock() if now is None else now)
    options = {"share": share, "network": var_model.model.network}
    with passing_scalars():
        out, *rest = _audited(
            var_model.model.params, var_model.table, state, ids, mask, moment, var_model.settings, key, **options
        )
    return replace(out, plan=replace(out.plan, answers=var_model.table.answers)), *rest


@partial(jax.jit, static_argnames=("share", "network"), donate_argnames="state")
def _audited(
    params: Any,
    table: RouteTable,
    state: VARState,
    ids: Array,
    mask: Array,
    now: Array,
    settings: Settings,
    key: Array,
    *,
    share: float,
    network: Network,
) -> tuple[VAROutput, VARState, Tally, Array]:
    plan = step.plan(table, state, ids, now, settings, mask)
    key, draw = jax.random.split(key) if key.ndim == 0 else (key, key)
    tokens = _choose(draw, jnp.any(plan.tier < LEARNED, axis=0), share)
    out = network.forward(params, ids, attention_mask=mask, plan=plan, audit=tokens)
    state = step.commit(state, plan, ids, out.routing, out.router_probs, now, settings, mask)
    with jax.named_scope("tally"):
        seen = _tally(plan, out.router_probs, mask, tokens, out.audit)
    plan = replace(plan, answers=None)
    return VAROutput(out.logits, out.router_probs, out.routing, plan, out.kv), state, seen, key


def _choose(key: Array, planned: Array, share: float) -> Array:
    """int32 [B * Q], Q = ceil(share * T): tokens b * T + t to audit, drawn from each text's planned ones; -1 for none.

    A text with P of them gives share * P on average: the whole part of it, and one more with the rest's probability.
    `key` is one PRNG key or [B], one for each text, whose draw is then the same in any batch; `planned` is bool [B, T].
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share}: expected above 0 and at most 1, such as 0.05")
    batch, length = planned.shape
    order, rounding = jax.random.split(key) if key.ndim == 0 else jax.vmap(jax.random.split, out_axes=1)(key)
    lot = jnp.where(planned, _uniform(order, planned.shape), -1.0)
    _, position = jax.lax.top_k(lot, math.ceil(share * length))
    there = jnp.sum(planned, axis=1, dtype=jnp.int32)
    wanted = jnp.floor(share * there.astype(jnp.float32) + _uniform(rounding, (batch,)))
    count = jnp.minimum(wanted.astype(jnp.int32), there)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * length
    drawn = jnp.arange(position.shape[1], dtype=jnp.int32)[None] < count[:, None]
    return jnp.where(drawn, first + position, -1).reshape(-1)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """float32 [B, ...] in [0, 1), from one key or from one for each of B."""
    if key.ndim == 0:
        return jax.random.uniform(key, shape)
    return jax.vmap(lambda one: jax.random.uniform(one, shape[1:]))(key)


def _tally(plan: Plan, router_probs: Array, mask: Array, tokens: Array, error: Array) -> Tally:
    """The sums of each text over its tokens.

    `plan` is [L, B, T], `router_probs` float32 [L, B, T, E], `mask` bool [B, T], `tokens` int32 [B * Q] from `_choose`,
    and `error` float32 [L, B * Q], relative; a value that is not finite counts as ERROR_CAP.
    """
    layers, batch = plan.tier.shape[:2]
    of_tier = plan.tier[..., None] == jnp.arange(len(TIERS), dtype=jnp.int8)[None, None, None]  # [L, B, T, tiers]
    agree = step.agreed(plan, router_probs)
    audited = of_tier.reshape(layers, -1, len(TIERS))[:, tokens] & (tokens >= 0)[None, :, None]
    clipped = jnp.where(error <= ERROR_CAP, error, ERROR_CAP)[..., None]

    def total(values: Array) -> Array:
        dtype = jnp.float32 if values.dtype == jnp.float32 else jnp.int32
        per_text = jnp.sum(values.reshape(layers, batch, -1, len(TIERS)), axis=2, dtype=dtype)
        return jnp.moveaxis(per_text, 1, 0)

    return Tally(
        tokens=jnp.sum(mask, axis=1, dtype=jnp.int32),
        planned=total(of_tier),
        agreed=total(of_tier & agree[..., None]),
        audited=total(audited),
        error=total(jnp.where(audited, clipped, 0.0)),
    )
