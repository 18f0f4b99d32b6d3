"""Other ways of running experts in JAX, as engines to compare with ours: grouped matrix products of sorted rows.

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, A = N * K assignments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.experts import Engine
from models.experts_blocks import sort_by_expert
from models.experts_pallas import Stacked, stack_experts
from varjax.routing import Routing


class RivalError(Exception):
    """Code of another library failed. No other error may leave a rival out of a benchmark."""


Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # [A, D], [E, D, F], int[E] rows of each -> [A, F]


def rivals(device: Any) -> tuple[dict[str, Engine], dict[str, str]]:
    """The rivals that can run on a device.

    Args:
        device: a JAX device.

    Returns:
        Engines by name, and why the others are left out.
    """
    found: dict[str, Product] = {"lax.ragged_dot": partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)}
    missing = {}
    if device.platform != "gpu":
        missing["tokamax"] = "it is compared on GPUs only"
    elif importlib.util.find_spec("tokamax") is None:
        missing["tokamax"] = "not installed"
    else:
        import tokamax

        # Its own choice of an implementation fails on some versions of jax; Triton's is the one for this layout.
        options = {"preferred_element_type": jnp.float32, "implementation": "triton"}
        found["tokamax"] = partial(tokamax.ragged_dot, **options)
    engines = {name: Engine(name, stack_experts, partial(_apply, product=product)) for name, product in found.items()}
    return engines, missing


def _apply(x: jax.Array, routing: Routing, experts: Stacked, *, product: Product) -> jax.Array:
    """[N, D]. Rows behind those of all experts belong to unused slots; a product may leave anything there."""
    by_expert = sort_by_expert(routing, len(experts["gate"]))
    sizes, tokens = by_expert.ends - by_expert.starts, by_expert.order // routing.experts.shape[1]
    rows = x[tokens]
    try:
        hidden = jax.nn.silu(product(rows, experts["gate"], sizes)) * product(rows, experts["up"], sizes)
        y = product(hidden.astype(x.dtype), experts["down"], sizes)
    except Exception as error:  # somebody else's code, which may raise anything
        raise RivalError(f"{type(error).__name__}: {error}") from error
    weights = routing.weights.reshape(-1, 1)[by_expert.order].astype(jnp.float32)
    used = (jnp.arange(len(tokens)) < by_expert.ends[-1])[:, None]
    return jnp.zeros(x.shape, jnp.float32).at[tokens].add(jnp.where(used, weights * y, 0)).astype(x.dtype)
