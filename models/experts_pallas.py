"""The `pallas` engine: two kernels for NVIDIA GPUs, whose work follows the active assignments.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments, R rows of a block,
S blocks at most.

Assignments are sorted by expert and cut into blocks of R rows that never mix experts. A table lists the blocks, those
in use first. The grid has S programs because its size must be known beforehand; those beyond the blocks in use exit at
once, so unused slots cost nothing. One kernel computes `silu(x @ gate) * (x @ up)` for the rows of a block and some
columns, and gathers the rows itself. The other multiplies that by `down` and the gate's weight and writes each row to
the place of its assignment. Weights are stacked: gate and up [E, D, F], down [E, F, D].

Few tokens fill few blocks, and with few programs a GPU does not reach its memory bandwidth. Tiles are then narrower,
and `down` divides the depth of its product among P programs, each with a row of its own in the result; the sum over the
slots of a token adds them up.

Products accumulate in float32, at `jax_default_matmul_precision`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from models.experts_blocks import apply_blocks_backward, sort_by_expert
from models.parts import in_parts
from models.triton import PROGRAMS, backend
from varjax.routing import Routing

Stacked = dict[str, jax.Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]


class _Tiles(NamedTuple):
    """The work of one program of a kernel."""

    rows: int  # R
    columns: int  # of a product's result; gate and up share them
    depth: int  # of a product at a time, for numbers of two bytes; half of it for four bytes
    warps: int
    stages: int  # steps along the depth whose operands are in flight


# The largest number of rows per expert under an even load -> tiles, which vLLM tuned for Mixtral on an H200 at 1, 64
# and 256 tokens. A program takes at most 96 KiB of shared memory on Ampere, 144 KiB on Hopper and Blackwell.
_TILES = (
    (4, _Tiles(rows=16, columns=128, depth=128, warps=4, stages=3)),
    (32, _Tiles(rows=32, columns=128, depth=128, warps=4, stages=3)),
    (None, _Tiles(rows=128, columns=256, depth=64, warps=8, stages=3)),
)
_NARROWEST = 64  # columns of a tile: 32 of gate and 32 of up, of which each row is 64 bytes in bfloat16
_HIDDEN_BYTES = 1 << 29  # of the activations [A, F] between the kernels; more tokens run in parts, one after the other


class _Blocks(NamedTuple):
    """The table of blocks, those in use first; for a single token, one block per slot in the order of the slots."""

    experts: jax.Array  # int32[S]; E: not in use
    starts: jax.Array  # int32[S], the first of a block's places in `order`
    ends: jax.Array  # int32[S], the place after the last one of its expert
    order: jax.Array  # int32[A], assignments by expert


def stack_experts(experts: dict[int, dict[str, Any]]) -> Stacked:
    """Stack the experts of a layer, in a copy.

    Args:
        experts: the canonical layout of a layer, of arrays or of their PartitionSpecs.

    Returns:
        Each array with a leading axis of experts; a PartitionSpec with a leading None.
    """
    ordered = [experts[index] for index in sorted(experts)]
    return {name: _stack([expert[name] for expert in ordered]) for name in ordered[0]}


def _stack(leaves: list[Any]) -> Any:
    return PartitionSpec(None, *leaves[0]) if isinstance(leaves[0], PartitionSpec) else jnp.stack(leaves)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def apply_pallas(x: jax.Array, routing: Routing, experts: Stacked, interpret: bool = False) -> jax.Array:
    """Compute the weighted sum of each token's experts. Differentiable in `x`, the weights and the experts.

    Gradients are computed by the `blocks` engine, from a copy of the experts.

    Args:
        x: [N, D].
        routing: [N, K].
        experts: the layer's experts, stacked.
        interpret: run the kernels as JAX operations, on any device and slowly, for tests.

    Returns:
        [N, D] in the dtype of `x`.
    """
    parts = -(-routing.experts.size * experts["gate"].shape[2] * x.dtype.itemsize // _HIDDEN_BYTES)
    if parts <= 1:
        return _apply(x, routing, experts, interpret)
    rows = -(-len(x) // parts)

    def part(first: jax.Array) -> jax.Array:
        own = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=rows)
        return _apply(own(x), jax.tree.map(own, routing), experts, interpret)

    return in_parts(part, x, rows, axis=0)


def _apply(x: jax.Array, routing: Routing, experts: Stacked, interpret: bool) -> jax.Array:
    """`apply_pallas` of so few tokens that all of their hidden activations are held."""
    num_experts, size, hidden_size = experts["down"].shape
    tiles = _choose_tiles(routing.experts.size, num_experts, x.dtype.itemsize)
    live = _most_blocks(len(x), num_experts, tiles.rows)  # blocks if every token keeps one expert
    with jax.named_scope("dispatch"):
        blocks = _block_table(routing, num_experts, tiles.rows)
    first, second = (tiles._replace(columns=_columns(tiles.columns, of, live)) for of in (2 * size, hidden_size))
    hidden = _gate_and_up(x, experts, blocks, routing.experts.shape[1], first, interpret)
    slots = _down(hidden, routing.weights, experts, blocks, second, live, interpret)
    with jax.named_scope("dispatch"):
        # The kernels write no rows of unused slots.
        used = (routing.experts < num_experts)[..., None, None]
        return jnp.where(used, slots.reshape(*routing.experts.shape, -1, hidden_size), 0).sum((1, 2)).astype(x.dtype)


def _choose_tiles(slots: int, num_experts: int, itemsize: int) -> _Tiles:
    """The tiles for N * K slots, used or not, and numbers of `itemsize` bytes."""
    tiles = next(tiles for most, tiles in _TILES if most is None or slots / num_experts <= most)
    return tiles._replace(depth=tiles.depth * 2 // itemsize)


def _columns(most: int, size: int, live: int) -> int:
    """The columns of a tile, of `size`: at most `most`, fewer where `live` blocks would start few programs."""
    while most > _NARROWEST and live * pl.cdiv(size, most) < PROGRAMS:
        most //= 2
    return most


def _block_table(routing: Routing, num_experts: int, rows: int) -> _Blocks:
    """The blocks of `rows` rows that hold all used slots of `routing` [N, K]."""
    slots = routing.experts.size
    if len(routing.experts) == 1:  # nothing to sort: each slot is a block
        places = np.arange(slots, dtype=np.int32)  # a constant, which XLA makes once for all layers
        return _Blocks(routing.experts[0], *map(jnp.asarray, (places, places + 1, places)))
    by_expert = sort_by_expert(routing, num_experts)
    blocks = (by_expert.ends - by_expert.starts + rows - 1) // rows
    last_block = jnp.cumsum(blocks, dtype=jnp.int32)
    block = jnp.arange(_most_blocks(slots, num_experts, rows), dtype=jnp.int32)
    experts = (last_block <= block[:, None]).sum(1, dtype=jnp.int32)
    first = by_expert.starts - (last_block - blocks) * rows  # block b of expert e begins at first[e] + b * rows
    starts, ends = (of.at[experts].get(mode="clip") for of in (first, by_expert.ends))
    return _Blocks(experts, starts + block * rows, ends, by_expert.order)


def _most_blocks(slots: int, num_experts: int, rows: int) -> int:
    """S: an expert with n > 0 rows fills at most 1 + (n - 1) / R blocks, and min(E, N * K) experts have any."""
    hit = min(num_experts, slots)
    return hit + (slots - hit) // rows


def _gate_and_up(
    x: jax.Array, experts: Stacked, blocks: _Blocks, num_slots: int, tiles: _Tiles, interpret: bool
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
    x: jax.Array, weights: jax.Array, experts: Stacked, blocks: _Blocks, tiles: _Tiles, live: int, interpret: bool
) -> jax.Array:
    """float32[A * P, D] in the order of the slots, weighted, for `x` [A, F] in the order of `blocks`.

    The P rows of a slot add up to its output; those of unused slots are uninitialized.
    """
    num_experts, size, hidden = experts["down"].shape
    columns, depth = _fitting(tiles.columns, hidden), _fitting(tiles.depth, size)
    steps, wanted = pl.cdiv(size, depth), pl.cdiv(PROGRAMS, live * pl.cdiv(hidden, columns))
    own = max(steps // wanted, 1)  # steps along the depth of one program
    parts = pl.cdiv(steps, own)

    def kernel(experts: Any, starts: Any, ends: Any, order: Any, x: Any, weights: Any, down: Any, out: Any) -> None:
        expert, start, end = (of[pl.program_id(0)] for of in (experts, starts, ends))
        column, part = pl.program_id(1) * columns, pl.program_id(2)

        @pl.when(expert < num_experts)
        def _() -> None:
            places, inside = _rows(start, end, tiles.rows)
            assignments = order[places]

            def step(index: jax.Array, total: jax.Array) -> jax.Array:
                left = _gathered(x, places, index * depth, depth)
                return total + _dot(left, _tile(down, expert, index * depth, depth, column, columns))

            zeros = jnp.zeros((tiles.rows, columns), jnp.float32)
            if parts == 1:  # constant bounds
                total = jax.lax.fori_loop(0, steps, step, zeros)
            else:
                first = part * own
                total = jax.lax.fori_loop(first, jnp.minimum(first + own, steps), step, zeros)
            _put(out, assignments * parts + part, inside, column, weights[assignments][:, None] * total)

    out = jax.ShapeDtypeStruct((len(blocks.order) * parts, hidden), jnp.float32)
    run = _call(kernel, out, (len(blocks.experts), pl.cdiv(hidden, columns), parts), tiles, "down", interpret)
    return run(*blocks, x, weights.reshape(-1).astype(jnp.float32), experts["down"])


def _call(
    kernel: Callable[..., None], out: Any, grid: tuple[int, ...], tiles: _Tiles, name: str, interpret: bool
) -> Callable[..., jax.Array]:
    """Calls the kernel with whole arrays. Neighboring programs of one expert read the same weights."""
    params = backend.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return pl.pallas_call(kernel, out, grid=grid, compiler_params=params, name=name, interpret=interpret)


def _fitting(tile: int, size: int) -> int:
    """A tile no larger than a small array needs; Triton multiplies at least 16 by 16 numbers, and powers of two."""
    return min(tile, max(16, pl.next_power_of_2(size)))


def _rows(start: jax.Array, end: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The places of a block in the order, int32[R], and which of them belong to its expert, bool[R].

    Places that do not are replaced by the first one, so that reading them is safe.
    """
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
    """Writes the `values` [R, C] that are inside `array` [A, .], from a column on, in its dtype."""
    columns = column + jnp.arange(values.shape[1], dtype=jnp.int32)
    rows = jnp.where(inside, rows, array.shape[0])  # beyond the array, and masked
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
