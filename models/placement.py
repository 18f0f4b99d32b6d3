"""How arrays are divided when a model runs on several devices: names of axes, and the mesh axes that divide them.

Letters: B sequences, T positions, S cache positions, V vocabulary, H query heads, G key/value heads, F expert size.

    mesh = make_mesh("data=2,model=4")
    placement = Placement.of(config, mesh)
    x = placement.constrain(x, "batch", None, None)        # [B, T, D], B over `data`

Parameters (`models.parameters`), the key/value cache and activations name their axes, and `AXES` alone defines what a
name means. The code is written as for one device and JAX divides it, except for the experts (`models.experts.divided`).
On one device (`ONE_DEVICE`) nothing here has an effect.
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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from models.config import MoEConfig
from varjax.errors import InputError
from varjax.routing import LayerAnswers

DATA, MODEL = "data", "model"  # the axes of a mesh
REPLICATED_ANSWERS = 1 << 30  # bytes; larger answers of a table are divided over the devices

T = TypeVar("T")


class _Axis(NamedTuple):
    """The meaning of an axis name."""

    over: str  # the axis of the mesh that divides it
    counted_by: str | None = None  # the field of MoEConfig that must be a multiple; None: the array's own size decides
    or_whole: bool = False  # where it is not a multiple, every device holds all of it; else the mesh is refused


AXES = {
    "batch": _Axis(DATA, or_whole=True),
    "heads": _Axis(MODEL, "num_heads"),
    "kv_heads": _Axis(MODEL, "num_kv_heads", or_whole=True),
    "vocabulary": _Axis(MODEL, "vocab_size", or_whole=True),
    "expert_size": _Axis(MODEL, "intermediate_size"),
    "dense_size": _Axis(MODEL, "dense_size"),
    "answer": _Axis(MODEL, "hidden_size", or_whole=True),  # of a table that is too large for every device
}


class MeshError(InputError):
    """A mesh that cannot be made, or that a model cannot be divided over. Names the fix."""


def make_mesh(shape: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of devices.

    Args:
        shape: such as "data=2,model=4"; an axis that is left out has size 1.
        devices: the first of these are used; None: all devices.

    Returns:
        The mesh with the axes `data` and `model`.

    Raises:
        MeshError: `shape` has another form, or there are too few devices.
    """
    sizes = {DATA: 1, MODEL: 1}
    asked = [re.fullmatch(rf"({DATA}|{MODEL})=([1-9]\d*)", part.strip()) for part in shape.split(",")]
    names = [found[1] for found in asked if found]
    if len(names) < len(asked) or len(set(names)) < len(names):
        raise MeshError(f"mesh {shape!r}: expected something like {DATA}=2,{MODEL}=4, each of the two at most once")
    sizes |= {found[1]: int(found[2]) for found in asked if found}
    present, wanted = jax.devices() if devices is None else devices, math.prod(sizes.values())
    if wanted > len(present):
        raise MeshError(f"mesh {shape!r} needs {wanted} devices, there are {len(present)}; give a smaller one")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=present[:wanted], axis_types=kinds)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays of an architecture are divided over a mesh. Hashable, so it can be static under jit."""

    mesh: Mesh | None = None
    rules: tuple[tuple[str, str | None], ...] = ()  # name -> axis of the mesh; None: not divided

    @classmethod
    def of(cls, config: MoEConfig, mesh: Mesh | AbstractMesh | None) -> Placement:
        """Divide an architecture over a mesh.

        Args:
            config: the architecture.
            mesh: with the axes `data` and `model` (`make_mesh`), abstract to find shapes only; None: one device.

        Returns:
            The placement.

        Raises:
            MeshError: the mesh cannot divide the architecture; names the fields and the fix.
        """
        if mesh is None:
            return ONE_DEVICE
        if set(mesh.axis_names) != {DATA, MODEL}:
            raise MeshError(f"a mesh over {mesh.axis_names}: expected the axes {DATA} and {MODEL} (see make_mesh)")
        rules: dict[str, str | None] = {}
        must: dict[str, int] = {}  # field of the config -> the number that has to be divided
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
        return cls(mesh, tuple(rules.items()))  # type: ignore[arg-type]  # an abstract one is for shapes only

    @property
    def local_devices(self) -> Sequence[jax.Device]:
        """The devices of this process that hold arrays."""
        return jax.local_devices()[:1] if self.mesh is None else self.mesh.local_devices

    def _size(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def over(self, *names: str | None) -> PartitionSpec:
        """Find the mesh axes that divide a parameter.

        Args:
            names: of the parameter's axes; None: not divided.

        Returns:
            The mesh axis of each.
        """
        return PartitionSpec(*(None if name is None else dict(self.rules)[name] for name in names))

    def sharding(self, shape: tuple[int, ...], *names: str | None) -> NamedSharding | None:
        """Find the sharding of an array. An axis whose size is not a multiple of the devices is not divided.

        Args:
            shape: of the array.
            names: of its axes; None: not divided.

        Returns:
            The sharding; None on one device.
        """
        if self.mesh is None:
            return None
        over = zip(shape, self.over(*names), strict=True)
        spec = PartitionSpec(*(axis if axis and size % self._size(axis) == 0 else None for size, axis in over))
        return NamedSharding(self.mesh, spec)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Divide an array inside a jitted function.

        Args:
            x: the array.
            names: of its axes; None: not divided.

        Returns:
            The array with the constraint.
        """
        where = self.sharding(x.shape, *names)
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    def whole(self, tree: T) -> T:
        """Keep arrays whole on every device inside a jitted function.

        Args:
            tree: a pytree of arrays.

        Returns:
            The arrays with the constraint.
        """
        return jax.tree.map(lambda leaf: self.constrain(leaf, *[None] * leaf.ndim), tree)

    def by_rows(self, f: Callable[..., T], rows: dict[str, Any], whole: dict[str, Any]) -> T:
        """Compute `f(**rows, **whole)` inside a jitted function, each device for its own sequences.

        JAX would gather all rows for some operations, such as `top_k`.

        Args:
            f: treats every sequence independently of the others.
            rows: arrays [B, ...] and scalars.
            whole: arrays that every device needs completely.

        Returns:
            The result, arrays [B, ...].
        """
        sizes = {len(leaf) for leaf in jax.tree.leaves(rows) if leaf.ndim}
        if self._size(DATA) == 1 or any(size % self._size(DATA) for size in sizes):
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
        """Move arrays to the devices, outside of jit, each array whole on every device.

        Answers of a table (`LayerAnswers`) that together are larger than REPLICATED_ANSWERS are divided: a device looks
        up its part of each row.

        Args:
            tree: a pytree of arrays.

        Returns:
            The pytree on the devices; `tree` itself on one device.
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
    """Copy an array to the host. If other processes hold parts of it, all processes must call this.

    Args:
        x: an array on any devices.

    Returns:
        The whole array.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return process_allgather(x, tiled=True)


def _is_answers(node: Any) -> bool:
    return isinstance(node, LayerAnswers)
