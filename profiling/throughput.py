"""Tokens per second of a VAR model against its plain model, on real text, paired.

Letters: B sequences, T positions, G groups of B texts.

Prefill reads whole windows of B documents; decode feeds B documents token by token through the key/value cache. The
tokens are the documents' own, not the model's: what VAR saves depends on the text, and small models repeat themselves.
So a timed run reads several texts, drawn at random, one group of B after the other.

What a step of decoding must read is the experts that any of its B tokens runs. Where a machine's time goes into reading
weights, the gain is that of the distinct experts and vanishes as B grows; where it goes into arithmetic, it is that of
the experts that run. Both stand beside the measured speed-up.

The cached tier ages by tokens, not by the machine's clock: a decision must not expire because a repeat came late.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.evaluate.losses import SECONDS_PER_TOKEN
from analysis.resampling import Estimate
from analysis.text.encoding import Encoded
from profiling.timing import compare, paired_ratio
from varjax.errors import NotTestableError
from varjax.model import VARModel

TEXTS = 8  # that a timed run reads at least


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One phase at one batch size."""

    phase: str  # "prefill" or "decode"
    batch: int  # B
    tokens: int  # in one timed run
    plain: float  # tokens/s, median
    var: float  # tokens/s, median
    speedup: Estimate  # paired, round by round
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
    seconds_per_token: float = SECONDS_PER_TOKEN,
) -> list[Throughput]:
    """Prefill and decode at each batch size for which there are documents; else the arguments are those of `measure`.

    VAR must be switched on.
    """
    sides = {"plain": var_model.disabled(), "var": var_model}
    found = []
    for batch in (size for size in batch_sizes if size <= len(documents)):
        prompt = grouped(documents, batch, max_length, seed)
        text = prompt[..., : min(2 * decode_tokens, prompt.shape[2])]
        half = text.shape[2] // 2
        for phase, make, ids, tokens in (
            ("prefill", _prefill, prompt, prompt.size),
            ("decode", partial(_decode, seconds_per_token=seconds_per_token), text, text[..., half:].size),
        ):
            seconds = compare({name: make(side, ids) for name, side in sides.items()}, repeats, seed=seed)
            used = {name: np.stack([used_experts(side, group) for group in ids]) for name, side in sides.items()}
            if phase == "decode":
                used = {name: one[..., half:, :] for name, one in used.items()}  # bool [G, L, B, T, E]
            call = 2 if phase == "decode" else (2, 3)  # the axes that one call spans
            distinct = tuple(float(one.any(axis=call).sum(-1).mean()) for one in used.values())
            rates = {name: tokens / float(np.median(one)) for name, one in seconds.items()}
            ratio = paired_ratio(seconds["plain"], seconds["var"])
            experts = tuple(float(one.sum(-1).mean()) for one in used.values())
            found.append(Throughput(phase, batch, tokens, **rates, speedup=ratio, experts=experts, distinct=distinct))
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
    seconds_per_token: float = SECONDS_PER_TOKEN,
) -> dict[str, Any]:
    """Throughput of `var_model`, and its paired speed-up over the plain model where VAR is switched on.

    The rates of both sides are of the same rounds. A speed-up is the median of the ratios inside the rounds.

    Args:
        documents: text to read; `seed` draws those of a run.
        batch_size: texts of the prefill.
        max_length: tokens of each.
        decode_tokens: tokens per timed decode run, batch 1, after a prompt of the same length.
        repeats: rounds, each of which times both sides once.
        phases: those to time.
        seconds_per_token: on the clock that ages the cached tier.
    """
    prompt = grouped(documents, batch_size, max_length, seed)
    text = grouped(documents, 1, min(2 * decode_tokens, max_length), seed)
    sides = {"var": var_model} if var_model.table is not None else {}
    sides["plain"] = var_model.disabled()
    subject = next(iter(sides))

    result: dict[str, Any] = {"repeats": repeats, "speedup": {}}
    runs: dict[str, tuple[int, Callable[[VARModel, np.ndarray], Callable[[], Any]], np.ndarray]] = {
        "prefill": (prompt.size, _prefill, prompt),
        "decode": (
            text[..., text.shape[2] // 2 :].size,
            partial(_decode, seconds_per_token=seconds_per_token),
            text,
        ),
    }
    for phase in phases:
        tokens, make, ids = runs[phase]
        seconds = compare({name: make(side, ids) for name, side in sides.items()}, repeats, seed=seed)
        result[f"{phase}_tokens_per_second"] = tokens / float(np.median(seconds[subject]))
        result[phase] = {"batch": ids.shape[1], "tokens": tokens}
        if "var" in sides:
            result[phase]["plain_tokens_per_second"] = tokens / float(np.median(seconds["plain"]))
            result["speedup"][phase] = dataclasses.asdict(paired_ratio(seconds["plain"], seconds["var"]))
    return result


def _prefill(var_model: VARModel, prompts: np.ndarray) -> Callable[[], Any]:
    """Reads texts [G, B, T], group by group."""
    groups = [jnp.asarray(group) for group in prompts]
    mask, start = jnp.ones(groups[0].shape, bool), var_model.init(prompts.shape[1])

    def run() -> Any:
        for ids in groups:
            out, _ = var_model(
                ids, start, mask
            )  # each time from the start: a cache that knew these texts would flatter
        return out.logits

    return run


def _decode(var_model: VARModel, texts: np.ndarray, seconds_per_token: float) -> Callable[[], Any]:
    """Feeds the second halves of texts [G, B, T] token by token; the first halves are in the cache beforehand, untimed.

    One group after the other.
    """
    _, batch, length = texts.shape
    half, one = length // 2, jnp.ones((batch, 1), bool)
    groups = []
    for text in texts:
        out, state = var_model.prefill(text[:, :half], var_model.init(batch), capacity=length, now=0.0)
        steps = [(jnp.asarray(text[:, at : at + 1]), at * seconds_per_token) for at in range(half, length)]
        groups.append(((out.kv, state), steps))

    def run() -> Any:
        for start, steps in groups:
            kv, state = jax.tree.map(jnp.copy, start)  # every step spends what it is given
            for ids, now in steps:
                out, state = var_model.advance(state, ids, one, kv, last_logits_only=True, now=now, donate=True)
                kv = out.kv
        return out.logits

    return run


def grouped(documents: Sequence[Encoded], batch_size: int, max_length: int, seed: int) -> np.ndarray:
    """int32 [G, B, T]: at least TEXTS texts, if there are as many, and one group in any case."""
    groups = max(1, min(TEXTS, len(documents)) // batch_size)
    texts = drawn_texts(documents, groups * batch_size, max_length, seed)
    return texts[: len(texts) // groups * groups].reshape(groups, -1, texts.shape[1])


def drawn_texts(documents: Sequence[Encoded], number: int, max_length: int, seed: int = 0) -> np.ndarray:
    """int32 [B, T]: the beginnings of so many documents, drawn at random among those of `max_length` ids or more.

    Where there are too few of these, the longest ones, cut to the shortest of them.

    Raises:
        NotTestableError: there is no document at all.
    """
    if not documents:
        raise NotTestableError("there is no document to read; raise --num_samples, or name another split")
    long = [document for document in documents if len(document.ids) >= max_length]
    if len(long) >= number:
        chosen = [long[index] for index in np.random.default_rng(seed).permutation(len(long))[:number]]
    else:
        chosen = sorted(documents, key=lambda document: -len(document.ids))[:number]
    length = min(max_length, len(chosen[-1].ids))
    return np.stack([document.ids[:length] for document in chosen])


def used_experts(var_model: VARModel, ids: np.ndarray) -> np.ndarray:
    """bool [L, B, T, E]: which experts run at each token of whole texts [B, T]."""
    out, _ = var_model(ids, var_model.init(len(ids)))
    assert out.routing is not None
    return np.any(np.asarray(out.routing.experts)[..., None] == np.arange(var_model.model.config.num_experts), axis=-2)
