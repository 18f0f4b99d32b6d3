"""The decoder: `forward`, a pure function of its parameters (`models.parameters`) and of token ids.

Letters: B sequences, T positions of this call, S positions of the cache, L layers with experts, V vocabulary, D hidden
size, H query heads, G key/value heads, E experts, K experts per token, Q tokens of the batch that are audited.

Architecture: Jiang et al. 2024 (arXiv 2401.04088). What other families do differently are fields of `MoEConfig`: norms
of queries and keys, clipping, biases, gate weights that are not divided by their sum, layers without experts. No family
is known here by its name.

The innermost `jax.named_scope` of every operation is the component that `profiling` reports its time under.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.config import MoEConfig
from models.divided_experts import divided
from models.experts import Engine, expert_outputs
from models.kv_cache import KVCache, extend, visible
from models.layers import rotary_angles
from models.parameters import EXPERT_AXES, Params, with_methods
from models.placement import ONE_DEVICE, Placement
from varjax.routing import Dropped, LayerAnswers, Plan, Routing, resolve, top_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What one call of the decoder gives."""

    logits: jax.Array  # float32[B, T, V], or [B, 1, V] where only the last position was asked for
    router_probs: jax.Array  # float32[L, B, T, E], softmax of the gate
    routing: Routing  # [L, B, T, K], the experts that really ran; E = unused slot
    kv: KVCache | None  # the cache with this call's positions in it, where one was passed
    expert_outputs: jax.Array | None  # [len(expert_outputs_of), B, T, K, D], each slot's gate-weighted expert output
    audit: jax.Array | None = None  # float32[L, Q], `audit_error` of the tokens that were asked for


@partial(jax.jit, static_argnames=("config", "engine", "placement", "last_logits_only", "expert_outputs_of"))
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
    expert_outputs_of: tuple[int, ...] = (),
    audit: jax.Array | None = None,
) -> Output:
    """Logits and routing of `token_ids`.

    Args:
        params: parameters prepared for `engine`.
        placement: where the arrays lie. On several devices every output is divided over `data`, but for the last
            logits; under a plan routing and gate probabilities are whole on each device too, so all of them make the
            same state of it and the next plan, without an exchange.
        token_ids: int32[B, T].
        attention_mask: bool or int[B, T], true for real tokens; padding may stand on either side. None: all are real.
        kv: cache with the positions before these ones; None: `token_ids` are the whole text.
        plan: what is settled before layer 0 (`varjax.plan`); None: the learned router decides everything.
        last_logits_only: compute the head for the last position only.
        expert_outputs_of: layers (0 to L - 1) whose slots' outputs are wanted (costs their experts a second time).
        audit: int32[Q], tokens b * T + t whose experts are also run as the learned router would have it; negative for
            none, which costs nothing.
    """
    mask = jnp.ones(token_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    batch = "batch" if plan is None else None
    token_ids, mask = (placement.constrain(one, batch, None) for one in (token_ids, mask))
    answers = None if plan is None else plan.answers  # large ones are divided over the devices
    plan = None if plan is None else placement.whole(dataclasses.replace(plan, answers=None))
    engine = divided(engine, placement, config.num_experts, EXPERT_AXES)
    with jax.named_scope("scores"):
        if kv is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            seen = visible(positions, positions, mask, config.sliding_window, offset=0)
        else:
            kv, positions = extend(kv, mask)
            offset = kv.length - token_ids.shape[1]
            seen = visible(positions, kv.positions, kv.mask, config.sliding_window, offset)

    model = with_methods(config, params["decoder"])
    with jax.named_scope("norms"):
        x = placement.constrain(model.embed(token_ids), "batch", None, None)
        rotation = rotary_angles(positions, config, x.dtype)
    probs, wanted, audited = [], [], []
    routings: list[Routing] = []
    for place, layer in enumerate(model.layers):
        with jax.named_scope("attention"):
            with jax.named_scope("norms"):
                normed = layer.input_norm(x)
            attended, kv = layer.attention(normed, rotation, seen, kv, place)
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
            # What stands in for an expert is looked up; its rows, which may be divided, are read below.
            index_only = None if known is None else dataclasses.replace(known, answers=known.answers[:0])
            routing, dropped = placement.by_rows(
                partial(_settled, config),
                rows={"probs": layer_probs, "plan": settled},
                whole={"answers": index_only},
            )
            # Padding runs no expert: nobody reads what it would give.
            real = mask[..., None]
            routing = Routing(jnp.where(real, routing.experts, config.num_experts), jnp.where(real, routing.weights, 0))
        flat_routing = jax.tree.map(lambda leaf: leaf.reshape(-1, config.top_k), routing)
        with jax.named_scope("experts"):
            y = engine.apply(flat, flat_routing, params["experts"][index]).reshape(x.shape)
        if known is not None:
            with jax.named_scope("answers"):
                y = y + known.total(dropped).astype(y.dtype)
        if index in expert_outputs_of:
            slots = expert_outputs(engine, flat, flat_routing, params["experts"][index])
            wanted.append(slots.reshape(*token_ids.shape, config.top_k, -1))
        if audit is not None:
            with jax.named_scope("audit"):
                layer_experts = params["experts"][index]
                audited.append(
                    audit_error(audit, flat, layer_probs, y, config=config, engine=engine, experts=layer_experts)
                )
        with jax.named_scope("norms"):
            x = placement.constrain(x + y, "batch", None, None)
        probs.append(layer_probs)
        routings.append(routing)
    with jax.named_scope("norms"):
        x = model.norm(x[:, -1:] if last_logits_only else x)
    with jax.named_scope("head"):
        logits = placement.constrain(model.logits(x), "batch", None, "vocabulary")
        if last_logits_only:  # brought together after the product: else the head would be
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
        expert_outputs=placement.constrain(jnp.stack(wanted), None, "batch", None, None, None) if wanted else None,
        audit=placement.whole(jnp.stack(audited)) if audited else None,
    )


def _settled(
    config: MoEConfig, probs: jax.Array, plan: Plan | None, answers: LayerAnswers | None
) -> tuple[Routing, Dropped]:
    """`resolve` of one layer, whose answers need not hold their outputs."""
    plan = None if plan is None else dataclasses.replace(plan, answers=answers)
    return resolve(probs, config.top_k, plan, config.normalize_top_k)


def audit_error(
    tokens: jax.Array,
    x: jax.Array,
    probs: jax.Array,
    y: jax.Array,
    *,
    config: MoEConfig,
    engine: Engine,
    experts: Any,
) -> jax.Array:
    """float32[Q]: |y - full| / |full| in one layer, Euclidean norms; 0 where a token is negative.

    Args:
        tokens: int32[Q], b * T + t.
        x: [B * T, D], what the experts read.
        probs: float32[B, T, E], softmax of the gate.
        y: [B, T, D], the layer's output, answers included. `full` is that of all K experts of the gate's choice.
        experts: the layer's, prepared for `engine`.
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
    """An architecture, the engine that runs its experts, and where: all of `forward` that is not data."""

    config: MoEConfig
    engine: Engine
    placement: Placement = ONE_DEVICE

    def forward(self, params: Params, token_ids: jax.Array, **options: Any) -> Output:
        """`forward` with this config, engine and placement; `options` are its keyword arguments."""
        own = {"config": self.config, "engine": self.engine, "placement": self.placement}
        return forward(params, token_ids, **own, **options)
