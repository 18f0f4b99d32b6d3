"""The `blocks` engine: work follows the active assignments, whatever the routing.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments, R rows of a block.

Assignments are sorted by expert and cut into blocks of R rows that never mix experts, each expert's rest into smaller
ones. A flat loop runs over the blocks in use (a traced number, so unused slots cost nothing); inside, `lax.switch`
picks the expert, so XLA sees plain matrix products with whole weight arrays and copies none of them. Never `vmap` over
this engine: a batched switch computes every branch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from varjax.routing import Routing

Expert = dict[str, jax.Array]  # gate [D, F], up [D, F], down [F, D]
Branch = Callable[[jax.Array], jax.Array]  # one expert: [R, D] -> float32[R, D]


class _Sorted(NamedTuple):
    order: jax.Array  # int32[A + R] assignments sorted by expert, padded so that a block never runs off the end
    starts: jax.Array  # int32[E] first sorted row of an expert
    counts: jax.Array  # int32[E] its rows


@jax.custom_vjp
def apply_blocks(x: jax.Array, routing: Routing, experts: tuple[Expert, ...]) -> jax.Array:
    """The weighted sum of each token's experts, `[N, D]`, for `x` `[N, D]` and `routing` `[N, K]`.

    Products accumulate in float32; the result has the dtype of `x`. Differentiable in `x`, the weights and the experts.
    """
    branches: list[Branch] = [partial(_swiglu, expert) for expert in experts]
    slots = _one_token(x, routing, branches) if len(x) == 1 else _many_tokens(x, routing, branches)
    with jax.named_scope("dispatch"):
        active = (routing.experts < len(experts))[..., None]
        weighted = jnp.where(active, slots * routing.weights[..., None].astype(jnp.float32), 0)
        return weighted.sum(1).astype(x.dtype)


def _one_token(x: jax.Array, routing: Routing, branches: list[Branch]) -> jax.Array:
    """float32[1, K, D], each slot's expert output: with one token there is nothing to sort."""
    choices = [*branches, lambda x: jnp.zeros(x.shape, jnp.float32)]  # the last: an unused slot
    return jnp.stack([lax.switch(index, choices, x) for index in routing.experts[0]], axis=1)


def _many_tokens(x: jax.Array, routing: Routing, branches: list[Branch]) -> jax.Array:
    """float32[N, K, D], each slot's expert output; rubbish in unused slots."""
    num_slots = routing.experts.shape[1]
    rows, tail = block_rows(routing.experts.size, len(branches))
    with jax.named_scope("dispatch"):
        by_expert = _sort(routing, len(branches), rows)

    def run_blocks(rows: int, starts: jax.Array, blocks: jax.Array, sorted_out: jax.Array) -> jax.Array:
        """Runs `blocks` [E] blocks of `rows` rows of each expert, the first of them at `starts` [E]."""
        last_block = jnp.cumsum(blocks, dtype=jnp.int32)
        first_row = starts - (last_block - blocks) * rows  # of the expert's block 0, counted over all experts

        def run_block(block: jax.Array, sorted_out: jax.Array) -> jax.Array:
            index = (last_block <= block).sum(dtype=jnp.int32)
            start = first_row[index] + block * rows
            tokens = lax.dynamic_slice(by_expert.order, (start,), (rows,)) // num_slots
            return lax.dynamic_update_slice(sorted_out, lax.switch(index, branches, x[tokens]), (start, 0))

        return lax.fori_loop(0, last_block[-1], run_block, sorted_out)

    # The tails first: one may write rubbish past its expert's last row, and the block that owns those rows runs later.
    whole = by_expert.counts // rows
    rest = by_expert.counts - whole * rows
    sorted_out = jnp.zeros((by_expert.order.shape[0], x.shape[1]), jnp.float32)
    sorted_out = run_blocks(tail, by_expert.starts + whole * rows, (rest + tail - 1) // tail, sorted_out)
    sorted_out = run_blocks(rows, by_expert.starts, whole, sorted_out)
    with jax.named_scope("dispatch"):
        return sorted_out[_inverse(by_expert, routing)]


def block_rows(slots: int, num_experts: int) -> tuple[int, int]:
    """Rows of a block and of a tail block for N * K slots, used or not.

    Large ones waste rows at each expert's end, small ones reread weights.
    """
    per_expert = slots / num_experts
    for rows, tail in ((8, 8), (32, 8), (64, 16)):
        if per_expert <= 2 * rows:
            return rows, tail
    return 128, 32


def _sort(routing: Routing, num_experts: int, padding: int) -> _Sorted:
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = (flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)).sum(0, dtype=jnp.int32)
    return _Sorted(jnp.pad(order, (0, padding)), jnp.cumsum(counts, dtype=jnp.int32) - counts, counts)


