"""Loss of a model on whole documents, in units that can be compared.

Letters: B sequences, T positions, V vocabulary, N documents.

The unit of evidence is the document: its summed loss, and how many tokens, words and bytes that loss is spread over.
Each scored token is scored once, given at most `max_length` tokens before it.

The settings of `score` under which it gives what the field calls perplexity:

- by default, every token after a document's first (which is the begin id, where the tokenizer puts one in front);
- lm-evaluation-harness, `loglikelihood_rolling` (its class HFLM): `full_last=True` and `prefix_id` the begin id, or the
  end id where the tokenizer has none. Every id of a document is scored, a begin id in front included. Its
  `add_bos_token=False` leaves that one out: `full_last=True` alone, on ids that begin with the begin id.
  `word_perplexity`, `byte_perplexity` and `bits_per_byte` are its metrics over the text that is scored. (Its task
  `wikitext` scores a detokenized text but counts the words and bytes of the original.)
- the loop in Hugging Face's "Perplexity of fixed-length models": with its `max_length` one more than ours, since its
  windows hold the last target too, and its `stride` as ours. The losses are the same; its figure multiplies the mean
  loss of each window after the first by one token less than the mean is over, ours gives every token the same weight.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.evaluate.caching import INDEPENDENT, Caching
from analysis.text.batches import Batch, batches
from analysis.text.encoding import Encoded
from models import Model
from models.placement import to_host
from varjax import checksums
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.step import VARState
from varjax.transfer import to_device

_LENGTHS = {"max_length": "tokens", "stride": "tokens"}
UNITS = {
    "perplexity": "per token",
    "nll_per_token": "nats",
    "word_perplexity": "per part between runs of white space",
    "byte_perplexity": "per byte of UTF-8",
    "bits_per_byte": "bits, per byte of UTF-8",
    **_LENGTHS,
}


class Runner(Protocol):
    """`(carry, batch) -> (logits float32[B, T, V], carry)`; the call spends the carry."""

    def __call__(self, carry: Any, batch: Batch) -> tuple[jax.Array, Any]: ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """Losses per document. Perplexities are over all documents together, not means of means."""

    nll: np.ndarray  # float64 [N], summed over the document's scored tokens, nats
    tokens: np.ndarray  # int64 [N], scored
    words: np.ndarray  # int64 [N], see `analysis.text.encoding.count_words`
    bytes: np.ndarray  # int64 [N], UTF-8
    ids: tuple[str, ...]  # SHA-256 of each text
    groups: tuple[str, ...]
    max_length: int  # tokens of a window
    stride: int  # tokens between windows
    prefix_id: int | None = None  # read before each document; None: nothing
    full_last: bool = False  # whether a document's last window was moved back to `max_length` tokens

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
        """Per word, as `analysis.text.encoding.count_words` counts them."""
        return math.exp(self.nll.sum() / self.words.sum())

    @property
    def byte_perplexity(self) -> float:
        """Per byte of UTF-8."""
        return math.exp(self.nll.sum() / self.bytes.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits, per byte of UTF-8."""
        return float(self.nll.sum() / math.log(2) / self.bytes.sum())

    @property
    def settings(self) -> dict[str, Any]:
        """Which definition the losses follow; stands in every file that holds them."""
        return {
            "max_length": self.max_length,
            "stride": self.stride,
            "prefix_id": self.prefix_id,
            "full_last": self.full_last,
        }

    def summary(self) -> dict[str, Any]:
        """The figures of a result file."""
        return {
            "perplexity": self.perplexity,
            "nll_per_token": self.nll_per_token,
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": self.byte_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": int(self.tokens.sum()),
            "words": int(self.words.sum()),
            "bytes": int(self.bytes.sum()),
            "documents": len(self.ids),
            **self.settings,
            "units": UNITS,
        }

    def save(self, path: Path) -> None:
        """One row per document, Parquet: id, group, nll, tokens, words, bytes; whole or not at all.

        The file's metadata names the units and the settings; `pandas.read_parquet` gives them as `.attrs`.
        """
        columns = {"id": self.ids, "group": self.groups}
        columns |= {name: getattr(self, name) for name in ("nll", "tokens", "words", "bytes")}
        frame = pd.DataFrame(columns)
        frame.attrs = {**self.settings, "units": {"nll": "nats, summed over the scored tokens", **_LENGTHS}}
        checksums.write_parquet(path, _with_attrs(frame))


def _with_attrs(frame: pd.DataFrame) -> pa.Table:
    """The frame as Arrow holds it, with its `attrs` where `pandas.read_parquet` looks for them."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), "PANDAS_ATTRS": json.dumps(frame.attrs)})


def score(
    run: Runner,
    carry: Any,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    prefix_id: int | None = None,
    full_last: bool = False,
    progress: bool = True,
) -> tuple[Scores, Any]:
    """The losses of `documents` under `run`, and what its carry became.

    The module's docstring says which settings give which published definition. Where the carry is a VARState whose
    sequences have caches of their own (`analysis.evaluate.caching`), each document begins with an empty one, and its
    loss is the same in any company.

    Args:
        batch_size: rows per batch at `max_length`.
        max_length: tokens of a window, the most context that a token gets.
        stride: tokens between windows; None: `max_length`.
        prefix_id: read before each document, so that its first id is scored too; None: nothing. (Documents of less
            than two ids are not there to be scored: `analysis.text.encoding.encode` leaves them out.)
        full_last: move a document's last window back to `max_length` tokens instead of leaving it short.
    """
    nll, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    read: Iterable[Encoded] = progress_bar(documents, unit="document", show=progress)
    if prefix_id is not None:
        read = (dataclasses.replace(one, ids=prefixed(prefix_id, one.ids)) for one in read)
    one_by_one = own_caches(carry)
    for batch in batches(read, batch_size, max_length, stride, full_last, one_by_one):
        logits, carry = run(carry, batch)
        losses = to_host(token_nll(logits, *to_device((batch.targets, batch.scored)))).astype(np.float64)
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
        prefix_id=prefix_id,
        full_last=full_last,
    ), carry


def prefixed(prefix_id: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """int32 [1 + n]: an id before n others."""
    return np.concatenate([[prefix_id], ids]).astype(np.int32)


def plain_runner(model: Model) -> Runner:
    """The model as it is; its carry is None."""

    def run(carry: Any, batch: Batch) -> tuple[jax.Array, Any]:
        ids, mask = to_device((batch.ids, batch.mask))
        return model.network.forward(model.params, ids, attention_mask=mask).logits, carry

    return run


def var_runner(var_model: VARModel, caching: Caching = INDEPENDENT) -> Runner:
    """Whole windows under VAR, each without a past. The carry is the VARState, from `caching.init(var_model)`."""

    def run(carry: VARState | None, batch: Batch) -> tuple[jax.Array, VARState | None]:
        out, carry = caching.read(var_model, carry, batch)
        return out.logits, carry

    return run


def own_caches(carry: Any) -> bool:
    """Whether documents have to be read one by one in their rows, because each has a cache of its own."""
    return isinstance(carry, VARState) and carry.own_caches


@jax.jit
def token_nll(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
    """float32 [B, T]: minus log probability of each target, nats; 0 where it is not scored."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)
