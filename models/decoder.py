"""The decoder: Flax NNX declares its parameters and its per-layer maths, `forward` is a pure function.

Letters: B sequences, T positions of this call, S positions of the cache, L layers with experts, V vocabulary, D hidden
size, H query heads, G key/value heads, E experts, K experts per token.

Architecture: Jiang et al. 2024 (arXiv 2401.04088); rotary embeddings: Su et al. 2021 (arXiv 2104.09864). What other
families do differently are fields of `MoEConfig`: norms of queries and keys, clipping, biases, gate weights that are
not divided by their sum, layers without experts. No family is known here by its name.

Parameters are a plain dict `{"decoder": ..., "experts": [one entry per layer with experts]}`. The experts stand apart
because their engine owns their layout (`models.experts`); `Experts` declares their canonical one. Shapes, random
initialisation, the target of loading and what each of several devices holds (`models.placement`) all derive from these
declarations.

The innermost `jax.named_scope` of every operation is the component that `profiling` reports its time under.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import MoEConfig
from models.divided_experts import divided
from models.experts import Engine, slot_outputs
from models.kv_cache import KVCache, extend, visible
from models.placement import ONE_DEVICE, Placement
from varjax.routing import LayerAnswers, Plan, Routing, resolve, top_k

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What one call of the decoder gives."""

    logits: jax.Array  # float32[B, T, V], or [B, 1, V] where only the last position was asked for
    router_probs: jax.Array  # float32[L, B, T, E], softmax of the gate
    routing: Routing  # [L, B, T, K], the experts that really ran; E = unused slot
    kv: KVCache | None  # the cache with this call's positions in it, where one was passed
    slot_outputs: jax.Array | None  # [len(slot_outputs_of), B, T, K, D], each slot's gate-weighted expert output
    audit: jax.Array | None = None  # float32[L, S], `audit_error` of the tokens that were asked for


def named(*axes: str | None) -> dict[str, Any]:
    """What a parameter says of its axes: their names in `models.placement.AXES`, None for one that is never divided."""
    return {"out_sharding": axes, "eager_sharding": False}  # said, not done: a declaration knows no mesh


def make_linear(inner: int, outer: int, axes: tuple[str | None, str | None], **options: Any) -> nnx.Linear:
    """A projection whose kernel [inner, outer] has axes of these names; a bias is divided as the outer one."""
    return nnx.Linear(inner, outer, kernel_metadata=named(*axes), bias_metadata=named(axes[1]), **options)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, dtype: jnp.dtype, axis: str | None = None):
        self.weight = nnx.Param(jnp.ones(size, dtype), **named(axis))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return self.weight[...] * y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads, rotary positions and an optional sliding window.

    Queries and keys are normalised first, then clipped, then rotated, as far as the config asks for it.
    """

    def __init__(self, config: MoEConfig, linear: Any, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = partial(linear, use_bias=config.attention_bias, rngs=rngs)
        self.q_proj = linear(config.hidden_size, queries, (None, "heads"))
        self.k_proj = linear(config.hidden_size, keys, (None, "kv_heads"))
        self.v_proj = linear(config.hidden_size, keys, (None, "kv_heads"))
        self.o_proj = linear(queries, config.hidden_size, ("heads", None))
        norm = partial(RMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        if config.query_key_norm == "head":
            self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        elif config.query_key_norm == "projection":
            self.q_norm, self.k_norm = norm(queries, axis="heads"), norm(keys, axis="kv_heads")
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        kv: KVCache | None,
        layer: int,
    ) -> tuple[jax.Array, KVCache | None]:
        batch, length, _ = x.shape
        with jax.named_scope("projections"):
            queries, keys, values = self.project(x)
        with jax.named_scope("norms"):
            queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        with jax.named_scope("scores"):
            if kv is None:
                out = attend_causally(queries, keys, values, mask)
            else:
                kv = kv.store(layer, keys, values)
                out = attend(queries, kv.keys[layer], kv.values[layer], mask)
        with jax.named_scope("projections"):
            return self.o_proj(out.reshape(batch, length, -1)), kv

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, head_dim], keys and values [B, T, G, head_dim], not yet rotated."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.query_key_norm == "projection":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = queries.reshape(heads), keys.reshape(heads), values.reshape(heads)
        if self.config.query_key_norm == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if (most := self.config.clip_qkv) is not None:
            queries, keys, values = (jnp.clip(one, -most, most) for one in (queries, keys, values))
        return queries, keys, values


class MLP(nnx.Module):
    """The SwiGLU block of a layer without experts."""

    def __init__(self, config: MoEConfig, linear: Any, rngs: nnx.Rngs):
        self.gate_proj = linear(config.hidden_size, config.dense_size, (None, "dense_size"), rngs=rngs)
        self.up_proj = linear(config.hidden_size, config.dense_size, (None, "dense_size"), rngs=rngs)
        self.down_proj = linear(config.dense_size, config.hidden_size, ("dense_size", None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention, and what comes before the experts; or the `mlp` in their place."""

    def __init__(self, config: MoEConfig, place: int, linear: Any, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, linear, rngs, dtype)
        self.expert_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if place in config.dense_layers:
            self.mlp = MLP(config, linear, rngs)
        else:
            self.gate = linear(config.hidden_size, config.num_experts, (None, None), rngs=rngs)


