"""The parameters of a model, declared once.

Parameters are a plain dict `{"decoder": ..., "experts": [one entry per layer with experts]}`, in the canonical layout:
`params["experts"][layer][expert]` is `{"gate": [D, F], "up": [D, F], "down": [F, D]}` with hidden size D and expert
size F. An engine may keep the experts in a layout of its own (`prepare`). Shapes, random initialization, loading and
the division over devices (`models.placement`) all derive from these declarations.
"""

from __future__ import annotations

import itertools
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from models.config import MoEConfig
from models.experts import Engine
from models.layers import MLP, Attention, RMSNorm, make_linear, named
from models.placement import Placement

Params = dict[str, Any]

EXPERT_AXES = {"gate": (None, "expert_size"), "up": (None, "expert_size"), "down": ("expert_size", None)}

# Products whose result is compared or goes through a softmax stay in float32 when weights and inputs are bfloat16:
# rounded to 8 bits, close experts or tokens tie or change places.
_TO_FLOAT32: dict[str, Any] = {"preferred_element_type": jnp.float32}


class _DecoderLayer(nnx.Module):
    """Attention and what comes before the experts; `mlp` replaces the gate in a layer without experts."""

    def __init__(self, config: MoEConfig, place: int, linear: Any, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, linear, rngs, dtype)
        self.expert_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if place in config.dense_layers:
            self.mlp = MLP(config, linear, rngs)
        else:
            self.gate = linear(config.hidden_size, config.num_experts, (None, None), **_TO_FLOAT32, rngs=rngs)


class Decoder(nnx.Module):
    """Everything but the experts: embedding, layers with attention and gate, final norm and head.

    Args:
        config: the architecture.
        dtype: of the parameters.
        rngs: random numbers for the initialization.
    """

    def __init__(self, config: MoEConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        linear = partial(make_linear, use_bias=False, param_dtype=dtype, kernel_init=init)
        embed = partial(nnx.Embed, param_dtype=dtype, embedding_init=init)
        axes = named("vocabulary", None)
        self.embed = embed(config.vocab_size, config.hidden_size, embedding_metadata=axes, rngs=rngs)
        self.layers = nnx.List([_DecoderLayer(config, place, linear, dtype, rngs) for place in range(config.depth)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size, (None, "vocabulary"), **_TO_FLOAT32, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        """Compute the logits of hidden states.

        Args:
            x: [..., D], after the final norm.

        Returns:
            float32[..., V] over the vocabulary.
        """
        if hasattr(self, "head"):
            return self.head(x)
        return jnp.einsum("...d,vd->...v", x, self.embed.embedding[...], **_TO_FLOAT32)


def init_params(config: MoEConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Draw random parameters.

    Args:
        config: the architecture.
        key: a PRNG key.
        dtype: of the parameters.

    Returns:
        Parameters in the canonical layout.
    """
    decoder = nnx.to_pure_dict(nnx.state(Decoder(config, jnp.dtype(dtype), nnx.Rngs(key))))
    init, of_experts = nnx.initializers.normal(config.initializer_range), jax.random.fold_in(key, 1)
    keys = (jax.random.fold_in(of_experts, index) for index in itertools.count())

    def expert() -> dict[str, jax.Array]:
        return {name: init(next(keys), shape, dtype) for name, shape in _expert_shapes(config).items()}

    return {"decoder": decoder, "experts": _of_experts(config, expert)}


def param_shapes(config: MoEConfig, dtype: Any = jnp.float32) -> Params:
    """Describe the parameters of an architecture of any size without allocating them.

    Args:
        config: the architecture.
        dtype: of the parameters.

    Returns:
        A `jax.ShapeDtypeStruct` for each parameter of the canonical layout.
    """
    state = nnx.eval_shape(lambda: nnx.state(Decoder(config, jnp.dtype(dtype), nnx.Rngs(0))))
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in _expert_shapes(config).items()}
    decoder = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    return {"decoder": decoder, "experts": _of_experts(config, lambda: dict(shapes))}


def param_shardings(config: MoEConfig, placement: Placement) -> Params:
    """Find how each parameter is divided over the devices of a placement.

    Args:
        config: the architecture.
        placement: the devices.

    Returns:
        A NamedSharding for each parameter of the canonical layout, or None for each on one device.
    """
    return jax.tree.map(placement.named, _axis_names(config))


@lru_cache(maxsize=16)
def _axis_names(config: MoEConfig) -> Params:
    """The names of the axes of each parameter of the canonical layout, as a PartitionSpec."""
    state = nnx.eval_shape(lambda: nnx.state(Decoder(config, jnp.dtype(jnp.float32), nnx.Rngs(0))))
    specs = {name: PartitionSpec(*axes) for name, axes in EXPERT_AXES.items()}
    decoder = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return {"decoder": decoder, "experts": _of_experts(config, lambda: dict(specs))}


def _expert_shapes(config: MoEConfig) -> dict[str, tuple[int, int]]:
    inner, outer = config.hidden_size, config.intermediate_size
    return {"gate": (inner, outer), "up": (inner, outer), "down": (outer, inner)}


def _of_experts(config: MoEConfig, make: Any) -> list[dict[int, Any]]:
    """What `make` returns, called once per expert, for the layers with experts."""
    return [{expert: make() for expert in range(config.num_experts)} for _ in range(config.num_layers)]


def prepare(params: Params, engine: Engine, donate: bool = False) -> Params:
    """Convert the experts to the layout of an engine.

    Args:
        params: parameters in the canonical layout.
        engine: the engine that is to run the experts.
        donate: remove the experts from `params` layer by layer, so an engine that copies them needs room for one
            additional layer instead of for all.

    Returns:
        The parameters with the experts in the layout of `engine`.
    """
    layers = params["experts"] if donate else list(params["experts"])
    experts = []
    while layers:
        experts.append(engine.prepare(layers.pop(0)))
        if donate:
            jax.block_until_ready(experts[-1])
    return {"decoder": params["decoder"], "experts": experts}


def with_methods(config: MoEConfig, decoder: Params) -> Decoder:
    """Give the parameters of a decoder the methods of its layers.

    Args:
        config: the architecture.
        decoder: the entry "decoder" of the parameters.

    Returns:
        The `Decoder` with these parameters.
    """
    return nnx.merge(_structure(config, decoder["embed"]["embedding"].dtype), decoder)


@lru_cache(maxsize=16)
def _structure(config: MoEConfig, dtype: jnp.dtype) -> Any:
    # With the dtype of the parameters, because an embedding keeps its dtype as part of the structure.
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0))))[0]
