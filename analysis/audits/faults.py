"""Faults to plant, so that it can be seen whether the audit notices them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.studies.shuffled import shuffled_answers
from analysis.text.encoding import Encoded
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.routing import Routing
from varjax.table import RouteTable

NOISE = (0.1, 0.3, 1.0)  # of the planted checkpoints, as a share of each tensor's standard deviation


def faults(var_model: VARModel, seed: int) -> dict[str, VARModel]:
    """The same model and config with something wrong that neither fingerprint nor config tells."""
    model, config, table = var_model.model, var_model.config, var_model.table
    if table is None:
        raise InputError("VAR is switched off (enable_var=False): nothing can go wrong with it")
    rng = np.random.default_rng(seed)
    wrong = {
        "answers shuffled": VARModel(model, config, table=shuffled_answers(table, rng)),
        "experts renumbered": VARModel(model, config, table=renumbered(table, rng)),
    }
    for scale in NOISE:
        other = perturbed(model, scale, jax.random.key(seed))
        wrong[f"weights + {scale:.0%} noise"] = VARModel(other, config, table=table)
    return wrong


def renumbered(table: RouteTable, rng: np.random.Generator) -> RouteTable:
    """The table of a model that is the same function, its experts in another order: every id moves."""
    ids = rng.permutation(table.num_experts)
    moved = np.empty(table.num_experts + 1, np.int32)
    moved[ids], moved[-1] = np.roll(ids, 1), table.num_experts
    return dataclasses.replace(table, routing=Routing(jnp.asarray(moved)[table.routing.experts], table.routing.weights))


def perturbed(model: Any, scale: float, key: jax.Array) -> Any:
    """The model with noise on every tensor, `scale` times the tensor's standard deviation; its fingerprint stays."""
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + scale * jnp.std(leaf) * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(model, params=jax.tree.unflatten(structure, noisy))


def random_texts(documents: Sequence[Encoded], vocab_size: int, seed: int) -> list[Encoded]:
    """As many texts of the same lengths, every id drawn evenly from the vocabulary."""
    rng = np.random.default_rng(seed)
    return [dataclasses.replace(d, ids=rng.integers(0, vocab_size, len(d.ids)).astype(np.int32)) for d in documents]
