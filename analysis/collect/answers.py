"""Phase 2's second pass: what every expert says at each key, on average (`varjax.answers`).

Letters: G devices, A layers, R keys, E experts, D hidden size.

The layers run in full, so the means are taken where the model usually lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from analysis.collect.checkpoints import Checkpoints
from analysis.collect.passes import (
    SAVE_TOKENS,
    SPLIT,
    SPLIT_LAYERS,
    WHOLE,
    on_all_devices,
    on_each_device,
    on_mesh,
    run_pass,
)
from analysis.collect.statistics import find_rows
from analysis.text.encoding import Encoded
from models import Model
from models.decoder import Network
from models.parameters import Params
from varjax import answers
from varjax.answers import Answers, AnswerSums
from varjax.keys import KeyIndex
from varjax.routing import Routing


def collect_answers(
    model: Model,
    documents: Iterable[Encoded],
    keys: np.ndarray,
    layers: Sequence[int],
    *,
    pairs: np.ndarray | None = None,
    batch_size: int = 8,
    max_length: int = 256,
    checkpoints: Checkpoints | None = None,
    save_tokens: int = SAVE_TOKENS,
    progress: bool = True,
) -> Answers:
    """The mean output of each expert at each key, and at all tokens; pairs that never occurred are left out.

    Args:
        keys: int32 [R, C], of order 1 and more.
        layers: those to collect, ascending.
        pairs: bool [A, R, E], which experts are collected at which keys; None: all. With N pairs in a layer, those of
            order 0 among them, memory is `A * (N * D + R * E)` float32 on each device, and five times that on the host
            while a window is absorbed.
        batch_size, max_length, checkpoints, save_tokens, progress: as in `analysis.collect.statistics.collect`.
    """
    model, mesh = on_mesh(model)
    special = jnp.asarray(model.special_token_ids, jnp.int32)
    empty = Answers.empty(keys, layers, model.config.num_experts, model.config.hidden_size, pairs)
    shared = on_all_devices((KeyIndex.build(empty.keys), special), mesh)

    def step(windows: AnswerSums, ids: jax.Array, mask: jax.Array) -> AnswerSums:
        return _step(windows, *shared, model.params, ids, mask, model.network, empty.ngram_orders, mesh)

    found, _ = run_pass(
        empty,
        documents,
        begin=answers.init,
        step=step,
        absorb=answers.absorb,
        name="answers",
        mesh=mesh,
        batch_size=batch_size,
        max_length=max_length,
        checkpoints=checkpoints,
        save_tokens=save_tokens,
        progress=progress,
    )
    return answers.pruned(found)


@partial(jax.jit, static_argnames=("network", "orders", "mesh"), donate_argnums=0)
def _step(
    windows: AnswerSums,
    index: KeyIndex,
    special: jax.Array,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    network: Network,
    orders: tuple[int, ...],
    mesh: Mesh,
) -> AnswerSums:
    """One batch [G * B, T] through the model and into the windows [G, ...] of the devices."""
    out = network.forward(params, ids, attention_mask=mask, expert_outputs_of=windows.layers)

    def add(
        window: AnswerSums,
        index: KeyIndex,
        special: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        expert_outputs: jax.Array,
        routing: Routing,
    ) -> AnswerSums:
        rows = find_rows(index, ids, mask, orders)
        return answers.update(window, rows, expert_outputs, routing, mask & ~jnp.isin(ids, special))

    specs = (WHOLE, WHOLE, SPLIT, SPLIT, SPLIT_LAYERS, SPLIT_LAYERS)
    run = on_each_device(add, mesh, *specs)
    return run(windows, index, special, ids, mask, out.expert_outputs, out.routing)
