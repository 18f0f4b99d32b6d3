"""How near the model under VAR stays to the plain model: divergence and agreement, token by token.

Letters: B sequences, T positions, V vocabulary, N documents.

Perplexity on the kind of text that the tables were built from flatters them: an answer that knows the text better than
the model lowers it. The Kullback-Leibler divergence from the plain model's next-token distribution counts every change,
for better or worse. The agreement is the share of positions at which both models would write the same token: if the
model under VAR drafted and the plain model verified, that is how often a greedy draft would be accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.evaluate.losses import INDEPENDENT, Caching, plain_runner, var_runner
from analysis.resampling import Estimate, document_counts
from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models import Model
from models.placement import to_host
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.transfer import to_device


@dataclasses.dataclass(frozen=True)
class Nearness:
    """The documents one by one."""

    divergence: np.ndarray  # float64 [N], summed over the document's scored positions, nats
    agreements: np.ndarray  # int64 [N], positions at which both would write the same token
    tokens: np.ndarray  # int64 [N], scored positions

    def summary(self, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
        """The mean over all positions, with 95% percentile intervals over documents.

        Args:
            samples: bootstrap draws.
            seed: of the draws.

        Returns:
            `divergence`, nats per token, and `agreement`, each with `value`, `low` and `high`, and `tokens`.
        """
        counts = document_counts(len(self.tokens), samples, seed)
        found: dict[str, Any] = {"tokens": int(self.tokens.sum())}
        for name, of in (("divergence", self.divergence), ("agreement", self.agreements)):
            low, high = np.quantile(counts @ of / (counts @ self.tokens), [0.025, 0.975])
            value = float(of.sum() / self.tokens.sum())
            found[name] = dataclasses.asdict(Estimate(value, float(low), float(high)))
        return found


def nearness(
    model: Model,
    var_model: VARModel,
    documents: Sequence[Encoded],
    caching: Caching = INDEPENDENT,
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    progress: bool = True,
) -> Nearness:
    """Compare the model under VAR with the plain model on given texts.

    Args:
        model: the plain model.
        var_model: the same model under VAR.
        documents: in token ids.
        caching: which documents share a cached tier.
        batch_size, max_length, stride: as in `analysis.evaluate.losses.score`.
        progress: show a bar on standard error.

    Returns:
        Divergence and agreement of every document.
    """
    divergence, agreements, tokens = np.zeros(len(documents)), *np.zeros((2, len(documents)), np.int64)
    plain, changed = plain_runner(model), var_runner(var_model, caching)
    state = caching.init(var_model, batch_size)
    one_by_one = state is not None and state.own_caches
    read = progress_bar(documents, unit="document", desc="nearness", show=progress)
    for batch in batches(read, batch_size, max_length, stride, one_by_one=one_by_one):
        teacher, _ = plain(None, batch)
        logits, state = changed(state, batch)
        apart, same = map(to_host, _compared(teacher, logits, to_device(batch.scored)))
        owned = batch.documents >= 0
        for total, values in ((divergence, apart.astype(np.float64)), (agreements, same), (tokens, batch.scored)):
            np.add.at(total, batch.documents[owned], values.sum(axis=1)[owned])
    return Nearness(divergence, agreements, tokens)


@jax.jit
def _compared(teacher: jax.Array, logits: jax.Array, scored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [B, T], nats, and bool [B, T]: divergence and agreement of logits [B, T, V]; 0 where not scored."""
    target, other = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    divergence = jnp.sum(jnp.exp(target) * (target - other), axis=-1)
    same = jnp.argmax(teacher, axis=-1) == jnp.argmax(logits, axis=-1)
    return jnp.where(scored, divergence, 0), same & scored
