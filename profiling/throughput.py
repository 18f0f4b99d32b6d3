"""Tokens per second of a VAR model against its plain model, on real text, paired.

Letters: B sequences, T positions.

Prefill reads whole windows of B documents; decode feeds one document token by token through the key/value cache. The
tokens are the documents' own, not the model's: what VAR saves depends on the text, and small models repeat themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.text.encoding import Encoded
from profiling.timing import compare, paired_ratio
from varjax.config import VARConfig
from varjax.model import VARModel


def measure(
    var_model: VARModel,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    decode_tokens: int = 48,
    repeats: int = 15,
    seed: int = 0,
) -> dict[str, Any]:
    """Throughput of `var_model`, and its paired speed-up over the plain model where VAR is switched on.

    Args:
        documents: text to read; the longest ones are taken.
        batch_size, max_length: of the prefill.
        decode_tokens: tokens per timed decode run, batch 1, after a prompt of the same length.
        repeats: rounds, each of which times both sides once.
    """
    prompt = _prompt(documents, batch_size, max_length)
    text = prompt[:1, : min(2 * decode_tokens, max_length)]
    sides = {"var": var_model} if var_model.table is not None else {}
    sides["plain"] = VARModel(var_model.model, VARConfig(enable_var=False))
    subject = next(iter(sides))

    result: dict[str, Any] = {"repeats": repeats, "speedup": {}}
    phases: dict[str, tuple[int, Callable[[VARModel, np.ndarray], Callable[[], Any]], np.ndarray]] = {
        "prefill": (prompt.size, _prefill, prompt),
        "decode": (text.shape[1] - text.shape[1] // 2, _decode, text),
    }
    for phase, (tokens, make, ids) in phases.items():
        seconds = compare({name: make(side, ids) for name, side in sides.items()}, repeats, seed=seed)
        result[f"{phase}_tokens_per_second"] = tokens / float(np.median(seconds[subject]))
        result[phase] = {"batch": ids.shape[0], "tokens": tokens}
        if "var" in sides:
            result["speedup"][phase] = dataclasses.asdict(paired_ratio(seconds["plain"], seconds["var"]))
    return result


def _prompt(documents: Sequence[Encoded], batch_size: int, max_length: int) -> np.ndarray:
    """int32 [B, T]: the beginnings of the longest documents, cut to the shortest of them."""
    longest = sorted(documents, key=lambda document: -len(document.ids))[:batch_size]
    length = min(max_length, len(longest[-1].ids))
    return np.stack([document.ids[:length] for document in longest])


def _prefill(var_model: VARModel, prompt: np.ndarray) -> Callable[[], Any]:
    ids, mask = jnp.asarray(prompt), jnp.ones(prompt.shape, bool)
    carry = [var_model.init(len(prompt))]

    def run() -> Any:
        out, carry[0] = var_model(ids, carry[0], mask)
        return out.logits

    return run


def _decode(var_model: VARModel, text: np.ndarray) -> Callable[[], Any]:
    """Feeds the second half of one text token by token; its first half is in the cache beforehand, untimed."""
    half = text.shape[1] // 2
    steps = [jnp.asarray(text[:, index : index + 1]) for index in range(half, text.shape[1])]
    one = jnp.ones((1, 1), bool)
    kv = var_model.model.empty_cache(1, text.shape[1])
    out, state = var_model.advance(
        var_model.init(1), jnp.asarray(text[:, :half]), jnp.ones((1, half), bool), kv, last_logits_only=True
    )
    start = (out.kv, state)

    def run() -> Any:
        kv, state = jax.tree.map(jnp.copy, start)  # every step spends what it is given
        for ids in steps:
            out, state = var_model.advance(state, ids, one, kv, last_logits_only=True)
            kv = out.kv
        return out.logits

    return run
