"""The decoder: `forward`, a pure function of its parameters (`models.parameters`) and of token ids.

Letters: B sequences, T positions of this call, S positions of the cache, L layers with experts, V vocabulary, D hidden
size, H query heads, G key/value heads, E experts, K experts per token, Q tokens of the batch that are audited.

Architecture: Jiang et al. 2024 (arXiv 2401.04088). The differences of other families are fields of `MoEConfig`: norms
of queries and keys, clipping, biases, gate weights that are not divided by their sum, layers without experts. The code
never asks for a family by name.

`profiling` reports the time of every operation under its innermost `jax.named_scope`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.attention import Sight
from models.config import MoEConfig
from models.experts import Engine, divided, expert_outputs
from models.kv_cache import KVCache
from models.layers import rotary_angles, with_methods
from models.parameters import EXPERT_AXES, Params
from models.placement import ONE_DEVICE, Placement
from varjax.routing import Dropped, LayerAnswers, Plan, Routing, resolve, top_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertRecord:
    """What the experts of one layer read and gave."""

    inputs: jax.Array  # [B, T, D], the normalized hidden state
    outputs: jax.Array  # [B, T, K, D], each slot's gate-weighted expert output, 0 in an unused slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The results of one call of the decoder."""

    logits: jax.Array  # float32[B, T, V], or [B, 1, V] where only the last position was asked for
    router_probs: jax.Array  # float32[L, B, T, E], softmax of the gate
    routing: Routing  # [L, B, T, K], the experts that ran; E = unused slot
    kv: KVCache | None  # the cache with this call's positions added, if a cache was passed
    recorded: tuple[ExpertRecord, ...] = ()  # of the layers `recorded_layers`
    audit: jax.Array | None = None  # float32[L, Q], error |y - full| / |full| of each layer's output; see `forward`


