"""The `pallas` engine: two kernels for NVIDIA GPUs, whose work follows the active assignments.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments, R rows of a block,
S blocks at most.

Assignments are sorted by expert and cut into blocks of R rows that never mix experts. A table names the blocks in use,
those first; the grid has S of them because its size must be known beforehand, and those beyond the ones in use exit at
once, so unused slots cost nothing. One kernel makes `silu(x @ gate) * (x @ up)` of a block's rows and of some columns,
gathering the rows itself; the other multiplies that by `down` and by the gate's weight and puts each row in its
assignment's place. Weights are stacked, gate and up [E, D, F], down [E, F, D].

Products accumulate in float32, at `jax_default_matmul_precision`. The kernels are written for the Triton backend of
Pallas, which knows Ampere and Hopper alike; jax from 0.11 on calls it deprecated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from models.experts_blocks import apply_blocks_backward, sort_by_expert
from varjax.routing import Routing

try:
    from jax.experimental.pallas import triton as backend
except ImportError:  # a jax that has done away with it: `obstacle` says so
    backend = None  # type: ignore[assignment]

Stacked = dict[str, jax.Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]


class Tiles(NamedTuple):
    """How much one program of a kernel works on."""

    rows: int  # R
    columns: int  # of a product's result; gate and up share them
    depth: int  # of a product at a time, for numbers of two bytes; half of it for four
    warps: int
    stages: int  # steps along the depth whose operands are in flight


# Rows that an expert gets if all get equally many, at most; tiles. They are those that vLLM tuned for Mixtral on an
# H200 at 1, 64 and 256 tokens. A program takes 96 KiB of shared memory at most on Ampere, 144 on Hopper and Blackwell.
TILES = (
    (4, Tiles(rows=16, columns=128, depth=128, warps=4, stages=3)),
    (32, Tiles(rows=32, columns=128, depth=128, warps=4, stages=3)),
    (None, Tiles(rows=128, columns=256, depth=64, warps=8, stages=3)),
)
CAPABILITY = (8, 0)  # the least compute capability: Ampere, which multiplies bfloat16


class Blocks(NamedTuple):
    """The table of blocks, those in use first; of a token alone, a block for each slot where it stands."""

    experts: jax.Array  # int32[S]; E: not in use
    starts: jax.Array  # int32[S], the first of a block's places in `order`
    ends: jax.Array  # int32[S], the place after the last of its expert
    order: jax.Array  # int32[A], assignments by expert


def obstacle(device: Any) -> str | None:
    """Why the engine cannot run on a `jax.Device`; None: it can."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if backend is None:
        return f"jax {jax.__version__} has no Triton backend for Pallas"
    if capability is None:
        return f"{device.device_kind} is no NVIDIA GPU"
    if tuple(map(int, capability.groups())) < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"{device.device_kind} has compute capability {capability[0]}; it needs {least} or more"
    return None


def stack_experts(experts: dict[int, dict[str, Any]]) -> Stacked:
    """The canonical layout of a layer, stacked: a copy. PartitionSpecs in the place of arrays are stacked likewise."""
    ordered = [experts[index] for index in sorted(experts)]
    return {name: _stack([expert[name] for expert in ordered]) for name in ordered[0]}


def _stack(leaves: list[Any]) -> Any:
    return PartitionSpec(None, *leaves[0]) if isinstance(leaves[0], PartitionSpec) else jnp.stack(leaves)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def apply_pallas(x: jax.Array, routing: Routing, experts: Stacked, interpret: bool = False) -> jax.Array:
    """The weighted sum of each token's experts, `[N, D]`, for `x` `[N, D]` and `routing` `[N, K]`.

    The result has the dtype of `x`. Differentiable in `x`, the weights and the experts; gradients are those of the
    `blocks` engine, which takes a copy of the experts apart for them.

    Args:
        interpret: run the kernels as JAX operations, on any device and slowly: for tests.
    """
    num_experts = len(experts["gate"])
    tiles = choose_tiles(routing.experts.size, num_experts, x.dtype.itemsize)
    with jax.named_scope("dispatch"):
        blocks = block_table(routing, num_experts, tiles.rows)
    hidden = _gate_and_up(x, experts, blocks, routing.experts.shape[1], tiles, interpret)
    slots = _down(hidden, routing.weights, experts, blocks, tiles, interpret)
    with jax.named_scope("dispatch"):
        # Nobody wrote the rows of unused slots.
        used = (routing.experts < num_experts)[..., None]
        return jnp.where(used, slots.reshape(*routing.experts.shape, -1), 0).sum(1).astype(x.dtype)


