"""The parameters of a model, declared once.

Parameters are a plain dict `{"decoder": ..., "experts": [one entry per layer with experts]}`, in the canonical layout:
`params["experts"][layer][expert]` is `{"gate": [D, F], "up": [D, F], "down": [F, D]}` with hidden size D and expert
size F. An engine may keep the experts in a layout of its own (`prepare`). Shapes, random initialization, loading and
the division over devices (`models.placement`) all derive from these declarations.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models.config import MoEConfig
from models.experts import Engine
from models.layers import Decoder
from models.placement import Placement

Params = dict[str, Any]

EXPERT_AXES = {"gate": (None, "expert_size"), "up": (None, "expert_size"), "down": ("expert_size", None)}


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

    def sharding(names: PartitionSpec) -> NamedSharding | None:
        return None if placement.mesh is None else NamedSharding(placement.mesh, placement.over(*names))

    return jax.tree.map(sharding, _axis_names(config))


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
