"""Losses of a model on whole documents and on single tokens, plain or under VAR.

Letters: B sequences, T positions, V vocabulary, L layers, R table rows, N documents, M scored tokens.

The unit of evidence is the document: its summed loss, and the tokens, words and bytes that the loss is spread over.
Each scored token is scored once, given at most `max_length` tokens before it.

The settings of `score` that give the published definitions of perplexity:

- Default: every token after a document's first (the begin id, where the tokenizer adds one).
- lm-evaluation-harness, `loglikelihood_rolling` (class HFLM): `full_last=True` and `prefix_id` set to the begin id, or
  to the end id where the tokenizer has none; its `add_bos_token=False` is `full_last=True` alone, on ids that start
  with the begin id. `word_perplexity`, `byte_perplexity` and `bits_per_byte` are its metrics over the scored text. (Its
  task `wikitext` scores a detokenized text but counts the words and bytes of the original.)
- Hugging Face, "Perplexity of fixed-length models": its `max_length` is one more than ours, its `stride` is ours. The
  losses are the same; its perplexity multiplies the mean loss of each window after the first by one token less than the
  mean is over, ours gives every token the same weight.

By default each document starts with an empty cache, which learns from one window of the document to the next. (Within a
window it decides nothing: a plan is made before the window is read.) A service has one cache for all of its texts; then
losses depend on the order of the documents and on the batch size, and the result says so. The cache ages by tokens, not
by the machine's clock, so that every run forgets the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.text.batches import Batch, batches, cut
from analysis.text.encoding import Encoded
from models import Model
from models.placement import to_host
from varjax import checksums
from varjax.errors import InputError
from varjax.keys import ANY
from varjax.model import VARModel, VAROutput
from varjax.progress import progress_bar
from varjax.routing import CACHED, FAST
from varjax.step import VARState, begin
from varjax.transfer import to_device

SECONDS_PER_TOKEN = 0.01
"""A stream of 100 tokens a second, the pace of a served text. A time to live of 10 s is then 1,000 tokens, one of 300 s
30,000 tokens: the range in which documents repeat themselves."""

BY_ROUTER, BY_CACHE = -2, -1  # what decided a token, where it was not a key of the table

_LENGTHS = {"max_length": "tokens", "stride": "tokens"}
UNITS = {
    "perplexity": "per token",
    "nll_per_token": "nats",
    "word_perplexity": "per part between runs of white space",
    "byte_perplexity": "per byte of UTF-8",
    "bits_per_byte": "bits, per byte of UTF-8",
    **_LENGTHS,
}

Runner = Callable[[Any, Batch], tuple[jax.Array, Any]]
"""`(carry, batch) -> (logits float32 [B, T, V], carry)`; the call spends the carry."""


@dataclasses.dataclass(frozen=True)
class Caching:
    """Which documents share a cached tier, and how fast it ages.

    Raises:
        InputError: the time per token is not above 0.
    """

    shared: bool = False  # one cache for all documents, as in a service; False: one for each document
    seconds_per_token: float = SECONDS_PER_TOKEN

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds_per_token) and self.seconds_per_token > 0):
            raise InputError(f"seconds_per_token={self.seconds_per_token}: expected a time above 0, such as 0.01")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Caching:
        """Read the arguments `args` that `add_caching_arguments` added to a parser."""
        return cls(args.shared_cache, args.seconds_per_token)

    def init(self, var_model: VARModel, batch_size: int = 1) -> VARState | None:
        """The state before the first document; None with VAR switched off."""
        return var_model.init(batch_size, shared_cache=self.shared)

    def enter(self, state: VARState, batch: Batch) -> tuple[VARState, float]:
        """Prepare for a batch of windows, each without a past.

        Args:
            state: after the batch before.
            batch: of `analysis.text.batches.in_order` where the documents have caches of their own.

        Returns:
            The state to read the batch with, and the time in seconds.
        """
        if not state.own_caches:
            return begin(state, len(batch.ids)), self.now(state)
        kept = to_device(batch.goes_on) if batch.goes_on.any() else None
        return begin(state, len(batch.ids), kept), batch.start * self.seconds_per_token

    def now(self, state: VARState) -> float:
        """The time of a cache that all sequences share, seconds: it ages by every token that the state has counted."""
        tokens = int(np.asarray(state.counters.tokens)[0].sum()) if state.cache is not None else 0  # of layer 0
        return tokens * self.seconds_per_token

    def span(self, documents: Sequence[Encoded], max_length: int, stride: int | None = None) -> float:
        """Compute the greatest age at which a cached decision may be looked up while documents are scored.

        Args:
            documents: in token ids.
            max_length: as in `score`.
            stride: as in `score`.

        Returns:
            Seconds; 0 if no decision is ever looked up.
        """
        sizes = [[window.size for window in cut(one.ids, 0, max_length, stride)] for one in documents]
        if self.shared:
            tokens = sum(map(sum, sizes))
        else:
            tokens = max(((len(windows) - 1) * max_length for windows in sizes), default=0)
        return tokens * self.seconds_per_token

    def clock(self, start: float = 0.0) -> Callable[[], float]:
        """A clock for decoding: its first reading is `start` seconds, and every call advances it by one token."""
        ticks = itertools.count()
        return lambda: start + next(ticks) * self.seconds_per_token

    @property
    def words(self) -> str:
        """The setting in words, for a report."""
        whose = "one for all documents, so that losses depend on their order" if self.shared else "one per document"
        return f"{whose}; {self.seconds_per_token:g} s per token"

    def facts(self, config: Any) -> tuple[tuple[str, str], ...]:
        """What a report states about the cached tier; nothing where the VARConfig `config` has none."""
        return (("cached tier", self.words),) if config.enable_var and config.cache_size > 0 else ()


INDEPENDENT = Caching()


def add_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--shared_cache` and `--seconds_per_token`, which `Caching.of` reads, to a parser."""
    parser.add_argument(
        "--shared_cache",
        action="store_true",
        help="let all documents share one cached tier, as in a service; a document's loss then depends on the order of "
        "the documents and on the batch size. By default, each document starts with an empty cache of its own",
    )
    parser.add_argument(
        "--seconds_per_token",
        type=float,
        default=SECONDS_PER_TOKEN,
        help="seconds by which the clock of the cached tier advances per token",
    )


