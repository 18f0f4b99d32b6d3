"""Where arrays lie when a model runs on several devices: names of axes, and the mesh axes that divide them.

Letters: B sequences, T positions, S cache positions, V vocabulary, H query heads, G key/value heads, F expert size.

    mesh = make_mesh("data=2,model=4")
    placement = Placement.of(config, mesh)
    x = placement.constrain(x, "batch", None, None)        # [B, T, D], B over `data`

Parameters (`models.parameters`), the key/value cache and activations name their axes; `AXES` alone says what a name
means. The maths is written as for one device and JAX divides it, but for the experts (`models.divided_experts`). On one
device (`ONE_DEVICE`) nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.config import MoEConfig
from varjax.errors import InputError
from varjax.routing import LayerAnswers

DATA, MODEL = "data", "model"  # the axes of a mesh
REPLICATED_ANSWERS = 1 << 30  # bytes of a table's answers that every device may hold whole

T = TypeVar("T")


class Axis(NamedTuple):
    """What a name of an axis stands for."""

    over: str  # the axis of the mesh that divides it
    counted_by: str | None = None  # the field of MoEConfig that must be a multiple; None: the array's own size decides
    or_whole: bool = False  # where it is none, every device holds all of it; else the mesh is refused


AXES = {
    "batch": Axis(DATA, or_whole=True),
    "heads": Axis(MODEL, "num_heads"),
    "kv_heads": Axis(MODEL, "num_kv_heads", or_whole=True),
    "vocabulary": Axis(MODEL, "vocab_size", or_whole=True),
    "expert_size": Axis(MODEL, "intermediate_size"),
    "dense_size": Axis(MODEL, "dense_size"),
    "answer": Axis(MODEL, "hidden_size", or_whole=True),  # of a table that is too large for every device
}


class MeshError(InputError):
    """A mesh that cannot be had, or that a model cannot be divided over; names the fix."""


def make_mesh(shape: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a text such as "data=2,model=4" asks for; an axis left out has size 1.

    Args:
        devices: to take the first ones of; None: all that there are.

    Raises:
        MeshError: the text says something else, or there are not so many devices.
    """
    sizes = {DATA: 1, MODEL: 1}
    asked = [re.fullmatch(rf"({DATA}|{MODEL})=([1-9]\d*)", part.strip()) for part in shape.split(",")]
    names = [found[1] for found in asked if found]
    if len(names) < len(asked) or len(set(names)) < len(names):
        raise MeshError(f"mesh {shape!r}: expected something like {DATA}=2,{MODEL}=4, each of the two at most once")
    sizes |= {found[1]: int(found[2]) for found in asked if found}
    present, wanted = jax.devices() if devices is None else devices, math.prod(sizes.values())
    if wanted > len(present):
        raise MeshError(f"mesh {shape!r} needs {wanted} devices, here are {len(present)}; give a smaller one")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=present[:wanted], axis_types=kinds)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays of one architecture lie on a mesh. Hashable, so it can be static under jit."""

    mesh: Mesh | None = None
    rules: tuple[tuple[str, str | None], ...] = ()  # name -> axis of the mesh, None where all devices hold all of it

    @classmethod
    def of(cls, config: MoEConfig, mesh: Mesh | None) -> Placement:
        """That of a model on a mesh with the axes `data` and `model`; None: on one device.

        Raises:
            MeshError: naming what the mesh would have to divide and cannot.
        """
        if mesh is None:
            return ONE_DEVICE
        if set(mesh.axis_names) != {DATA, MODEL}:
            raise MeshError(f"a mesh over {mesh.axis_names}: expected the axes {DATA} and {MODEL} (see make_mesh)")
        rules: dict[str, str | None] = {}
        must: dict[str, int] = {}  # field of the config -> what has to be divided
        for name, axis in AXES.items():
            count = getattr(config, axis.counted_by) if axis.counted_by else None
            if count is not None and not axis.or_whole:
                must[str(axis.counted_by)] = count
            divides = count is None or count % mesh.shape[axis.over] == 0
            rules[name] = axis.over if divides else None
        size, most = mesh.shape[MODEL], math.gcd(*must.values())
        if most % size:
            faults = ", ".join(f"{field}={count}" for field, count in must.items() if count % size)
            raise MeshError(f"{MODEL}={size} does not divide {faults} of this model; give it a divisor of {most}")
        return cls(mesh, tuple(rules.items()))

    def size(self, axis: str) -> int:
        """Devices along an axis of the mesh."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def over(self, *names: str | None) -> PartitionSpec:
        """What divides each axis of a parameter whose axes have these names (None: nothing)."""
        return PartitionSpec(*(None if name is None else dict(self.rules)[name] for name in names))

    def named(self, names: PartitionSpec) -> NamedSharding | None:
        """Where a parameter lies whose axes have these names; None on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.over(*names))

    def spec(self, shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
        """What divides each axis of any array; nothing where the array's own size is no multiple."""
        over = zip(shape, self.over(*names), strict=True)
        return PartitionSpec(*(axis if axis and size % self.size(axis) == 0 else None for size, axis in over))

    def sharding(self, shape: tuple[int, ...], *names: str | None) -> NamedSharding | None:
        """Where any array lies whose axes have these names (None: whole); None on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(shape, *names))

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x` inside a jitted function, divided so."""
        where = self.sharding(x.shape, *names)
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    def whole(self, tree: T) -> T:
        """The arrays inside a jitted function, all of them on every device."""
        return jax.tree.map(lambda leaf: self.constrain(leaf, *[None] * leaf.ndim), tree)

    def by_rows(self, f: Callable[..., T], rows: dict[str, Any], whole: dict[str, Any]) -> T:
        """`f(**rows, **whole)` inside a jitted function, each device for its own sequences and without the others.

        For what JAX would not divide by itself: it brings all rows together for a `top_k`, for one.

        Args:
            rows: arrays [B, ...], whose sequences have nothing to do with each other, and scalars. So are the results.
            whole: what every device needs all of.
        """
        sizes = {len(leaf) for leaf in jax.tree.leaves(rows) if leaf.ndim}
        if self.size(DATA) == 1 or any(size % self.size(DATA) for size in sizes):
            return f(**rows, **whole)
        specs = jax.tree.map(lambda leaf: PartitionSpec(DATA) if leaf.ndim else PartitionSpec(), rows)
        run = jax.shard_map(
            lambda rows, whole: f(**rows, **whole),
            mesh=self.mesh,
            in_specs=(specs, PartitionSpec()),
            out_specs=PartitionSpec(DATA),
            check_vma=False,
        )
        return run(rows, whole)

    def place(self, tree: T) -> T:
        """Arrays outside of jit, moved to the devices, every one of them whole on each.

        The answers of a table (`LayerAnswers`) that are larger than REPLICATED_ANSWERS together are divided: a device
        looks up its part of each row.
        """
        if self.mesh is None:
            return tree
        nodes = jax.tree.leaves(tree, is_leaf=_is_answers)
        large = sum(node.answers.nbytes for node in nodes if _is_answers(node)) > REPLICATED_ANSWERS

        def shardings(node: Any) -> Any:
            every = jax.tree.map(lambda leaf: self.sharding(leaf.shape, *[None] * leaf.ndim), node)
            if large and _is_answers(node):
                every = dataclasses.replace(every, answers=self.sharding(node.answers.shape, None, "answer"))
            return every

        return jax.device_put(tree, jax.tree.map(shardings, tree, is_leaf=_is_answers))


ONE_DEVICE = Placement()


def to_host(x: jax.Array) -> np.ndarray:
    """The array, also where other processes hold parts of it; then all of them have to ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return process_allgather(x, tiled=True)


def _is_answers(node: Any) -> bool:
    return isinstance(node, LayerAnswers)
