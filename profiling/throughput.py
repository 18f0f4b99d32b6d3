"""Tokens per second of a VAR model against its plain model, on real text, paired.

Letters: B sequences, T positions.

Prefill reads whole windows of B documents; decode feeds B documents token by token through the key/value cache. The
tokens are the documents' own, not the model's: what VAR saves depends on the text, and small models repeat themselves.

What a step of decoding must read is the experts that any of its B tokens runs. Where a machine's time goes into reading
weights, the gain is that of the distinct experts and vanishes as B grows; where it goes into arithmetic, it is that of
the experts that run. Both stand beside the measured speed-up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.text.encoding import Encoded
from profiling.timing import Ratio, compare, paired_ratio
from varjax.config import VARConfig
from varjax.model import VARModel


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One phase at one batch size."""

    phase: str  # "prefill" or "decode"
    batch: int  # B
    tokens: int  # in one timed run
    plain: float  # tokens/s, median
    var: float  # tokens/s, median
    speedup: Ratio  # paired, round by round
    experts: tuple[float, ...]  # that run per token and layer: plain and VAR
    distinct: tuple[float, ...]  # experts of a layer that any token of a call runs, mean: plain and VAR


def by_batch(
    var_model: VARModel,
    documents: Sequence[Encoded],
    *,
    batch_sizes: Sequence[int] = (1, 4, 8, 16),
    max_length: int = 256,
    decode_tokens: int = 32,
    repeats: int = 11,
    seed: int = 0,
) -> list[Throughput]:
    """Prefill and decode at each batch size for which there are documents; else the arguments are those of `measure`.

    VAR must be switched on.
    """
    sides = {"plain": VARModel(var_model.model, VARConfig(enable_var=False)), "var": var_model}
    found = []
    for batch in (size for size in batch_sizes if size <= len(documents)):
        prompt = longest_texts(documents, batch, max_length)
        text = prompt[:, : min(2 * decode_tokens, prompt.shape[1])]
        half = text.shape[1] // 2
        for phase, make, ids, tokens in (
            ("prefill", _prefill, prompt, prompt.size),
            ("decode", _decode, text, text[:, half:].size),
        ):
            seconds = compare({name: make(side, ids) for name, side in sides.items()}, repeats, seed=seed)
            used = {name: used_experts(side, ids) for name, side in sides.items()}  # bool [L, B, T, E]
            if phase == "decode":
                used = {name: one[:, :, half:] for name, one in used.items()}
            call = 1 if phase == "decode" else (1, 2)  # the axes that one call spans
            distinct = tuple(float(one.any(axis=call).sum(-1).mean()) for one in used.values())
            rates = {name: tokens / float(np.median(one)) for name, one in seconds.items()}
            ratio = paired_ratio(seconds["plain"], seconds["var"])
            experts = tuple(float(one.sum(-1).mean()) for one in used.values())
            found.append(
                Throughput(phase, len(ids), tokens, **rates, speedup=ratio, experts=experts, distinct=distinct)
            )
    return found


def measure(
    var_model: VARModel,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    decode_tokens: int = 48,
    repeats: int = 15,
    seed: int = 0,
    phases: Sequence[str] = ("prefill", "decode"),
) -> dict[str, Any]:
    """Throughput of `var_model`, and its paired speed-up over the plain model where VAR is switched on.

    Args:
        documents: text to read; the longest ones are taken.
        batch_size, max_length: of the prefill.
        decode_tokens: tokens per timed decode run, batch 1, after a prompt of the same length.
        repeats: rounds, each of which times both sides once.
        phases: those to time.
    """
    prompt = longest_texts(documents, batch_size, max_length)
    text = prompt[:1, : min(2 * decode_tokens, max_length)]
    sides = {"var": var_model} if var_model.table is not None else {}
    sides["plain"] = VARModel(var_model.model, VARConfig(enable_var=False))
    subject = next(iter(sides))

    result: dict[str, Any] = {"repeats": repeats, "speedup": {}}
    runs: dict[str, tuple[int, Callable[[VARModel, np.ndarray], Callable[[], Any]], np.ndarray]] = {
        "prefill": (prompt.size, _prefill, prompt),
        "decode": (text.shape[1] - text.shape[1] // 2, _decode, text),
    }
    for phase in phases:
        tokens, make, ids = runs[phase]
        seconds = compare({name: make(side, ids) for name, side in sides.items()}, repeats, seed=seed)
        result[f"{phase}_tokens_per_second"] = tokens / float(np.median(seconds[subject]))
        result[phase] = {"batch": ids.shape[0], "tokens": tokens}
        if "var" in sides:
            result["speedup"][phase] = dataclasses.asdict(paired_ratio(seconds["plain"], seconds["var"]))
    return result


def _prefill(var_model: VARModel, prompt: np.ndarray) -> Callable[[], Any]:
    ids, mask = jnp.asarray(prompt), jnp.ones(prompt.shape, bool)
    start = var_model.init(len(prompt))

    def run() -> Any:
        out, _ = var_model(ids, jax.tree.map(jnp.copy, start), mask)  # a cache that knew this very text would flatter
        return out.logits

    return run


def _decode(var_model: VARModel, text: np.ndarray) -> Callable[[], Any]:
    """Feeds the second halves of texts [B, T] token by token; the first halves are in the cache beforehand, untimed."""
    batch, half = text.shape[0], text.shape[1] // 2
    steps = [jnp.asarray(text[:, index : index + 1]) for index in range(half, text.shape[1])]
    one = jnp.ones((batch, 1), bool)
    out, state = var_model.prefill(text[:, :half], var_model.init(batch), capacity=text.shape[1])
    start = (out.kv, state)

    def run() -> Any:
        kv, state = jax.tree.map(jnp.copy, start)  # every step spends what it is given
        for ids in steps:
            out, state = var_model.advance(state, ids, one, kv, last_logits_only=True)
            kv = out.kv
        return out.logits

    return run


def longest_texts(documents: Sequence[Encoded], batch_size: int, max_length: int) -> np.ndarray:
    """int32 [B, T]: the beginnings of the longest documents, cut to the shortest of them.

    Raises ValueError where there is no document at all.
    """
    if not documents:
        raise ValueError("there is no document to read; raise --num_samples, or name another split")
    longest = sorted(documents, key=lambda document: -len(document.ids))[:batch_size]
    length = min(max_length, len(longest[-1].ids))
    return np.stack([document.ids[:length] for document in longest])


def used_experts(var_model: VARModel, ids: np.ndarray) -> np.ndarray:
    """bool [L, B, T, E]: which experts run at each token of whole texts [B, T]."""
    out, _ = var_model(ids, var_model.init(len(ids)))
    assert out.routing is not None
    return np.any(np.asarray(out.routing.experts)[..., None] == np.arange(var_model.model.config.num_experts), axis=-2)