class LossesError(InputError):
    """Losses that cannot be compared or certified; names what is wrong and the fix."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """The loss of each document. Perplexities are over all documents together, not means of means."""

    ids: Sequence[str]  # N, SHA-256 of each text
    groups: Sequence[str]  # N
    nll: np.ndarray  # float64 [N], summed over the document's scored tokens, nats
    tokens: np.ndarray  # int64 [N], scored

    @property
    def nll_per_token(self) -> float:
        """The mean loss over all scored tokens, nats."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """The perplexity per token."""
        return math.exp(self.nll_per_token)


def paired(base: Losses, other: Losses, names: tuple[str, str]) -> pd.DataFrame:
    """Pair two runs document by document.

    Args:
        base: one run.
        other: another run on the same documents, in any order.
        names: of the two, for messages.

    Returns:
        One row per document with its `group`, its scored `tokens` and the loss that `other` `added`, nats; by id.

    Raises:
        LossesError: a document occurs twice, a loss is not finite, or the two did not score the same tokens of the same
            documents.
    """
    tables = []
    for name, one in zip(names, (base, other), strict=True):
        table = pd.DataFrame({"group": one.groups, "nll": one.nll, "tokens": one.tokens}, index=list(one.ids))
        if table.index.has_duplicates:
            twice = table.index[table.index.duplicated()][0]
            raise LossesError(f"{name} has document {twice} twice; a document counts once: remove its copies")
        if len(wrong := table.index[~np.isfinite(table["nll"])]):
            raise LossesError(
                f"{name} has loss {table['nll'][wrong[0]]} on document {wrong[0]}; find out why, evaluate again"
            )
        tables.append(table)
    ours, theirs = tables
    shared = len(ours.index.intersection(theirs.index))
    if not shared == len(ours) == len(theirs):
        raise LossesError(
            f"{names[1]} shares {shared} of its {len(theirs)} documents with the {len(ours)} of {names[0]}; evaluate "
            "both on the same dataset, split and number of samples"
        )
    theirs = theirs.loc[ours.index]
    for column, fix in (("tokens", "use one tokenizer and equal windows"), ("group", "use one dataset")):
        if len(wrong := ours.index[ours[column] != theirs[column]]):
            raise LossesError(f"{names[1]} has other {column} than {names[0]} on document {wrong[0]}; {fix}")
    return ours[["group", "tokens"]].assign(added=theirs["nll"] - ours["nll"])


@dataclasses.dataclass(frozen=True)
class Scores(Losses):
    """The losses of an evaluation, with the units that they are spread over and the settings that they follow."""

    words: np.ndarray  # int64 [N], as `analysis.text.encoding.count_words` counts them
    bytes: np.ndarray  # int64 [N], UTF-8
    max_length: int  # tokens of a window
    stride: int  # tokens between windows
    prefix_id: int | None = None  # read before each document; None: nothing
    full_last: bool = False  # whether a document's last window was moved back to `max_length` tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8."""
        return float(self.nll.sum() / math.log(2) / self.bytes.sum())

    @property
    def settings(self) -> dict[str, Any]:
        """The definition that the losses follow; every file with losses states it."""
        return {name: getattr(self, name) for name in ("max_length", "stride", "prefix_id", "full_last")}

    def summary(self) -> dict[str, Any]:
        """The numbers of a result file: perplexities, counts, settings and units."""
        nats = self.nll.sum()
        return {
            "perplexity": self.perplexity,
            "nll_per_token": self.nll_per_token,
            "word_perplexity": math.exp(nats / self.words.sum()),
            "byte_perplexity": math.exp(nats / self.bytes.sum()),
            "bits_per_byte": self.bits_per_byte,
            **{name: int(getattr(self, name).sum()) for name in ("tokens", "words", "bytes")},
            "documents": len(self.ids),
            **self.settings,
            "units": UNITS,
        }

    def save(self, path: Path) -> None:
        """Write one row per document (id, group, nll, tokens, words, bytes) as Parquet, whole or not at all.

        The file's metadata names the units and the settings; `pandas.read_parquet` returns them as `.attrs`.

        Args:
            path: the file.
        """
        columns = {name: getattr(self, name) for name in ("nll", "tokens", "words", "bytes")}
        frame = pd.DataFrame({"id": self.ids, "group": self.groups} | columns)
        attrs = {**self.settings, "units": {"nll": "nats, summed over the scored tokens", **_LENGTHS}}
        table = pa.Table.from_pandas(frame, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), "PANDAS_ATTRS": json.dumps(attrs)}
        checksums.write_parquet(path, table.replace_schema_metadata(metadata))


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
    """Compute the loss of every document.

    Args:
        run: reads a batch, such as `plain_runner(model)` or `var_runner(var_model)`.
        carry: what `run` takes first. Where it is a VARState whose sequences have caches of their own, each document
            starts with an empty one.
        documents: in token ids.
        batch_size: rows per batch at `max_length`.
        max_length: tokens of a window, the most context that a token gets.
        stride: tokens between windows; None: `max_length`.
        prefix_id: read before each document, so that its first id is scored too; None: nothing.
        full_last: move a document's last window back to `max_length` tokens instead of leaving it short.
        progress: show a bar on standard error.

    Returns:
        The losses, and what the carry became.
    """
    nll, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    read: Iterable[Encoded] = progress_bar(documents, unit="document", show=progress)
    if prefix_id is not None:
        read = (dataclasses.replace(one, ids=np.array([prefix_id, *one.ids], np.int32)) for one in read)
    one_by_one = isinstance(carry, VARState) and carry.own_caches
    for batch in batches(read, batch_size, max_length, stride, full_last, one_by_one):
        logits, carry = run(carry, batch)
        losses = to_host(token_nll(logits, *to_device((batch.targets, batch.scored)))).astype(np.float64)
        del logits  # frees them: the next call would need memory for both
        owned = batch.documents >= 0
        np.add.at(nll, batch.documents[owned], losses.sum(1)[owned])
        np.add.at(tokens, batch.documents[owned], batch.scored.sum(1)[owned])
    return Scores(
        ids=tuple(document.id for document in documents),
        groups=tuple(document.group for document in documents),
        nll=nll,
        tokens=tokens,
        words=np.array([document.words for document in documents]),
        bytes=np.array([document.bytes for document in documents]),
        max_length=max_length,
        stride=max_length if stride is None else stride,
        prefix_id=prefix_id,
        full_last=full_last,
    ), carry


