"""Expert engines: the weighted sum of each token's experts, behind one interface.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments.

An expert is a SwiGLU block, `(silu(x @ gate) * (x @ up)) @ down` (Shazeer 2020, arXiv 2002.05202). An engine owns the
layout of its weights: `prepare` converts the canonical layout of one layer, a dict
`{expert: {"gate": [D, F], "up": [D, F], "down": [F, D]}}`, to whatever `apply` reads. Slots whose expert id is E are
unused and cost nothing in an engine whose work follows the active assignments. An engine may also bring an attention
of its own.

On several devices (`divided`) every device holds columns F/M of each expert's gate and up and the same rows of its
down, M being the devices along `model`. It runs its engine on them as if they were whole experts, and the results
[N, D] are summed over the devices, once per layer. docs/scaling.md says why experts are not assigned as a whole.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models import attention_pallas, experts_pallas, triton
from models.attention import Sight, attend
from models.experts_blocks import apply_blocks
from models.placement import MODEL, Placement
from varjax.errors import InputError
from varjax.routing import Routing

ExpertParams = Any  # a pytree in the engine's own layout


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way of running a layer's experts, and its attention. Hashable, so it can be static under jit."""

    name: str
    prepare: Callable[[dict[int, dict[str, jax.Array]]], ExpertParams]
    apply: Callable[[jax.Array, Routing, ExpertParams], jax.Array]  # [N, D], [N, K], params -> [N, D]
    attend: Callable[[jax.Array, jax.Array, jax.Array, Sight], jax.Array] = attend  # as `models.attention.attend`
    obstacle: Callable[[Any], str | None] = lambda device: None  # why it cannot run on a jax.Device; None: it can


def get_engine(implementation: str | None = None) -> Engine:
    """Find an engine by its name.

    Args:
        implementation: the name, which is never replaced by another one; None: the best one for the first device.

    Returns:
        The engine.

    Raises:
        InputError: there is no engine of that name.
    """
    if implementation is None:
        return _default_engine(jax.devices()[0])
    if implementation not in ENGINES:
        raise InputError(f"implementation={implementation!r} is not an expert engine; choose one of {sorted(ENGINES)}")
    return ENGINES[implementation]


def _default_engine(device: Any) -> Engine:
    """The engine "pallas" on a GPU that can run it, else "blocks"; a warning says why a GPU does without "pallas"."""
    if device.platform != "gpu":
        return ENGINES["blocks"]
    if (obstacle := ENGINES["pallas"].obstacle(device)) is None:
        return ENGINES["pallas"]
    warnings.warn(f"experts run on the engine 'blocks', not 'pallas': {obstacle}", stacklevel=2)
    return ENGINES["blocks"]


def _pallas_engine(interpret: bool = False) -> Engine:
    """The engine "pallas"; `interpret` runs its kernels as JAX operations, on any device and slowly, for tests."""
    apply, attend = (
        partial(run, interpret=interpret) for run in (experts_pallas.apply_pallas, attention_pallas.attend)
    )
    return Engine("pallas", experts_pallas.stack_experts, apply, attend, triton.obstacle)


def expert_outputs(engine: Engine, x: jax.Array, routing: Routing, params: ExpertParams) -> jax.Array:
    """Compute the gate-weighted expert output of each slot, which `engine.apply` would add up.

    Args:
        engine: what runs the experts.
        x: [N, D], the input of the experts.
        routing: [N, K], experts and weights.
        params: the layer's experts in the layout of `engine`.

    Returns:
        [N, K, D].
    """
    num_tokens, num_slots = routing.experts.shape
    # Every assignment becomes a token of its own, so the work is the same as in one `apply`.
    single = Routing(routing.experts.reshape(-1, 1), routing.weights.reshape(-1, 1))
    outputs = engine.apply(jnp.repeat(x, num_slots, axis=0), single, params)
    return outputs.reshape(num_tokens, num_slots, -1)


def divided(
    engine: Engine, placement: Placement, num_experts: int, axes: Mapping[str, tuple[str | None, ...]]
) -> Engine:
    """Run an engine on the devices of a placement, each with its part of every expert.

    Args:
        engine: whose `prepare` only orders or stacks the experts, because it is applied to PartitionSpecs too.
        placement: the devices.
        num_experts: E.
        axes: the names of the axes of an expert's weights, `{"gate": (None, "expert_size"), ...}`.

    Returns:
        The engine on these devices; `engine` itself on one device.
    """
    if placement.mesh is None:
        return engine
    expert: Any = {name: placement.over(*names) for name, names in axes.items()}
    specs = engine.prepare(dict.fromkeys(range(num_experts), expert))
    apply = partial(_apply_divided, engine=engine, placement=placement, specs=specs)
    return dataclasses.replace(engine, apply=apply, attend=attend)  # what XLA divides over the heads by itself


def _apply_divided(
    x: jax.Array, routing: Routing, experts: ExpertParams, *, engine: Engine, placement: Placement, specs: Any
) -> jax.Array:
    mesh: Any = placement.mesh

    def one_device(x: jax.Array, routing: Routing, experts: ExpertParams) -> jax.Array:
        part = engine.apply(x, routing, experts)
        return jax.lax.psum(part, MODEL) if mesh.shape[MODEL] > 1 else part

    over_rows: Any = placement.sharding(x.shape, "batch", None)
    rows = over_rows.spec
    # check_vma: the engine's loops begin with zeros, which the checker considers equal on all devices.
    run = jax.shard_map(one_device, mesh=mesh, in_specs=(rows, rows, specs), out_specs=rows, check_vma=False)
    return run(x, routing, experts)


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
    "pallas": _pallas_engine(),
}
