"""How near the model under VAR stays to the plain model: divergence and agreement, token by token.

Letters: B sequences, T positions, V vocabulary, N documents.

Perplexity on the kind of text that the tables were built from flatters them: an answer that knows the text better than
the model lowers it. The Kullback-Leibler divergence from the plain model's next-token distribution counts every change,
for better or worse. The agreement is the share of positions at which both models would write the same token: if the
model under VAR drafted and the plain model verified, about that share of a greedy draft would be accepted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.evaluate.losses import INDEPENDENT, Caching, plain_runner, token_nll, var_runner
from analysis.resampling import Estimate, document_counts
from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models import Model
from models.placement import to_host
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.step import summary
from varjax.transfer import to_device


@dataclasses.dataclass(frozen=True)
class Nearness:
    """The documents one by one."""

    divergence: np.ndarray  # float64 [N], summed over the document's scored positions, nats
    agreements: np.ndarray  # int64 [N], positions at which both would write the same token
    added: np.ndarray  # float64 [N], by how much the document's loss is higher under VAR, nats
    tokens: np.ndarray  # int64 [N], scored positions
    experts_per_token: float  # mean over tokens and layers

    def degradation(self, samples: int = 2000, seed: int = 0) -> Estimate:
        """The relative change in perplexity per token, with a 95% percentile interval over documents.

        Args:
            samples: bootstrap draws.
            seed: of the draws.

        Returns:
            The estimate.
        """
        return Estimate(*map(math.expm1, dataclasses.astuple(self._mean(self.added, samples, seed))))

    def _mean(self, of: np.ndarray, samples: int, seed: int) -> Estimate:
        counts = document_counts(len(self.tokens), samples, seed)
        low, high = np.quantile(counts @ of / (counts @ self.tokens), [0.025, 0.975])
        return Estimate(float(of.sum() / self.tokens.sum()), float(low), float(high))

    def summary(self, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
        """The mean over all positions, with 95% percentile intervals over documents.

        Args:
            samples: bootstrap draws.
            seed: of the draws.

        Returns:
            `divergence`, nats per token, and `agreement`, each with `value`, `low` and `high`, and `tokens`.
        """
        found: dict[str, Any] = {"tokens": int(self.tokens.sum())}
        for name, of in (("divergence", self.divergence), ("agreement", self.agreements)):
            found[name] = dataclasses.asdict(self._mean(of, samples, seed))
        return found


def nearness(
    model: Model,
    var_models: Sequence[VARModel],
    documents: Sequence[Encoded],
    caching: Caching = INDEPENDENT,
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    progress: bool = True,
) -> list[Nearness]:
    """Compare the model under VAR with the plain model on given texts.

    Args:
        model: the plain model, which reads the texts once.
        var_models: the same model under VAR, with one policy or several.
        documents: in token ids.
        caching: which documents share a cached tier.
        batch_size: as in `analysis.evaluate.losses.score`, like the next two.
        max_length: tokens of a window.
        stride: tokens between windows; None: `max_length`.
        progress: show a bar on standard error.

    Returns:
        The comparison of every document, for each of `var_models`.
    """
    plain, changed = plain_runner(model), [var_runner(one, caching) for one in var_models]
    states = [caching.init(one, batch_size) for one in var_models]
    sums, tokens = np.zeros((len(var_models), 3, len(documents))), np.zeros(len(documents), np.int64)
    one_by_one = any(state is not None and state.own_caches for state in states)
    read = progress_bar(documents, unit="document", desc="nearness", show=progress)
    for batch in batches(read, batch_size, max_length, stride, one_by_one=one_by_one):
        teacher, _ = plain(None, batch)
        targets, scored = to_device((batch.targets, batch.scored))
        owned = batch.documents >= 0
        np.add.at(tokens, batch.documents[owned], batch.scored.sum(axis=1)[owned])
        for number, run in enumerate(changed):
            logits, states[number] = run(states[number], batch)
            for total, values in zip(sums[number], _compared(teacher, logits, targets, scored), strict=True):
                each = to_host(values).astype(np.float64).sum(axis=1)
                np.add.at(total, batch.documents[owned], each[owned])
            del logits  # frees them: the next call would need memory for both
        del teacher
    most = model.config.top_k
    ran = [float(most) if one is None else summary(one.counters, most)["experts_per_token"] for one in states]
    return [
        Nearness(apart, same.astype(np.int64), added, tokens, experts)
        for (apart, same, added), experts in zip(sums, ran, strict=True)
    ]


@jax.jit
def _compared(
    teacher: jax.Array, logits: jax.Array, targets: jax.Array, scored: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divergence in nats, agreement, and added loss of logits [B, T, V], each [B, T]; 0 where not scored."""
    target, other = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    divergence = jnp.sum(jnp.exp(target) * (target - other), axis=-1)
    same = jnp.argmax(teacher, axis=-1) == jnp.argmax(logits, axis=-1)
    added = token_nll(logits, targets, scored) - token_nll(teacher, targets, scored)
    return jnp.where(scored, divergence, 0), same & scored, added