def plain_runner(model: Model) -> Runner:
    """Read windows with the model as it is.

    Args:
        model: a loaded model.

    Returns:
        A runner whose carry is None.
    """

    def run(carry: Any, batch: Batch) -> tuple[jax.Array, Any]:
        ids, mask = to_device((batch.ids, batch.mask))
        return model.network.forward(model.params, ids, attention_mask=mask).logits, carry

    return run


def var_runner(var_model: VARModel, caching: Caching = INDEPENDENT) -> Runner:
    """Read windows under VAR, each without a past.

    Args:
        var_model: the model.
        caching: which documents share a cached tier.

    Returns:
        A runner whose carry is the VARState, first from `caching.init(var_model)`.
    """

    def run(carry: VARState | None, batch: Batch) -> tuple[jax.Array, VARState | None]:
        out, carry = _read(var_model, caching, carry, batch)
        return out.logits, carry

    return run


def _read(
    var_model: VARModel, caching: Caching, state: VARState | None, batch: Batch
) -> tuple[VAROutput, VARState | None]:
    """What the model says about a batch of windows, each without a past, and the state afterwards."""
    now = 0.0
    if state is not None:
        state, now = caching.enter(state, batch)
    ids, mask = to_device((batch.ids, batch.mask))
    return var_model.advance(state, ids, mask, now=now, donate=True)


