"""The `blocks` engine: work follows the active assignments, whatever the routing.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments, R rows of a block.

Assignments are sorted by expert and cut into blocks that never mix experts: large blocks, and smaller ones for the
rest. A flat loop runs over the blocks in use; their number is traced, so unused slots cost nothing. Inside,
`lax.switch` picks the expert, so XLA sees plain matrix products with whole weight arrays and copies none of them. The
program contains every expert once per block size, which determines the compile time; the number of tokens and slots
does not. Never `vmap` over this engine: a batched switch computes every branch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from varjax.routing import Routing

Expert = dict[str, jax.Array]  # gate [D, F], up [D, F], down [F, D]
_READING = 24  # reading an expert's weights takes about as long as computing this many rows
_Branch = Callable[[jax.Array], jax.Array]  # one expert: [R, D] -> float32[R, D]


class ByExpert(NamedTuple):
    """Assignments sorted by expert, with unused slots last."""

    order: jax.Array  # int32[A + padding], padded so that a block never runs off the end
    starts: jax.Array  # int32[E], an expert's first row in that order
    ends: jax.Array  # int32[E], the row after its last
    nowhere: int  # A, an index beyond all assignments


@jax.custom_vjp
def apply_blocks(x: jax.Array, routing: Routing, experts: tuple[Expert, ...]) -> jax.Array:
    """Compute the weighted sum of each token's experts. Differentiable in `x`, the weights and the experts.

    Args:
        x: [N, D].
        routing: [N, K].
        experts: the layer's experts in order.

    Returns:
        [N, D] in the dtype of `x`; products accumulate in float32.
    """
    branches: list[_Branch] = [partial(_swiglu, expert) for expert in experts]
    run = _one_token if len(x) == 1 else _many_tokens
    return run(x, routing, branches).astype(x.dtype)


def _one_token(x: jax.Array, routing: Routing, branches: list[_Branch]) -> jax.Array:
    """float32[1, D]. With one token there is nothing to sort."""

    def adding(branch: _Branch) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda total, weight: total + weight * branch(x)

    choices = [*map(adding, branches), lambda total, weight: total]  # the last one is for an unused slot

    def run_slot(total: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        expert, weight = slot
        return lax.switch(expert, choices, total, weight), None

    slots = routing.experts[0], routing.weights[0].astype(jnp.float32)
    return lax.scan(run_slot, jnp.zeros(x.shape, jnp.float32), slots)[0]


def _many_tokens(x: jax.Array, routing: Routing, branches: list[_Branch]) -> jax.Array:
    """float32[N, D]."""
    num_slots = routing.experts.shape[1]
    sizes = block_sizes(routing.experts.size, len(branches))
    with jax.named_scope("dispatch"):
        by_expert = sort_by_expert(routing, len(branches), padding=sizes[0])
        weights = routing.weights.reshape(-1, 1).astype(jnp.float32)

    def run_blocks(rows: int, starts: jax.Array, blocks: jax.Array, total: jax.Array) -> jax.Array:
        """Runs `blocks` int32[E] blocks of `rows` rows of each expert, beginning at row `starts` int32[E]."""
        # Blocks are numbered over all experts; expert e has numbers last_block[e - 1] to last_block[e] - 1. Block b of
        # expert e begins at row starts[e] + (b - last_block[e - 1]) * rows, which is first_row[e] + b * rows.
        last_block = jnp.cumsum(blocks, dtype=jnp.int32)
        first_row = starts - (last_block - blocks) * rows

        def run_block(block: jax.Array, total: jax.Array) -> jax.Array:
            index = (last_block <= block).sum(dtype=jnp.int32)  # the expert of the block
            assignments = _block(by_expert, index, first_row[index] + block * rows, rows)
            tokens = assignments // num_slots
            y = lax.switch(index, branches, x.at[tokens].get(mode="clip"))
            with jax.named_scope("dispatch"):
                return total.at[tokens].add(weights.at[assignments].get(mode="clip") * y, mode="drop")

        return lax.fori_loop(0, last_block[-1], run_block, total)

    total, starts = jnp.zeros(x.shape, jnp.float32), by_expert.starts
    for rows, blocks in zip(sizes, cut(by_expert.ends - by_expert.starts, sizes), strict=True):
        total = run_blocks(rows, starts, blocks, total)
        starts += blocks * rows
    return total


def block_sizes(slots: int, num_experts: int) -> tuple[int, ...]:
    """Choose the sizes of blocks. Large blocks waste rows at an expert's end, small ones reread its weights.

    Args:
        slots: N * K, used or not.
        num_experts: E.

    Returns:
        Rows of a block, the largest first.
    """
    per_expert = slots / num_experts
    # A product of one row is the fastest for its size, but takes five times as long to compile: few experts only.
    few_rows = (8, 1) if num_experts <= 16 else (8, 2)
    for most, sizes in ((2, few_rows), (16, (8,)), (64, (32, 8)), (128, (128, 64, 16))):
        if per_expert <= most:
            return sizes
    return 256, 128, 32


def cut(rows: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Cut the rows of each expert into blocks. Rows that would cost more in smaller blocks run in a partly empty one.

    Args:
        rows: int[E], an array of JAX or NumPy.
        sizes: rows of a block, the largest first.

    Returns:
        int[E] for each size, the number of blocks.
    """
    blocks = []
    for place, size in enumerate(sizes):
        spared = _most_rows(size, sizes[place + 1 :])
        blocks.append((rows + (size - 1 - spared)) // size)  # rounds up where more than `spared` rows remain
        rows = (rows - blocks[-1] * size).clip(0)
    return blocks


@cache
def _most_rows(size: int, smaller: tuple[int, ...]) -> int:
    """The largest number of rows that costs no more in smaller blocks than in one block of `size` rows."""
    if not smaller:
        return 0
    numbers = cut(np.arange(size), smaller)
    cost = sum(number * (rows + _READING) for number, rows in zip(numbers, smaller, strict=True))
    return int(np.sum(cost <= size + _READING)) - 1  # 0 rows always satisfy it


def sort_by_expert(routing: Routing, num_experts: int, padding: int = 0) -> ByExpert:
    """Sort the assignments by expert.

    Args:
        routing: [N, K].
        num_experts: E.
        padding: additional entries at the end of the order.

    Returns:
        The order, and where each expert begins and ends in it.
    """
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = (flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)[None]).sum(0, dtype=jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    return ByExpert(jnp.pad(order, (0, padding)), ends - counts, ends, nowhere=flat.size)


def _block(by_expert: ByExpert, expert: jax.Array | int, start: jax.Array, rows: int) -> jax.Array:
    """int32[R]: the assignments from row `start` on, `nowhere` for rows of other experts."""
    inside = start + jnp.arange(rows, dtype=jnp.int32) < by_expert.ends[expert]
    return jnp.where(inside, lax.dynamic_slice(by_expert.order, (start,), (rows,)), by_expert.nowhere)


def _swiglu(expert: Expert, x: jax.Array) -> jax.Array:
    gate = jnp.dot(x, expert["gate"], preferred_element_type=jnp.float32)
    up = jnp.dot(x, expert["up"], preferred_element_type=jnp.float32)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return jnp.dot(hidden, expert["down"], preferred_element_type=jnp.float32)


_Saved = tuple[jax.Array, Routing, tuple[Expert, ...]]


def _forward(x: jax.Array, routing: Routing, experts: tuple[Expert, ...]) -> tuple[jax.Array, _Saved]:
    return apply_blocks(x, routing, experts), (x, routing, experts)


def apply_blocks_backward(saved: _Saved, out_grad: jax.Array) -> _Saved:
    """Compute gradients by recomputation, one expert at a time, so its loop carries only its own weight gradients.

    Args:
        saved: the inputs of `apply_blocks`.
        out_grad: [N, D], gradient of the result.

    Returns:
        The gradients of these inputs.
    """
    x, routing, experts = saved
    num_slots = routing.experts.shape[1]
    rows = block_sizes(routing.experts.size, len(experts))[0]
    by_expert = sort_by_expert(routing, len(experts), padding=rows)
    weights = routing.weights.reshape(-1, 1).astype(jnp.float32)

    x_grad, weight_grad = jnp.zeros(x.shape, jnp.float32), jnp.zeros(routing.experts.size, jnp.float32)
    expert_grads = []
    for index, expert in enumerate(experts):

        def run_block(block: jax.Array, carry: Any, index: int = index, expert: Expert = expert) -> Any:
            x_grad, weight_grad, grads = carry
            assignments = _block(by_expert, index, by_expert.starts[index] + block * rows, rows)
            tokens = assignments // num_slots
            y, pullback = jax.vjp(_swiglu, expert, x.at[tokens].get(mode="fill", fill_value=0))
            y_grad = out_grad.at[tokens].get(mode="fill", fill_value=0).astype(jnp.float32)
            block_grads, block_x_grad = pullback(weights.at[assignments].get(mode="clip") * y_grad)
            x_grad = x_grad.at[tokens].add(block_x_grad.astype(jnp.float32), mode="drop")
            weight_grad = weight_grad.at[assignments].set((y * y_grad).sum(-1), mode="drop")
            return x_grad, weight_grad, jax.tree.map(jnp.add, grads, block_grads)

        blocks = (by_expert.ends[index] - by_expert.starts[index] + rows - 1) // rows
        carry = (x_grad, weight_grad, jax.tree.map(jnp.zeros_like, expert))
        x_grad, weight_grad, grads = lax.fori_loop(0, blocks, run_block, carry)
        expert_grads.append(grads)

    weight_grad = weight_grad.reshape(routing.weights.shape).astype(routing.weights.dtype)
    no_grad: Any = np.zeros(routing.experts.shape, jax.dtypes.float0)  # JAX's gradient of integers
    return x_grad.astype(x.dtype), Routing(no_grad, weight_grad), tuple(expert_grads)


apply_blocks.defvjp(_forward, apply_blocks_backward)
