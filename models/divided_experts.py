"""An expert engine on several devices: each holds a slice of every expert, and runs the same blocks on it.

Letters: N tokens, D hidden size, F expert size, K slots per token, M devices along `model`.

A device has columns F/M of each expert's gate and up and the same rows of its down, runs its engine on them as if that
were all, and the devices add up what came out: one sum of [N, D] per layer, as attention needs one too. Tokens are
divided over `data`; those of a device are all that it sorts and runs.

Experts could also be given to devices whole. Dividing each of them has three advantages. The weights keep the engine's
layout, one array per expert, which no assignment to owners could as one JAX array. All devices have equally much to do
whatever the gate and the plan say, so what VAR leaves out is saved by all of them: with owners the slowest device
decides, and of eight devices at most K have anything to do when one token is decoded. And what crosses the wire is the
same. The price: products of F/M columns, narrow for models with many small experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from models.experts import Engine, ExpertParams
from models.placement import MODEL, Placement
from varjax.routing import Routing


def divided(
    engine: Engine, placement: Placement, num_experts: int, axes: Mapping[str, tuple[str | None, ...]]
) -> Engine:
    """`engine` on the devices of a placement; itself on one device.

    The engine's `prepare` also lays out what divides the weights: a PartitionSpec in the place of each array. One that
    only orders the experts can do that as it is; one that stacks them stacks these too.

    Args:
        axes: the names of the axes of an expert's weights, `{"gate": (None, "expert_size"), ...}`.
    """
    if placement.mesh is None:
        return engine
    expert: Any = {name: placement.over(*names) for name, names in axes.items()}
    specs = engine.prepare(dict.fromkeys(range(num_experts), expert))
    return dataclasses.replace(engine, apply=partial(_apply, engine=engine, placement=placement, specs=specs))


def _apply(
    x: jax.Array, routing: Routing, experts: ExpertParams, *, engine: Engine, placement: Placement, specs: Any
) -> jax.Array:
    def one_device(x: jax.Array, routing: Routing, experts: ExpertParams) -> jax.Array:
        part = engine.apply(x, routing, experts)
        return jax.lax.psum(part, MODEL) if placement.size(MODEL) > 1 else part

    rows = placement.spec(x.shape, "batch", None)
    # check_vma: the engine's loops begin with zeros, which the checker takes for equal on all devices.
    run = jax.shard_map(one_device, mesh=placement.mesh, in_specs=(rows, rows, specs), out_specs=rows, check_vma=False)
    return run(x, routing, experts)
