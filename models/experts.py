"""Expert engines: the sum of each token's experts, weighted, behind one interface.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments.

An engine owns the layout of its weights. `prepare` takes the canonical layout of one layer, a dict
`{expert: {"gate": [D, F], "up": [D, F], "down": [F, D]}}`, and returns whatever `apply` wants. An expert is a
SwiGLU block, `(silu(x @ gate) * (x @ up)) @ down` (Shazeer 2020, arXiv 2002.05202). Slots whose expert id is E are
unused and cost nothing in an engine whose work follows the active assignments.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models import experts_pallas
from models.experts_blocks import apply_blocks
from varjax.errors import InputError
from varjax.routing import Routing

ExpertParams = Any  # a pytree in the engine's own layout


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way of running the experts of a layer. Hashable, so it can be static under jit."""

    name: str
    prepare: Callable[[dict[int, dict[str, jax.Array]]], ExpertParams]
    apply: Callable[[jax.Array, Routing, ExpertParams], jax.Array]  # [N, D], [N, K], params -> [N, D]
    obstacle: Callable[[Any], str | None] = lambda device: None  # why it cannot run on a jax.Device; None: it can


def get_engine(implementation: str | None = None) -> Engine:
    """The engine called `implementation`; None: what `default_engine` chooses for the first device.

    An engine that is named is the one that runs, or fails. Raises InputError for an unknown name.
    """
    if implementation is None:
        return default_engine(jax.devices()[0])
    if implementation not in ENGINES:
        raise InputError(f"implementation={implementation!r} is not an expert engine; choose one of {sorted(ENGINES)}")
    return ENGINES[implementation]


PREFERRED = {"gpu": ("pallas", "blocks")}  # platform -> engines, the best one first
ANYWHERE = ("blocks",)  # on other platforms


def default_engine(device: Any) -> Engine:
    """The engine for a `jax.Device`: on a GPU "pallas", or "blocks" where that cannot run; elsewhere "blocks".

    Warns (once, as Python's warnings do) where it had to fall back, and says why.
    """
    names = PREFERRED.get(device.platform, ANYWHERE)
    obstacles = {name: ENGINES[name].obstacle(device) for name in names}
    chosen = next(name for name in names if obstacles[name] is None)
    for name in names[: names.index(chosen)]:
        warnings.warn(f"experts run on the engine {chosen!r}, not {name!r}: {obstacles[name]}", stacklevel=2)
    return ENGINES[chosen]


def pallas_engine(interpret: bool = False) -> Engine:
    """The engine "pallas"; with `interpret` it runs on any device, slowly: for tests."""
    apply = partial(experts_pallas.apply_pallas, interpret=interpret)
    return Engine("pallas", experts_pallas.stack_experts, apply, experts_pallas.obstacle)


def expert_outputs(engine: Engine, x: jax.Array, routing: Routing, params: ExpertParams) -> jax.Array:
    """Each slot's gate-weighted expert output, [N, K, D]: what `apply` would add up, kept apart.

    Every assignment is handed to the engine as a token of its own, so the work is that of one `apply`.
    """
    num_tokens, num_slots = routing.experts.shape
    single = Routing(routing.experts.reshape(-1, 1), routing.weights.reshape(-1, 1))
    outputs = engine.apply(jnp.repeat(x, num_slots, axis=0), single, params)
    return outputs.reshape(num_tokens, num_slots, -1)


def _in_order(experts: dict[int, dict[str, jax.Array]]) -> tuple[dict[str, jax.Array], ...]:
    return tuple(experts[index] for index in sorted(experts))


def _apply_reference(x: jax.Array, routing: Routing, params: tuple[dict[str, jax.Array], ...]) -> jax.Array:
    """Every expert on every token, masked by its weight: obvious, and E / K times the work."""
    out = jnp.zeros(x.shape, jnp.float32)
    for index, expert in enumerate(params):
        gate = jnp.dot(x, expert["gate"], preferred_element_type=jnp.float32)
        up = jnp.dot(x, expert["up"], preferred_element_type=jnp.float32)
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        y = jnp.dot(hidden, expert["down"], preferred_element_type=jnp.float32)
        chosen = routing.experts == index
        weight = jnp.where(chosen, routing.weights, 0).sum(-1, keepdims=True).astype(jnp.float32)
        out += jnp.where(chosen.any(-1, keepdims=True), weight * y, 0)
    return out.astype(x.dtype)


ENGINES = {
    "reference": Engine("reference", _in_order, _apply_reference),
    "blocks": Engine("blocks", _in_order, apply_blocks),
    "pallas": pallas_engine(),
}
