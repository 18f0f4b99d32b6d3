"""The `blocks` engine: work follows the active assignments, whatever the routing.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments, R rows of a block.

Assignments are sorted by expert and cut into blocks of R rows that never mix experts. One flat loop runs over the
blocks in use (a traced number, so unused slots cost nothing); inside, `lax.switch` picks the expert, so XLA sees plain
matrix products with whole weight arrays and copies none of them. Never `vmap` over this engine: a batched switch
computes every branch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from varjax.routing import Routing

Expert = dict[str, jax.Array]  # gate [D, F], up [D, F], down [F, D]


class _Layout(NamedTuple):
    order: jax.Array  # int32[A + R] assignments sorted by expert, padded so that a block never runs off the end
    starts: jax.Array  # int32[E] first sorted row of an expert
    ends: jax.Array  # int32[E] one past its last
    first_block: jax.Array  # int32[E] its first block
    used: jax.Array  # int32[] blocks in use


@jax.custom_vjp
def apply_blocks(x: jax.Array, routing: Routing, experts: tuple[Expert, ...]) -> jax.Array:
    """The weighted sum of each token's experts, `[N, D]`, for `x` `[N, D]` and `routing` `[N, K]`.

    Products accumulate in float32; the result has the dtype of `x`. Differentiable in `x`, the weights and the experts.
    """
    num_slots = routing.experts.shape[1]
    rows = _block_rows(routing, len(experts))
    layout = _sort_into_blocks(routing, len(experts), rows)
    branches = [partial(_swiglu, expert) for expert in experts]

    def run_block(block: jax.Array, sorted_out: jax.Array) -> jax.Array:
        index, start = _locate(layout, block, rows)
        tokens = lax.dynamic_slice(layout.order, (start,), (rows,)) // num_slots
        y = lax.switch(index, branches, x[tokens])
        # The rows past the expert's last one are rubbish; the next expert's first block overwrites them.
        return lax.dynamic_update_slice(sorted_out, y, (start, 0))

    sorted_out = jnp.zeros((layout.order.shape[0], x.shape[1]), jnp.float32)
    sorted_out = lax.fori_loop(0, layout.used, run_block, sorted_out)
    slots = sorted_out[_inverse(layout, routing)]
    active = (routing.experts < len(experts))[..., None]
    weighted = jnp.where(active, slots * routing.weights[..., None].astype(jnp.float32), 0)
    return weighted.sum(1).astype(x.dtype)


def _block_rows(routing: Routing, num_experts: int) -> int:
    """Rows per block: large blocks waste rows at each expert's end, small ones read the weights more often."""
    per_expert = routing.experts.size / num_experts
    if routing.experts.shape[0] == 1:
        return 1
    for rows in (8, 32, 64):
        if per_expert <= 2 * rows:
            return rows
    return 128


def _sort_into_blocks(routing: Routing, num_experts: int, rows: int) -> _Layout:
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = (flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)).sum(0, dtype=jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    blocks = (counts + rows - 1) // rows
    last_block = jnp.cumsum(blocks, dtype=jnp.int32)
    return _Layout(jnp.pad(order, (0, rows)), ends - counts, ends, last_block - blocks, last_block[-1])


def _locate(layout: _Layout, block: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The expert of a block and its first sorted row."""
    # Experts without assignments share their first block with the next one: the last that starts by `block` owns it.
    index = (layout.first_block <= block).sum(dtype=jnp.int32) - 1
    return index, layout.starts[index] + (block - layout.first_block[index]) * rows


def _inverse(layout: _Layout, routing: Routing) -> jax.Array:
    """int32[N, K]: the sorted row of each assignment."""
    size = routing.experts.size
    ranks = jnp.zeros(size, jnp.int32).at[layout.order[:size]].set(jnp.arange(size, dtype=jnp.int32))
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
    rows = _block_rows(routing, len(experts))
    layout = _sort_into_blocks(routing, len(experts), rows)
    flat_weights = routing.weights.reshape(-1).astype(jnp.float32)

    x_grad = jnp.zeros((layout.order.shape[0], x.shape[1]), jnp.float32)
    weight_grad = jnp.zeros(layout.order.shape[0], jnp.float32)
    expert_grads = []
    for index, expert in enumerate(experts):

        def run_block(block: jax.Array, carry: Any, index: int = index, expert: Expert = expert) -> Any:
            x_grad, weight_grad, grads = carry
            start = layout.starts[index] + block * rows
            assignments = lax.dynamic_slice(layout.order, (start,), (rows,))
            inside = start + jnp.arange(rows, dtype=jnp.int32) < layout.ends[index]
            tokens = assignments // num_slots
            weight = jnp.where(inside, flat_weights[assignments], 0)
            y, pullback = jax.vjp(_swiglu, expert, x[tokens])
            y_grad = out_grad[tokens].astype(jnp.float32)
            block_grads, block_x_grad = pullback(weight[:, None] * y_grad)
            x_grad = lax.dynamic_update_slice(x_grad, block_x_grad.astype(jnp.float32), (start, 0))
            weight_grad = lax.dynamic_update_slice(weight_grad, (y * y_grad).sum(-1), (start,))
            return x_grad, weight_grad, jax.tree.map(jnp.add, grads, block_grads)

        blocks = (layout.ends[index] - layout.starts[index] + rows - 1) // rows
        carry = (x_grad, weight_grad, jax.tree.map(jnp.zeros_like, expert))
        x_grad, weight_grad, grads = lax.fori_loop(0, blocks, run_block, carry)
        expert_grads.append(grads)

    ranks = _inverse(layout, routing)
    active = routing.experts < len(experts)
    weight_grad = jnp.where(active, weight_grad[ranks], 0).astype(routing.weights.dtype)
    x_grad = jnp.where(active[..., None], x_grad[ranks], 0).sum(1).astype(x.dtype)
    no_grad: Any = np.zeros(routing.experts.shape, jax.dtypes.float0)  # what JAX wants for integers
    return x_grad, Routing(no_grad, weight_grad), tuple(expert_grads)


apply_blocks.defvjp(_forward, _backward)
