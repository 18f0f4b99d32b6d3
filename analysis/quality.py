"""Loss of a model on whole documents, in units that can be compared.

Letters: B sequences, T positions, V vocabulary, N documents.

The unit of evidence is the document: its summed loss, and how many tokens, words and bytes that loss is spread over.
Every token after a document's first is scored once, given at most `max_length - 1` tokens before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models import Model
from varjax.files import replacing
from varjax.model import VARModel
from varjax.step import VARState, begin


class Runner(Protocol):
    """`(carry, ids int32[B, T], mask bool[B, T]) -> (logits float32[B, T, V], carry)`; the call spends the carry."""

    def __call__(self, carry: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]: ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """Losses per document. Perplexities are over all documents together, not means of means."""

    nll: np.ndarray  # float64 [N], summed over the document's scored tokens, nats
    tokens: np.ndarray  # int64 [N], scored
    words: np.ndarray  # int64 [N], white-space separated
    bytes: np.ndarray  # int64 [N], UTF-8
    ids: tuple[str, ...]  # SHA-256 of each text
    groups: tuple[str, ...]
    max_length: int  # tokens of a window
    stride: int  # tokens between windows

    @property
    def nll_per_token(self) -> float:
        """Nats."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nll_per_token)

    @property
    def word_perplexity(self) -> float:
        """Per white-space separated word."""
        return math.exp(self.nll.sum() / self.words.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nll.sum() / math.log(2) / self.bytes.sum())

    def summary(self) -> dict[str, Any]:
        """The figures of a result file."""
        return {
            "perplexity": self.perplexity,
            "nll_per_token": self.nll_per_token,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": int(self.tokens.sum()),
            "documents": len(self.ids),
            "max_length": self.max_length,
            "stride": self.stride,
            "units": {"perplexity": "per token", "nll_per_token": "nats"},
        }

    def save(self, path: Path) -> None:
        """One row per document, Parquet: id, group, nll, tokens, words, bytes; whole or not at all."""
        columns = {"id": self.ids, "group": self.groups}
        columns |= {name: getattr(self, name) for name in ("nll", "tokens", "words", "bytes")}
        with replacing(path) as temporary:
            pd.DataFrame(columns).to_parquet(temporary)


def score(
    run: Runner,
    carry: Any,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    progress: bool = True,
) -> tuple[Scores, Any]:
    """The losses of `documents` under `run`, and what its carry became.

    Args:
        batch_size: rows per batch at `max_length`.
        max_length: tokens of a window, the most context that a token gets.
        stride: tokens between windows; None: `max_length`.
    """
    nll, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    read = tqdm(documents, unit="document", disable=not progress)
    for batch in batches(read, batch_size, max_length, stride):
        logits, carry = run(carry, jnp.asarray(batch.ids), jnp.asarray(batch.mask))
        losses = np.asarray(token_nll(logits, jnp.asarray(batch.targets), jnp.asarray(batch.scored)), np.float64)
        owned = batch.documents >= 0
        np.add.at(nll, batch.documents[owned], losses.sum(1)[owned])
        np.add.at(tokens, batch.documents[owned], batch.scored.sum(1)[owned])
    return Scores(
        nll=nll,
        tokens=tokens,
        words=np.array([document.words for document in documents]),
        bytes=np.array([document.bytes for document in documents]),
        ids=tuple(document.id for document in documents),
        groups=tuple(document.group for document in documents),
        max_length=max_length,
        stride=max_length if stride is None else stride,
    ), carry


def plain_runner(model: Model) -> Runner:
    """The model as it is; its carry is None."""

    def run(carry: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        return model.network.forward(model.params, ids, attention_mask=mask).logits, carry

    return run


def var_runner(var_model: VARModel) -> Runner:
    """Whole windows under VAR: each begins without a past, the cached tier and the counters carry over.

    The carry is the VARState.
    """

    def run(carry: VARState | None, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, VARState | None]:
        if carry is not None:
            carry = begin(carry, batch_size=ids.shape[0])
        out, carry = var_model.advance(carry, ids, mask)
        return out.logits, carry

    return run


@jax.jit
def token_nll(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
    """float32 [B, T]: minus log probability of each target, nats; 0 where it is not scored."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)