def _inverse(by_expert: _Sorted, routing: Routing) -> jax.Array:
    """int32[N, K]: the sorted row of each assignment."""
    size = routing.experts.size
    ranks = jnp.zeros(size, jnp.int32).at[by_expert.order[:size]].set(jnp.arange(size, dtype=jnp.int32))
    return ranks.reshape(routing.experts.shape)


def _swiglu(expert: Expert, x: jax.Array) -> jax.Array:
    gate = jnp.dot(x, expert["gate"], preferred_element_type=jnp.float32)
    up = jnp.dot(x, expert["up"], preferred_element_type=jnp.float32)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return jnp.dot(hidden, expert["down"], preferred_element_type=jnp.float32)


_Saved = tuple[jax.Array, Routing, tuple[Expert, ...]]


def _forward(x: jax.Array, routing: Routing, experts: tuple[Expert, ...]) -> tuple[jax.Array, _Saved]:
    return apply_blocks(x, routing, experts), (x, routing, experts)


def _backward(saved: _Saved, out_grad: jax.Array) -> _Saved:
    """Gradients by recomputation, one expert after the other: only its own weight gradients travel through its loop."""
    x, routing, experts = saved
    num_slots = routing.experts.shape[1]
    rows, _ = block_rows(routing.experts.size, len(experts))
    by_expert = _sort(routing, len(experts), rows)
    ends = by_expert.starts + by_expert.counts
    flat_weights = routing.weights.reshape(-1).astype(jnp.float32)

    x_grad = jnp.zeros((by_expert.order.shape[0], x.shape[1]), jnp.float32)
    weight_grad = jnp.zeros(by_expert.order.shape[0], jnp.float32)
    expert_grads = []
    for index, expert in enumerate(experts):

        def run_block(block: jax.Array, carry: Any, index: int = index, expert: Expert = expert) -> Any:
            x_grad, weight_grad, grads = carry
            start = by_expert.starts[index] + block * rows
            assignments = lax.dynamic_slice(by_expert.order, (start,), (rows,))
            inside = start + jnp.arange(rows, dtype=jnp.int32) < ends[index]
            tokens = assignments // num_slots
            weight = jnp.where(inside, flat_weights[assignments], 0)
            y, pullback = jax.vjp(_swiglu, expert, x[tokens])
            y_grad = out_grad[tokens].astype(jnp.float32)
            block_grads, block_x_grad = pullback(weight[:, None] * y_grad)
            x_grad = lax.dynamic_update_slice(x_grad, block_x_grad.astype(jnp.float32), (start, 0))
            weight_grad = lax.dynamic_update_slice(weight_grad, (y * y_grad).sum(-1), (start,))
            return x_grad, weight_grad, jax.tree.map(jnp.add, grads, block_grads)

        blocks = (by_expert.counts[index] + rows - 1) // rows
        carry = (x_grad, weight_grad, jax.tree.map(jnp.zeros_like, expert))
        x_grad, weight_grad, grads = lax.fori_loop(0, blocks, run_block, carry)
        expert_grads.append(grads)

    ranks = _inverse(by_expert, routing)
    active = routing.experts < len(experts)
    weight_grad = jnp.where(active, weight_grad[ranks], 0).astype(routing.weights.dtype)
    x_grad = jnp.where(active[..., None], x_grad[ranks], 0).sum(1).astype(x.dtype)
    no_grad: Any = np.zeros(routing.experts.shape, jax.dtypes.float0)  # what JAX wants for integers
    return x_grad, Routing(no_grad, weight_grad), tuple(expert_grads)


apply_blocks.defvjp(_forward, _backward)