class Decoder(nnx.Module):
    """Everything but the experts."""

    def __init__(self, config: MoEConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        linear = partial(make_linear, use_bias=False, param_dtype=dtype, kernel_init=init)
        embed = partial(nnx.Embed, param_dtype=dtype, embedding_init=init)
        axes = named("vocabulary", None)
        self.embed = embed(config.vocab_size, config.hidden_size, embedding_metadata=axes, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, place, linear, dtype, rngs) for place in range(config.depth)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size, (None, "vocabulary"), rngs=rngs)


EXPERT_AXES = {"gate": (None, "expert_size"), "up": (None, "expert_size"), "down": ("expert_size", None)}


class Expert(nnx.Module):
    def __init__(self, config: MoEConfig, dtype: jnp.dtype, keys: Iterator[jax.Array]):
        init = nnx.initializers.normal(config.initializer_range)
        inner = (config.hidden_size, config.intermediate_size)
        self.gate = nnx.Param(init(next(keys), inner, dtype), **named(*EXPERT_AXES["gate"]))
        self.up = nnx.Param(init(next(keys), inner, dtype), **named(*EXPERT_AXES["up"]))
        self.down = nnx.Param(init(next(keys), inner[::-1], dtype), **named(*EXPERT_AXES["down"]))


class Experts(nnx.Module):
    """The experts of all layers that have some, in the canonical layout."""

    def __init__(self, config: MoEConfig, dtype: jnp.dtype, key: jax.Array):
        # Not nnx.Rngs: under a trace each of its draws costs more than the last, minutes for a large model.
        keys = (jax.random.fold_in(key, index) for index in itertools.count())
        self.layers = nnx.List(
            [
                nnx.List([Expert(config, dtype, keys) for _ in range(config.num_experts)])
                for _ in range(config.num_layers)
            ]
        )


