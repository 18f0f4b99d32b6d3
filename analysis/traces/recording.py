"""Recording the routing trace of a model over documents.

Letters: B sequences, T positions, L layers, E experts, K experts per token.

Recorded is the learned router's own choice: its K experts, best first, with their probabilities in the softmax over all
E experts, not divided by their sum, and the entropy of that softmax. Special tokens (begin, end, padding) are routed
but not written, as they are not counted in statistics; the positions of the others keep the gap. A document longer than
`max_length` is read in windows without a past, while its positions in the trace go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from analysis.text.batches import batches
from analysis.text.encoding import Encoded, grouped
from analysis.text.prepared import tokenizer_hash
from analysis.traces.trace import Trace, TraceError, writing
from models import Model
from models.decoder import Network
from models.parameters import Params
from models.placement import to_host
from varjax.errors import InputError
from varjax.progress import progress_bar
from varjax.transfer import to_device

_TOGETHER = 1 << 16  # tokens whose decisions are held at once: about 400 bytes each in Mixtral-8x7B


def record(
    model: Model,
    documents: Iterable[Encoded],
    path: str | Path,
    *,
    batch_size: int,
    max_length: int,
    max_tokens: int | None = None,
    progress: bool = True,
) -> int:
    """Write the trace of a model, whole or not at all.

    Args:
        model: the model.
        documents: each text once; may be a stream.
        path: the file to write.
        batch_size: rows per batch at `max_length`.
        max_length: tokens per window.
        max_tokens: tokens to read at most, special ones included; the last document is cut there. None: all.
        progress: show a bar on standard error.

    Returns:
        The number of tokens left out because a router gave NaN or infinity in some layer, which should be reported.

    Raises:
        TraceError: a document comes twice, or nothing is left to write.
        InputError: a size out of range.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens}: expected at least 1, or None for all tokens")
    special = np.asarray(model.special_token_ids, np.int32)
    empty = _empty_trace(model)
    left_out = written = 0
    with (
        progress_bar(unit="token", unit_scale=True, total=max_tokens, show=progress) as bar,
        writing(path, empty) as add,
    ):
        for part in grouped(_distinct(documents, max_tokens), lambda one: len(one.ids), _TOGETHER):
            experts, probs, entropy, finite = _read(model, part, batch_size, max_length)
            sizes = [len(one.ids) for one in part]
            ids = np.concatenate([one.ids for one in part])
            ordinary = ~np.isin(ids, special)
            keep = ordinary & finite
            add(
                dataclasses.replace(
                    empty,
                    token_id=ids[keep],
                    document=np.repeat(np.arange(len(part), dtype=np.int32), sizes)[keep],
                    position=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[keep],
                    experts=experts[keep],
                    probs=probs[keep],
                    entropy=entropy[keep],
                    document_ids=tuple(one.id for one in part),
                    groups=tuple(one.group for one in part),
                )
            )
            left_out += int(np.sum(ordinary & ~finite))
            written += int(np.sum(keep))
            bar.update(len(ids))
        if not written:
            raise TraceError(
                f"{path}: no token to write, {left_out} left out with a router that gave NaN or infinity; "
                "give more documents, or fix the model's weights or dtype"
            )
    return left_out


def _empty_trace(model: Model) -> Trace:
    """The header of the model's traces, without a token."""
    config, tokenizer = model.config, model.tokenizer
    texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer))) if tokenizer else []
    shape = (0, config.num_layers, config.top_k)
    none = np.zeros(0, np.int32)
    return Trace(
        token_id=none,
        document=none,
        position=none,
        experts=np.zeros(shape, np.int16),
        probs=np.zeros(shape, np.float32),
        document_ids=(),
        groups=(),
        num_experts=config.num_experts,
        entropy=np.zeros(shape[:2], np.float32),
        token_strings={token: text for token, text in enumerate(texts) if text is not None},
        origin={
            "model": model.name,
            "revision": model.fingerprint,
            "dtype": model.dtype.name,
            "tokenizer": tokenizer_hash(tokenizer) if tokenizer else None,
            "phase": "prefill",
        },
    )


def _distinct(documents: Iterable[Encoded], max_tokens: int | None) -> Iterator[Encoded]:
    """The documents up to `max_tokens`; one that comes twice is an error."""
    seen: set[str] = set()
    left = max_tokens
    for document in documents:
        if document.id in seen:
            raise TraceError(f"document {document.id} comes twice; give each text once")
        seen.add(document.id)
        if left is not None:
            document = dataclasses.replace(document, ids=document.ids[:left])
            left -= len(document.ids)
        yield document
        if left == 0:
            return


def _read(model: Model, part: list[Encoded], batch_size: int, max_length: int) -> tuple[np.ndarray, ...]:
    """Decisions on documents in a row: experts int16 and probabilities float32 [N, L, K], gate entropy float32 [N, L],
    and bool [N], whether all of them are finite."""
    # Each window goes in as a document of its own: batches come by length, and the index says where a row belongs.
    pieces = [
        dataclasses.replace(document, ids=document.ids[start : start + max_length])
        for document in part
        for start in range(0, len(document.ids), max_length)
    ]
    ends = np.cumsum([len(piece.ids) for piece in pieces])
    shape = (int(ends[-1]), model.config.num_layers, model.config.top_k)
    columns: tuple[np.ndarray, ...] = (
        np.zeros(shape, np.int16),
        np.zeros(shape, np.float32),
        np.zeros(shape[:2], np.float32),
        np.zeros(shape[0], bool),
    )
    for batch in batches(pieces, batch_size, max_length):
        found = _decisions(model.params, *to_device((batch.ids, batch.mask)), model.network)
        rows, places = np.nonzero(batch.mask)
        # A row's first token is its window's end minus the row's length.
        token = ends[batch.documents[rows]] - batch.mask.sum(axis=1)[rows] + places
        for values, one in zip(columns, found, strict=True):
            values[token] = to_host(one)[rows, places]
    return columns


@partial(jax.jit, static_argnames="network")
def _decisions(
    params: Params, ids: jax.Array, mask: jax.Array, network: Network
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The columns of `_read`, with [B, T] instead of [N]."""
    out = network.forward(params, ids, attention_mask=mask)
    experts = jnp.minimum(out.routing.experts, out.router_probs.shape[-1] - 1)  # padding runs none
    probs = jnp.take_along_axis(out.router_probs, experts, axis=-1)
    entropy = jnp.maximum(-jnp.sum(xlogy(out.router_probs, out.router_probs), axis=-1), 0)
    finite = jnp.all(jnp.isfinite(out.router_probs), axis=(0, 3))
    experts, probs, entropy = (jnp.moveaxis(one, 0, 2) for one in (experts.astype(jnp.int16), probs, entropy))
    return experts, probs, entropy, finite
