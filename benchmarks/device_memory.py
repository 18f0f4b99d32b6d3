"""Compute what each of several devices holds, and what they exchange: the tables of `docs/scaling.md`.

    python -m benchmarks.device_memory                                   # from shapes alone, in half a minute
    python -m benchmarks.device_memory --compile                         # also what XLA says of a decoding step
    python -m benchmarks.device_memory my_model/config.json --devices 2 4

Nothing is loaded and no device is needed: shapes and their division follow from the declarations used by loading and
running (`models.parameters`, `models.placement`). `--compile` divides the program over simulated CPU devices, in
float32: the CPU's compiler would turn bfloat16 weights into copies in float32, which no accelerator does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from analysis.command import path_argument, program
from benchmarks import harness
from models.config import MoEConfig, read_config
from models.decoder import Network
from models.experts import get_engine
from models.kv_cache import AXES, KVCache
from models.model import plain_step
from models.parameters import Params, init_params, param_shardings, prepare
from models.placement import DATA, MODEL, MeshError, Placement, make_mesh
from profiling.published import PUBLISHED

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device of M holds and sends; bytes."""

    devices: int  # M, along `model`
    parameters: int
    whole: int  # of these, what every device holds
    cache: int  # keys and values
    exchanged: float  # sent per token of a step of decoding, all layers


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "configs", nargs="*", type=path_argument, help="config.json of a model (default: three published models)"
    )
    options.add_argument(
        "--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of devices along `model`"
    )
    options.add_argument("--positions", type=int, default=32768, help="number of positions in the key/value cache")
    options.add_argument("--compile", action="store_true", help="also compile a decoding step for these devices")
    options.add_argument("--layers", type=int, default=None, help="number of layers to compile (default: all)")
    args = options.parse_args(arguments)
    if args.compile:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(args.devices))
    models = {str(path): read_config(path) for path in args.configs} or PUBLISHED
    for name, config in models.items():
        print(f"\n{name}\n")
        for line in table(config, args.devices, args.positions, compiled=args.compile, layers=args.layers):
            print(line, flush=True)


def table(config: MoEConfig, devices: list[int], positions: int, *, compiled: bool, layers: int | None) -> Any:
    """The lines of a Markdown table, each as soon as it is known."""
    columns = ["devices", "parameters", "whole on each", f"cache of {positions:,}", "sent per token"]
    if compiled:
        depth = "" if layers is None else f", {layers} layers"
        columns += [f"XLA: arguments (float32{depth})", "by shapes", "temporaries"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for number in devices:
        try:
            one = share(config, number, positions)
        except MeshError as error:
            yield f"| {number} | {error} {'|' * (len(columns) - 1)}"
            continue
        cells = [f"{number}", *(f"{size / GB:.3f} GB" for size in (one.parameters, one.whole, one.cache))]
        cells.append(f"{one.exchanged / 1e3:,.0f} kB")
        if compiled:
            part = config if layers is None else dataclasses.replace(config, num_layers=layers)
            placement = Placement.of(part, make_mesh(f"{MODEL}={number}"))
            memory = compile_decode(part, placement, jnp.float32, batch=1, capacity=positions).memory_analysis()
            cache = abstract_cache(part, placement, jnp.float32, 1, positions)
            shapes = bytes_per_device((abstract_params(part, placement, jnp.float32), cache))
            program = (memory.argument_size_in_bytes, shapes, memory.temp_size_in_bytes)
            cells += [f"{size / GB:.3f} GB" for size in program]
        yield f"| {' | '.join(cells)} |"


def share(config: MoEConfig, devices: int, positions: int, dtype: Any = jnp.bfloat16) -> Share:
    """What a device holds of a model and of a cache of one sequence, and what it sends.

    Raises:
        MeshError: the model cannot be divided over this number of devices.
    """
    mesh: Any = AbstractMesh((1, devices), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)
    placement = Placement.of(config, mesh)
    parameters = abstract_params(config, placement, dtype)
    return Share(
        devices=devices,
        parameters=bytes_per_device(parameters),
        whole=bytes_per_device([leaf for leaf in jax.tree.leaves(parameters) if not any(leaf.sharding.spec)]),
        cache=bytes_per_device(abstract_cache(config, placement, dtype, 1, positions)),
        exchanged=exchanged(config, devices, jnp.dtype(dtype).itemsize),
    )


def exchanged(config: MoEConfig, devices: int, itemsize: int) -> float:
    """Bytes that a device sends per token of a step of decoding, with sums and gathers along a ring.

    Every layer sums its attention's and its experts' outputs [D] over the devices, and the embedding is such a sum too:
    2 (M - 1) / M times the array for each device. The logits [V], float32, are brought together: (M - 1) / M times.
    """
    sums = (1 + 2 * config.depth) * config.hidden_size * itemsize
    return (2 * sums + 4 * config.vocab_size) * (devices - 1) / devices


def abstract_params(config: MoEConfig, placement: Placement, dtype: Any) -> Params:
    """The canonical parameters as shapes, each with its sharding."""
    return jax.tree.map(_placed, _shapes(config, jnp.dtype(dtype)), param_shardings(config, placement))


@lru_cache(maxsize=4)
def _shapes(config: MoEConfig, dtype: jnp.dtype) -> Params:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def abstract_cache(config: MoEConfig, placement: Placement, dtype: Any, batch: int, capacity: int) -> KVCache:
    """A key/value cache as shapes, each with its sharding."""
    shapes = jax.eval_shape(lambda: KVCache.empty(config, batch, capacity, jnp.dtype(dtype)))
    names = (AXES if leaf.ndim == len(AXES) else [None] * leaf.ndim for leaf in jax.tree.leaves(shapes))
    return jax.tree.map(lambda leaf: _placed(leaf, placement.sharding(leaf.shape, *next(names))), shapes)


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with a sharding each, all devices holding equally much."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_decode(config: MoEConfig, placement: Placement, dtype: Any, batch: int, capacity: int) -> Any:
    """A step of decoding of the plain model, compiled for the devices of the placement. No array is made."""
    engine = get_engine()
    params = prepare(abstract_params(config, placement, dtype), engine)
    kv = abstract_cache(config, placement, dtype, batch, capacity)
    ids, mask = (
        jax.ShapeDtypeStruct((batch, 1), kind, sharding=placement.sharding((batch, 1), None, None))
        for kind in (jnp.int32, jnp.bool)
    )
    return plain_step.lower(params, kv, ids, mask, Network(config, engine, placement)).compile()


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


if __name__ == "__main__":
    main()
