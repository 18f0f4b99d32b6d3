"""The parameters of a model, declared once.

Parameters are a plain dict `{"decoder": ..., "experts": [one entry per layer with experts]}`. The experts stand apart
because their engine owns their layout (`models.experts`); `Experts` declares their canonical one. Shapes, random
initialization, the target of loading and what each of several devices holds (`models.placement`) all derive from these
declarations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import MoEConfig
from models.experts import Engine
from models.layers import MLP, Attention, RMSNorm, make_linear, named
from models.placement import Placement

Params = dict[str, Any]


# A product whose result is compared, or goes through a softmax, stays in float32 when weights and inputs are bfloat16:
# rounded to 8 bits, close experts or tokens tie or change places.
TO_FLOAT32: dict[str, Any] = {"preferred_element_type": jnp.float32}


class DecoderLayer(nnx.Module):
    """Attention, and what comes before the experts; or the `mlp` in their place."""

    def __init__(self, config: MoEConfig, place: int, linear: Any, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, linear, rngs, dtype)
        self.expert_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if place in config.dense_layers:
            self.mlp = MLP(config, linear, rngs)
        else:
            self.gate = linear(config.hidden_size, config.num_experts, (None, None), **TO_FLOAT32, rngs=rngs)


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
            self.head = linear(config.hidden_size, config.vocab_size, (None, "vocabulary"), **TO_FLOAT32, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [..., V] of normalized hidden states [..., D]."""
        if hasattr(self, "head"):
            return self.head(x)
        return jnp.einsum("...d,vd->...v", x, self.embed.embedding[...], **TO_FLOAT32)


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


def prepare(params: Params, engine: Engine, donate: bool = False) -> Params:
    """Canonical parameters with the experts in the layout of `engine`.

    Args:
        donate: `params` lets go of its experts layer by layer, so an engine that copies them needs room for one layer
            more, not for all.
    """
    layers = params["experts"] if donate else list(params["experts"])
    experts = []
    while layers:
        experts.append(engine.prepare(layers.pop(0)))
        if donate:
            jax.block_until_ready(experts[-1])
    return {"decoder": params["decoder"], "experts": experts}


def with_methods(config: MoEConfig, decoder: Params) -> Any:
    """The `Decoder` whose parameters these are (the entry "decoder"), with the methods of its layers."""
    return nnx.merge(_structure(config, decoder["embed"]["embedding"].dtype), decoder)


@lru_cache(maxsize=16)
def _structure(config: MoEConfig, dtype: jnp.dtype) -> Any:
    # Of the parameters' own dtype: an embedding keeps its dtype as part of the structure.
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0))))[0]