@jax.jit
def token_nll(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
    """Compute minus the log probability of each target.

    Args:
        logits: float32 [B, T, V].
        targets: int32 [B, T].
        scored: bool [B, T].

    Returns:
        float32 [B, T], nats; 0 where it is not scored.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """The loss of each token, at the position that made the prediction: id, key and experts are those of that position.

    Runs that read the same documents in the same way hold the same tokens in the same order.
    """

    nll: np.ndarray  # float64 [M], of the token that follows, nats
    document: np.ndarray  # int32 [M], 0 to N - 1
    token_id: np.ndarray  # int32 [M]
    order: np.ndarray  # int8 [M], of the longest key that answered in any layer; else BY_CACHE or BY_ROUTER
    experts: np.ndarray  # int32 [M], that ran, summed over layers
    documents: int  # N

    def per_document(self, values: np.ndarray) -> np.ndarray:
        """Sum values over the tokens of each document.

        Args:
            values: [M, ...].

        Returns:
            float64 [N, ...].
        """
        sums = np.zeros((self.documents, *values.shape[1:]))
        np.add.at(sums, self.document, values)
        return sums

    def added_to(self, plain: TokenLosses) -> np.ndarray:
        """How much more this run loses at each token than another.

        Args:
            plain: the other run.

        Returns:
            float64 [M], nats.

        Raises:
            InputError: the two did not read the same tokens.
        """
        same = len(plain.nll) == len(self.nll)
        if not (same and (plain.document == self.document).all() and (plain.token_id == self.token_id).all()):
            raise InputError(
                f"the two runs scored different tokens ({len(plain.nll)} and {len(self.nll)}); give both the same "
                "documents, batch_size, max_length and stride"
            )
        return self.nll - plain.nll


def token_losses(
    var_model: VARModel,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    caching: Caching = INDEPENDENT,
) -> TokenLosses:
    """Compute the loss of every scored token in one pass, from a fresh state.

    Args:
        var_model: the model; with VAR switched off the losses are the plain model's.
        documents: in token ids.
        batch_size: as in `score`.
        max_length: as in `score`.
        stride: as in `score`.
        caching: which documents share a cached tier.

    Returns:
        The losses. The order of the tokens follows from the documents and the settings, whatever the model.
    """
    table, state = var_model.table, caching.init(var_model, batch_size)
    order = None if table is None else jnp.sum(table.index.keys != ANY, axis=-1).astype(jnp.int8)
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in batches(documents, batch_size, max_length, stride, one_by_one=True):
        out, state = _read(var_model, caching, state, batch)
        losses = to_host(token_nll(out.logits, *to_device((batch.targets, batch.scored))))
        answered, active = _account(out, order)
        owner = np.broadcast_to(batch.documents[:, None], batch.ids.shape)
        del out  # frees its logits: the next call would need memory for both
        kept = (np.asarray(one)[batch.scored] for one in (losses, owner, batch.ids, answered, active))
        parts.append(tuple(kept))
    nll, document, token_id, answered_by, experts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenLosses(np.asarray(nll, np.float64), document, token_id, answered_by, experts, len(documents))


def _account(out: VAROutput, order: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """int8 and int32 [B, T]: what answered, and how many experts ran. `order` int8 [R] is that of the table's rows."""
    plan, routing, probs = out.plan, out.routing, out.router_probs
    assert routing is not None and probs is not None  # only a step of decoding leaves them out
    active = jnp.sum(routing.experts < probs.shape[-1], axis=(0, -1), dtype=jnp.int32)
    if plan is None or order is None:
        return jnp.full(active.shape, BY_ROUTER, jnp.int8), active
    other = jnp.where(plan.tier == CACHED, jnp.int8(BY_CACHE), jnp.int8(BY_ROUTER))
    return jnp.max(jnp.where(plan.tier == FAST, order[plan.row], other), axis=0), active