@partial(jax.jit, static_argnames=("config", "engine", "placement", "last_logits_only", "recorded_layers"))
def forward(
    params: Params,
    token_ids: jax.Array,
    *,
    config: MoEConfig,
    engine: Engine,
    placement: Placement = ONE_DEVICE,
    attention_mask: jax.Array | None = None,
    kv: KVCache | None = None,
    plan: Plan | None = None,
    last_logits_only: bool = False,
    recorded_layers: tuple[int, ...] = (),
    audit: jax.Array | None = None,
) -> Output:
    """Run the decoder on token ids.

    Args:
        params: parameters prepared for `engine` (`models.parameters.prepare`).
        token_ids: int32[B, T].
        config: the architecture.
        engine: what runs the experts.
        placement: the devices. On several devices every output is divided over `data`, except for the last logits.
            Under a plan, routing and gate probabilities are whole on each device, so that all devices compute the same
            state and the same next plan without an exchange.
        attention_mask: bool or int[B, T], true for real tokens; padding may be on either side. None: all are real.
        kv: cache of the earlier positions; None: `token_ids` are whole texts.
        plan: what is decided before layer 0 (`varjax.plan`), with its answers; None: the learned router decides
            everything.
        last_logits_only: compute the logits of the last position only.
        recorded_layers: layers (0 to L - 1), ascending, whose `ExpertRecord` is returned. Their output is the sum of
            the slots' outputs, so it may differ from that of the engine by rounding.
        audit: int32[Q], tokens b * T + t whose experts are also run as the learned router chooses, to measure the error
            of the layer's output y against this full output; negative entries are skipped and give 0.

    Returns:
        The results; `kv` itself stays valid.
    """
    mask = jnp.ones(token_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    batch = "batch" if plan is None else None
    token_ids, mask = (placement.constrain(one, batch, None) for one in (token_ids, mask))
    answers = None if plan is None else plan.answers  # kept apart: large answers are divided over the devices
    plan = None if plan is None else placement.whole(dataclasses.replace(plan, answers=None))
    engine = divided(engine, placement, config.num_experts, EXPERT_AXES)
    with jax.named_scope("scores"):
        if kv is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            sight = Sight(positions, positions, mask, None, config.sliding_window)
        else:
            kv, positions = _extend(kv, mask)
            offset = kv.length - token_ids.shape[1]
            sight = Sight(positions, kv.positions, kv.mask, offset, config.sliding_window)

    model = with_methods(config, params["decoder"])
    with jax.named_scope("norms"):
        x = placement.constrain(model.embed(token_ids), "batch", None, None)
        rotation = rotary_angles(positions, config, x.dtype)
    probs, recorded, audited = [], [], []
    routings: list[Routing] = []
    for place, layer in enumerate(model.layers):
        with jax.named_scope("attention"):
            with jax.named_scope("norms"):
                normed = layer.input_norm(x)
            attended, kv = layer.attention(normed, rotation, sight, kv, place, engine.attend)
        with jax.named_scope("norms"):
            x = x + attended
            normed = placement.constrain(layer.expert_norm(x), "batch", None, None)
        if place in config.dense_layers:
            with jax.named_scope("experts"):
                dense = layer.mlp(normed)
            with jax.named_scope("norms"):
                x = x + dense
            continue
        index = len(routings)  # among the layers with experts
        flat = normed.reshape(-1, config.hidden_size)
        with jax.named_scope("gate"):
            # The router sees the normalized hidden state inside this block, not the layer's output.
            layer_probs = jax.nn.softmax(layer.gate(flat), axis=-1)
            layer_probs = layer_probs.reshape(*token_ids.shape, -1)
            known = None if answers is None else answers[index]
            settled = None if plan is None else plan.layer(index)
            # `resolve` only needs to know which answers there are; their rows, which may be divided, are read below.
            index_only = None if known is None else dataclasses.replace(known, answers=known.answers[:0])
            routing, dropped = placement.by_rows(
                partial(_resolved, config),
                rows={"probs": layer_probs, "plan": settled, "inputs": normed},
                whole={"answers": index_only},
            )
            # Padding runs no expert, because nobody reads the result.
            real = mask[..., None]
            routing = Routing(jnp.where(real, routing.experts, config.num_experts), jnp.where(real, routing.weights, 0))
        flat_routing = jax.tree.map(lambda leaf: leaf.reshape(-1, config.top_k), routing)
        with jax.named_scope("experts"):
            if index in recorded_layers:
                slots = expert_outputs(engine, flat, flat_routing, params["experts"][index])
                slots = placement.constrain(slots.reshape(*x.shape[:2], *slots.shape[1:]), "batch", None, None, None)
                recorded.append(ExpertRecord(normed, slots))
                y = slots.sum(2, dtype=jnp.float32).astype(x.dtype)
            else:
                y = engine.apply(flat, flat_routing, params["experts"][index]).reshape(x.shape)
        if known is not None:
            with jax.named_scope("answers"):
                y = y + known.total(dropped).astype(y.dtype)
        if audit is not None:
            with jax.named_scope("audit"):
                audited.append(_audit_error(audit, flat, layer_probs, y, config, engine, params["experts"][index]))
        with jax.named_scope("norms"):
            x = placement.constrain(x + y, "batch", None, None)
        probs.append(layer_probs)
        routings.append(routing)
    with jax.named_scope("norms"):
        x = model.norm(x[:, -1:] if last_logits_only else x)
    with jax.named_scope("head"):
        logits = placement.constrain(model.logits(x), "batch", None, "vocabulary")
        if last_logits_only:  # gathered after the product, because otherwise JAX gathers the weights
            logits = placement.constrain(logits, None, None, None)
    with jax.named_scope("gate"):
        router_probs = placement.constrain(jnp.stack(probs), None, batch, None, None)
        routing = jax.tree.map(
            lambda *leaves: placement.constrain(jnp.stack(leaves), None, batch, None, None), *routings
        )
    return Output(
        logits=logits,
        router_probs=router_probs,
        routing=routing,
        kv=None if kv is None else kv.constrain(placement),
        recorded=tuple(recorded),
        audit=placement.whole(jnp.stack(audited)) if audited else None,
    )


def _extend(kv: KVCache, mask: jax.Array) -> tuple[KVCache, jax.Array]:
    """Take T more slots into use; returns the cache and the new tokens' positions int32[B, T].

    A position counts the real tokens before it, so padding on either side does not shift it. The keys and values of the
    new slots are still to be stored.
    """
    before = kv.mask.sum(axis=1, dtype=jnp.int32)
    positions = jnp.maximum(before[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    start = (jnp.int32(0), kv.length)
    kv = dataclasses.replace(
        kv,
        mask=jax.lax.dynamic_update_slice(kv.mask, mask, start),
        positions=jax.lax.dynamic_update_slice(kv.positions, positions, start),
        length=kv.length + mask.shape[1],
    )
    return kv, positions


def _resolved(
    config: MoEConfig, probs: jax.Array, plan: Plan | None, inputs: jax.Array, answers: LayerAnswers | None
) -> tuple[Routing, Dropped]:
    """`resolve` of one layer; the answers may come without their rows."""
    plan = None if plan is None else dataclasses.replace(plan, answers=answers)
    return resolve(probs, config.top_k, plan, config.normalize_top_k, inputs)


def _audit_error(
    tokens: jax.Array, x: jax.Array, probs: jax.Array, y: jax.Array, config: MoEConfig, engine: Engine, experts: Any
) -> jax.Array:
    """float32[Q]: |y - full| / |full| in one layer, Euclidean norms; 0 where a token is negative.

    `tokens` is int32[Q], the experts' input `x` [B * T, D], the gate's `probs` float32[B, T, E] and the layer's output
    `y` [B, T, D], answers included. `full` is the output of all K experts that the gate chooses.
    """
    wanted = (tokens >= 0)[:, None]
    learned = top_k(probs.reshape(-1, config.num_experts)[tokens], config.top_k, config.normalize_top_k)
    routing = Routing(jnp.where(wanted, learned.experts, config.num_experts), jnp.where(wanted, learned.weights, 0))
    full = engine.apply(x[tokens], routing, experts).astype(jnp.float32)
    missed = y.reshape(x.shape)[tokens].astype(jnp.float32) - full
    size = jnp.maximum(jnp.linalg.norm(full, axis=-1), jnp.finfo(jnp.float32).tiny)
    return jnp.where(wanted[:, 0], jnp.linalg.norm(missed, axis=-1) / size, 0)


@dataclasses.dataclass(frozen=True)
class Network:
    """Everything that `forward` needs besides data: architecture, engine and devices. Hashable, so static under jit."""

    config: MoEConfig
    engine: Engine
    placement: Placement = ONE_DEVICE

    def forward(self, params: Params, token_ids: jax.Array, **options: Any) -> Output:
        """Call `forward` with this config, engine and placement.

        Args:
            params: parameters prepared for the engine.
            token_ids: int32[B, T].
            options: the other keyword arguments of `forward`.

        Returns:
            The results.
        """
        own = {"config": self.config, "engine": self.engine, "placement": self.placement}
        return forward(params, token_ids, **own, **options)