def init_params(config: MoEConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters in the canonical layout; under `jax.eval_shape` they cost nothing at any size."""
    return _as_params(config, *_declared(config, key, jnp.dtype(dtype)))


def param_shardings(config: MoEConfig, placement: Placement) -> Params:
    """Where each parameter of the canonical layout lies: a NamedSharding each; None each on one device."""
    return jax.tree.map(placement.named, _axis_names(config))


@lru_cache(maxsize=16)
def _axis_names(config: MoEConfig) -> Params:
    """The names of the axes of each parameter of the canonical layout, as a PartitionSpec."""
    states = nnx.eval_shape(lambda: _declared(config, jax.random.key(0), jnp.dtype(jnp.float32)))
    return _as_params(config, *nnx.get_partition_spec(states))


def _declared(config: MoEConfig, key: jax.Array, dtype: jnp.dtype) -> tuple[nnx.State, nnx.State]:
    """The variables of the decoder and of the experts."""
    decoder, experts = Decoder(config, dtype, nnx.Rngs(key)), Experts(config, dtype, jax.random.fold_in(key, 1))
    return nnx.state(decoder), nnx.state(experts)


def _as_params(config: MoEConfig, decoder: nnx.State, experts: nnx.State) -> Params:
    layers = nnx.to_pure_dict(experts)["layers"]
    return {"decoder": nnx.to_pure_dict(decoder), "experts": [layers[index] for index in range(config.num_layers)]}


def prepare(params: Params, engine: Engine) -> Params:
    """Canonical parameters with the experts in the layout of `engine`."""
    return {"decoder": params["decoder"], "experts": [engine.prepare(layer) for layer in params["experts"]]}


@partial(jax.jit, static_argnames=("config", "engine", "placement", "last_logits_only", "slot_outputs_of"))
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
    answers: tuple[LayerAnswers, ...] | None = None,
    last_logits_only: bool = False,
    slot_outputs_of: tuple[int, ...] = (),
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
        answers: one per layer with experts, what stands in for those that the plan drops.
        last_logits_only: compute the head for the last position only.
        slot_outputs_of: layers (0 to L - 1) whose slots' outputs are wanted (costs their experts a second time).
        audit: int32[S], tokens b * T + t whose experts are also run as the learned router would have it; negative for
            none, which costs nothing.
    """
    mask = jnp.ones(token_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    batch = "batch" if plan is None else None
    token_ids, mask = (placement.constrain(one, batch, None) for one in (token_ids, mask))
    plan = placement.whole(plan)
    engine = divided(engine, placement, config.num_experts, EXPERT_AXES)
    with jax.named_scope("scores"):
        if kv is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            seen = visible(positions, positions, mask, config.sliding_window, offset=0)
        else:
            kv, positions = extend(kv, mask)
            offset = kv.length - token_ids.shape[1]
            seen = visible(positions, kv.positions, kv.mask, config.sliding_window, offset)

    model = nnx.merge(_graph(config, params["decoder"]["embed"]["embedding"].dtype), params["decoder"])
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
            # The router sees the normalised hidden state inside this block, not the layer's output.
            layer_probs = jax.nn.softmax(layer.gate(flat).astype(jnp.float32), axis=-1)
            layer_probs = layer_probs.reshape(*token_ids.shape, -1)
            known = None if answers is None else answers[index]
            settled = None if plan is None else plan.layer(index)
            # What stands in for an expert is looked up; its rows, which may be divided, are read below.
            index_only = None if known is None else dataclasses.replace(known, answers=known.answers[:0])
            routing, dropped = placement.by_rows(
                partial(resolve, k=config.top_k, normalise=config.normalise_top_k),
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
        if index in slot_outputs_of:
            slots = slot_outputs(engine, flat, flat_routing, params["experts"][index])
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
        logits = model.embed.attend(x) if config.tie_word_embeddings else model.head(x)
        logits = logits.astype(jnp.float32)
        names = (None, None, None) if last_logits_only else ("batch", None, "vocabulary")
        logits = placement.constrain(logits, *names)
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
        slot_outputs=placement.constrain(jnp.stack(wanted), None, "batch", None, None, None) if wanted else None,
        audit=placement.whole(jnp.stack(audited)) if audited else None,
    )


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
    """float32[S]: |y - full| / |full| in one layer, Euclidean norms; 0 where a token is negative.

    Args:
        tokens: int32[S], b * T + t.
        x: [B * T, D], what the experts read.
        probs: float32[B, T, E], softmax of the gate.
        y: [B, T, D], the layer's output, residual rows included. `full` is that of all K experts of the gate's choice.
        experts: the layer's, prepared for `engine`.
    """
    wanted = (tokens >= 0)[:, None]
    learned = top_k(probs.reshape(-1, config.num_experts)[tokens], config.top_k, config.normalise_top_k)
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


def rotary_angles(positions: jax.Array, config: MoEConfig, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, head_dim] of the rotary angles, computed in float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) / config.rope_theta**exponents
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x` [B, T, heads, head_dim]: halves are paired, as in Hugging Face's checkpoints."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention [B, T, H, head_dim] of queries [B, T, H, head_dim] to keys and values [B, S, G, head_dim].

    `mask` is bool[B, T, S], true where a query sees a key.
    """
    with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 with float32 on the way
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None])


def attend_causally(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` over a whole text, S = T, where no query sees a key that comes after it.

    In at most 8 blocks of queries, each with the keys up to its own end: nearly half of the scores are never computed.
    """
    length = queries.shape[1]
    size = max(-(-length // 8), 64)
    blocks = [
        attend(queries[:, start:end], keys[:, :end], values[:, :end], mask[:, start:end, :end])
        for start in range(0, length, size)
        for end in [min(start + size, length)]
    ]
    return jnp.concatenate(blocks, axis=1)


@lru_cache(maxsize=16)
def _graph(config: MoEConfig, dtype: jnp.dtype) -> Any:
    """The decoder's structure without values; NNX needs it to give a dict of parameters its methods back."""
    # Of the parameters' own dtype: an embedding keeps its dtype as part of the structure.
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0)))
    return nnx.split(abstract)[0]