def choose_tiles(slots: int, num_experts: int, itemsize: int) -> Tiles:
    """Those for N * K slots, used or not, and numbers of so many bytes."""
    tiles = next(tiles for most, tiles in TILES if most is None or slots / num_experts <= most)
    return tiles._replace(depth=tiles.depth * 2 // itemsize)


def block_table(routing: Routing, num_experts: int, rows: int) -> Blocks:
    """The blocks of `rows` rows that hold all used slots of `routing` [N, K]."""
    slots = routing.experts.size
    if len(routing.experts) == 1:  # nothing to sort: each slot is a block
        places = jnp.arange(slots, dtype=jnp.int32)
        return Blocks(routing.experts[0], places, places + 1, places)
    by_expert = sort_by_expert(routing, num_experts)
    blocks = (by_expert.ends - by_expert.starts + rows - 1) // rows
    last_block = jnp.cumsum(blocks, dtype=jnp.int32)
    block = jnp.arange(most_blocks(slots, num_experts, rows), dtype=jnp.int32)
    experts = (last_block <= block[:, None]).sum(1, dtype=jnp.int32)
    first = by_expert.starts - (last_block - blocks) * rows  # place of the expert's block 0, counted over all experts
    starts, ends = (of.at[experts].get(mode="clip") for of in (first, by_expert.ends))
    return Blocks(experts, starts + block * rows, ends, by_expert.order)


def most_blocks(slots: int, num_experts: int, rows: int) -> int:
    """S: an expert with n > 0 rows fills at most 1 + (n - 1) / R blocks, and at most min(E, N * K) experts have any."""
    hit = min(num_experts, slots)
    return hit + (slots - hit) // rows


def _gate_and_up(
    x: jax.Array, experts: Stacked, blocks: Blocks, num_slots: int, tiles: Tiles, interpret: bool
) -> jax.Array:
    """[A, F] in the order of `blocks`, in the dtype of `x`."""
    num_experts, hidden, size = experts["gate"].shape
    columns, depth = _fitting(tiles.columns // 2, size), _fitting(tiles.depth, hidden)

    def kernel(experts: Any, starts: Any, ends: Any, order: Any, x: Any, gate: Any, up: Any, out: Any) -> None:
        expert, start, end = (of[pl.program_id(0)] for of in (experts, starts, ends))
        column = pl.program_id(1) * columns

        @pl.when(expert < num_experts)
        def _() -> None:
            places, inside = _rows(start, end, tiles.rows)
            tokens = order[places] // num_slots

            def step(index: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                left = _gathered(x, tokens, index * depth, depth)
                gates, ups = (_tile(of, expert, index * depth, depth, column, columns) for of in (gate, up))
                return sums[0] + _dot(left, gates), sums[1] + _dot(left, ups)

            zeros = jnp.zeros((tiles.rows, columns), jnp.float32)
            gates, ups = jax.lax.fori_loop(0, pl.cdiv(hidden, depth), step, (zeros, zeros))
            _put(out, places, inside, column, gates * (1 / (1 + jnp.exp(-gates))) * ups)

    out = jax.ShapeDtypeStruct((len(blocks.order), size), x.dtype)
    run = _call(kernel, out, (len(blocks.experts), pl.cdiv(size, columns)), tiles, "gate_and_up", interpret)
    return run(*blocks, x, experts["gate"], experts["up"])


def _down(
    x: jax.Array, weights: jax.Array, experts: Stacked, blocks: Blocks, tiles: Tiles, interpret: bool
) -> jax.Array:
    """float32[A, D] in the order of the slots, weighted; rows of unused slots are whatever was there before.

    Args:
        x: [A, F] in the order of `blocks`.
    """
    num_experts, size, hidden = experts["down"].shape
    columns, depth = _fitting(tiles.columns, hidden), _fitting(tiles.depth, size)

    def kernel(experts: Any, starts: Any, ends: Any, order: Any, x: Any, weights: Any, down: Any, out: Any) -> None:
        expert, start, end = (of[pl.program_id(0)] for of in (experts, starts, ends))
        column = pl.program_id(1) * columns

        @pl.when(expert < num_experts)
        def _() -> None:
            places, inside = _rows(start, end, tiles.rows)
            assignments = order[places]

            def step(index: jax.Array, total: jax.Array) -> jax.Array:
                left = _gathered(x, places, index * depth, depth)
                return total + _dot(left, _tile(down, expert, index * depth, depth, column, columns))

            zeros = jnp.zeros((tiles.rows, columns), jnp.float32)
            total = jax.lax.fori_loop(0, pl.cdiv(size, depth), step, zeros)
            _put(out, assignments, inside, column, weights[assignments][:, None] * total)

    out = jax.ShapeDtypeStruct((len(blocks.order), hidden), jnp.float32)
    run = _call(kernel, out, (len(blocks.experts), pl.cdiv(hidden, columns)), tiles, "down", interpret)
    return run(*blocks, x, weights.reshape(-1).astype(jnp.float32), experts["down"])


def _call(
    kernel: Callable[..., None], out: Any, grid: tuple[int, int], tiles: Tiles, name: str, interpret: bool
) -> Callable[..., jax.Array]:
    """The kernel on whole arrays, in which it finds its place. Neighbors of one expert read the same weights."""
    params = backend.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return pl.pallas_call(kernel, out, grid=grid, compiler_params=params, name=name, interpret=interpret)


def _fitting(tile: int, size: int) -> int:
    """No more than a small array needs; Triton multiplies at least 16 numbers by 16, and powers of two."""
    return min(tile, max(16, pl.next_power_of_2(size)))


def _rows(start: jax.Array, end: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """int32[R], the places of a block in the order, the first again where they are not its expert's; bool[R]: are."""
    places = start + jnp.arange(rows, dtype=jnp.int32)
    return jnp.where(places < end, places, start), places < end


def _gathered(array: Any, rows: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """[R, length] of [., .]; zeros beyond its columns."""
    columns = start + jnp.arange(length, dtype=jnp.int32)
    index = jnp.broadcast_to(rows[:, None], (len(rows), length)), jnp.broadcast_to(columns, (len(rows), length))
    if array.shape[1] % length == 0:
        return backend.load(array.at[index])
    return backend.load(array.at[index], mask=index[1] < array.shape[1], other=0)


def _tile(array: Any, expert: jax.Array, row: jax.Array, rows: int, column: jax.Array, columns: int) -> jax.Array:
    """[rows, columns] of one expert of [E, ., .]; zeros beyond its ends."""
    tile = array.at[expert, pl.ds(row, rows), pl.ds(column, columns)]
    if array.shape[1] % rows == 0 and array.shape[2] % columns == 0:
        return backend.load(tile)
    inside = (row + jnp.arange(rows, dtype=jnp.int32) < array.shape[1])[:, None]
    inside &= (column + jnp.arange(columns, dtype=jnp.int32) < array.shape[2])[None, :]
    return backend.load(tile, mask=inside, other=0)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _put(array: Any, rows: jax.Array, inside: jax.Array, column: jax.Array, values: jax.Array) -> None:
    """Writes those of `values` [R, C] that are inside of `array` [A, .], from a column on, in its dtype."""
    columns = column + jnp.arange(values.shape[1], dtype=jnp.int32)
    rows = jnp.where(inside, rows, array.shape[0])  # nowhere
    index = jnp.broadcast_to(rows[:, None], values.shape), jnp.broadcast_to(columns, values.shape)
    mask = inside[:, None] & (columns < array.shape[1])[None, :]
    backend.store(array.at[index], values.astype(array.dtype), mask=mask)


_Saved = tuple[jax.Array, Routing, Stacked]


def _forward(x: jax.Array, routing: Routing, experts: Stacked, interpret: bool) -> tuple[jax.Array, _Saved]:
    return apply_pallas(x, routing, experts, interpret), (x, routing, experts)


def _backward(interpret: bool, saved: _Saved, out_grad: jax.Array) -> _Saved:
    x, routing, stacked = saved
    apart = tuple({name: of[index] for name, of in stacked.items()} for index in range(len(stacked["gate"])))
    x_grad, routing_grad, grads = apply_blocks_backward((x, routing, apart), out_grad)
    return x_grad, routing_grad, {name: jnp.stack([grad[name] for grad in grads]) for name in stacked}


apply_pallas.defvjp(_forward, _backward)
