"""Losses token by token, and what the plan did at each token.

Letters: L layers, B sequences, T positions, R table rows, M scored tokens, N documents.

`analysis.evaluate.quality` sums losses over documents; here every scored token keeps its own, so that losses can be
grouped. Runs that read the same documents in the same way hold the same tokens in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from analysis.evaluate.caching import INDEPENDENT, Caching
from analysis.evaluate.quality import token_nll
from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models.placement import to_host
from varjax.errors import InputError
from varjax.keys import ANY
from varjax.model import VARModel
from varjax.routing import CACHED, FAST, Plan, Routing
from varjax.transfer import to_device

BY_ROUTER, BY_CACHE = -2, -1  # what answered, where it was no key of the table


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """A loss stands at the position that made the prediction: id, key and experts are of the token read there."""

    nll: np.ndarray  # float64 [M], of the token that follows, nats
    document: np.ndarray  # int32 [M], 0 to N - 1
    token_id: np.ndarray  # int32 [M]
    order: np.ndarray  # int8 [M], of the longest key that answered in any layer; else BY_CACHE or BY_ROUTER
    experts: np.ndarray  # int32 [M], that ran, summed over layers
    documents: int  # N

    def per_document(self, values: np.ndarray) -> np.ndarray:
        """float64 [N, ...]: sums of values [M, ...] over the tokens of each document."""
        sums = np.zeros((self.documents, *values.shape[1:]))
        np.add.at(sums, self.document, values)
        return sums


def token_losses(
    var_model: VARModel,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    caching: Caching = INDEPENDENT,
) -> TokenLosses:
    """One pass over `documents`, from a fresh state; with VAR switched off it is the plain model's.

    The order of the tokens follows from the documents and the arguments, whatever the model.

    Args:
        batch_size, max_length, stride: as in `analysis.evaluate.quality.score`.
        caching: which documents share a cached tier.
    """
    table, state = var_model.table, caching.init(var_model, batch_size)
    order = None if table is None else jnp.sum(table.index.keys != ANY, axis=-1).astype(jnp.int8)
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in batches(documents, batch_size, max_length, stride, one_by_one=True):
        out, state = caching.read(var_model, state, batch)
        assert out.routing is not None and out.router_probs is not None  # only a step of decoding leaves them out
        losses = to_host(token_nll(out.logits, *to_device((batch.targets, batch.scored))))
        answered, active = _account(out.plan, order, out.routing, out.router_probs.shape[-1])
        owner = np.broadcast_to(batch.documents[:, None], batch.ids.shape)
        kept = (np.asarray(one)[batch.scored] for one in (losses, owner, batch.ids, answered, active))
        parts.append(tuple(kept))
    nll, document, token_id, answered_by, experts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenLosses(np.asarray(nll, np.float64), document, token_id, answered_by, experts, len(documents))


def differences(plain: TokenLosses, other: TokenLosses) -> np.ndarray:
    """float64 [M]: what `other` loses more at each token. Raises InputError if they did not read the same tokens."""
    same = len(plain.nll) == len(other.nll)
    if not (same and (plain.document == other.document).all() and (plain.token_id == other.token_id).all()):
        raise InputError(
            f"the two runs scored different tokens ({len(plain.nll)} and {len(other.nll)}); give both the same "
            "documents, batch_size, max_length and stride"
        )
    return other.nll - plain.nll


def _account(
    plan: Plan | None, order: jax.Array | None, routing: Routing, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """int8 and int32 [B, T]: what answered, and how many experts ran. `order` int8 [R] is that of the table's rows."""
    active = jnp.sum(routing.experts < num_experts, axis=(0, -1), dtype=jnp.int32)
    if plan is None or order is None:
        return jnp.full(active.shape, BY_ROUTER, jnp.int8), active
    other = jnp.where(plan.tier == CACHED, jnp.int8(BY_CACHE), jnp.int8(BY_ROUTER))
    by_layer = jnp.where(plan.tier == FAST, order[plan.row], other)
    return jnp.max(by_layer, axis=0), active
