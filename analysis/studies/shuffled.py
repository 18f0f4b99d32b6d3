"""A table whose answers stand in the wrong places: a fault to plant, and the null of a comparison."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from varjax.table import RouteTable


def shuffled_answers(table: RouteTable, rng: np.random.Generator) -> RouteTable:
    """Each layer's answers change places; what is known, and how far off it is thought to be, stays where it was."""
    layers = []
    for layer in table.answers or ():
        order = jnp.asarray(rng.permutation(len(layer.answers)))
        rows, scale = jax.tree.map(lambda leaf, order=order: leaf[order], (layer.answers, layer.scale))
        layers.append(dataclasses.replace(layer, answers=rows, scale=scale))
    return dataclasses.replace(table, answers=tuple(layers) or None)
