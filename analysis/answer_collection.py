"""Phase 2's second pass: what each rule would leave out, averaged at each key (the residual rows).

The layers run in full, so the means are taken where the model usually lives. Which rules are worth collecting is a
choice of the policy search (`analysis.policy`); which keys, of the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from analysis.batches import Encoded, batches, num_batches
from analysis.collection import find_rows
from models import Model
from models.decoder import Network, Params
from varjax import answers
from varjax.answers import Answers, AnswerSums, Rule
from varjax.keys import KeyIndex

FLUSH_TOKENS = 1 << 18  # device sums are moved to the host's float64 this often


def collect_answers(
    model: Model,
    documents: Sequence[Encoded],
    keys: np.ndarray,
    orders: tuple[int, ...],
    rules: Sequence[Rule],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> Answers:
    """The mean of what each rule drops, at each key.

    Args:
        keys: int32 [R, C], rows of the answers; memory is `len(rules) * R * D` float32 on the device.
        orders: the context orders among the keys.
        rules: layer, experts kept and gate ratio of each.
        batch_size, max_length, progress: as in `analysis.collection.collect`.
    """
    found = Answers.empty(keys, rules, model.config.hidden_size)
    index, sums = KeyIndex.build(keys), answers.init(found)
    special = jnp.asarray(model.config.special_token_ids, jnp.int32)
    waiting = 0
    total = num_batches(documents, batch_size, max_length)
    for batch in tqdm(batches(documents, batch_size, max_length), total=total, unit="batch", disable=not progress):
        ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
        sums = _step(sums, index, special, model.params, ids, mask, model.network, orders)
        waiting += int(batch.mask.sum())
        if waiting >= FLUSH_TOKENS:
            sums, found = answers.flush(sums, found)
            waiting = 0
    return answers.flush(sums, found)[1]


@partial(jax.jit, static_argnames=("network", "orders"), donate_argnums=0)
def _step(
    sums: AnswerSums,
    index: KeyIndex,
    special: jax.Array,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    network: Network,
    orders: tuple[int, ...],
) -> AnswerSums:
    out = network.forward(params, ids, attention_mask=mask, slot_outputs_of=sums.layers)
    rows = find_rows(index, ids, mask, orders)
    return answers.update(sums, rows, out.slot_outputs, out.routing, mask & ~jnp.isin(ids, special))
