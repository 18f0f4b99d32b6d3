"""Timing in interleaved rounds, and the tokens per second of a VAR model against its plain model on real text.

Machines drift, so two things are compared only within one run, round by round: each round times every callable once in
random order, and a ratio is taken within the round.

Letters: B sequences, T positions, G groups of B texts, L layers, E experts.

Prefill reads whole windows of B documents; decode feeds B documents token by token through the key/value cache. The
tokens are those of the documents: what VAR saves depends on the text, and small models repeat themselves. A timed run
reads several texts, one group of B after the other.

A decoding step reads the weights of every expert that any of its B tokens runs. On a machine limited by memory the gain
follows these distinct experts and vanishes as B grows; on one limited by arithmetic it follows the experts that run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from analysis.criteria import EVALUATION_SPEEDUP
from analysis.evaluate.losses import SECONDS_PER_TOKEN
from analysis.report.figures import panels
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import Estimate, median_estimate
from analysis.text.encoding import Encoded
from profiling.calls import PHASES, used_experts
from varjax.errors import InputError, NotTestableError
from varjax.model import VARModel

NAME = "throughput"
_TEXTS = 8  # that a timed run reads at least


def compare(
    callables: Mapping[str, Callable[[], Any]], repeats: int = 15, warmup: int = 2, seed: int = 0
) -> dict[str, np.ndarray]:
    """Time callables against each other in interleaved rounds.

    Args:
        callables: by name; each returns what it computed, which is waited for.
        repeats: rounds that count.
        warmup: rounds before them, which also compile.
        seed: of the order within the rounds.

    Returns:
        Name -> seconds in each round, float64 [repeats].

    Raises:
        InputError: no rounds.
    """
    if repeats < 1:
        raise InputError(f"repeats={repeats}: expected at least 1")
    rng = np.random.default_rng(seed)
    names = list(callables)
    seconds = {name: np.empty(repeats) for name in names}
    for index in range(-warmup, repeats):
        for position in rng.permutation(len(names)):
            name = names[position]
            start = time.perf_counter()
            jax.block_until_ready(callables[name]())
            if index >= 0:
                seconds[name][index] = time.perf_counter() - start
    return seconds


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """The median over rounds of a ratio of times.

    Args:
        numerator: float64 [repeats], seconds.
        denominator: float64 [repeats], seconds of the same rounds.

    Returns:
        The median with a 95% bootstrap interval over rounds.
    """
    return median_estimate(numerator / denominator)


def geometric_mean(ratios: Iterable[float]) -> float:
    """The geometric mean of at least one ratio.

    Args:
        ratios: positive numbers.

    Returns:
        Their mean.
    """
    found = list(ratios)
    return math.prod(found) ** (1 / len(found))


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
    """Throughput of prefill and decode by batch size, under VAR and without.

    Args:
        var_model: a model with VAR switched on.
        documents: texts to read.
        batch_sizes: numbers of sequences; those for which there are too few documents are skipped.
        max_length: as in `measure`, like the next four.
        decode_tokens: tokens of a timed stretch of decoding.
        repeats: number of timed rounds.
        seed: of the choice of texts.
        seconds_per_token: by which the clock of the cached tier advances.

    Returns:
        Per batch size, prefill and then decode.
    """
    compared = {"plain": var_model.disabled(), "var": var_model}
    found = []
    for batch in (size for size in batch_sizes if size <= len(documents)):
        prompts = _grouped(documents, batch, max_length, seed)
        for phase, ids in (("prefill", prompts), ("decode", prompts[..., : 2 * decode_tokens])):
            tokens, seconds = _time(compared, phase, ids, repeats, seed, seconds_per_token)
            used = [np.stack([used_experts(side, group) for group in ids]) for side in compared.values()]
            axes: Any = (2, 3)  # of [G, L, B, T, E]: what one call spans
            if phase == "decode":
                used, axes = [one[..., ids.shape[2] // 2 :, :] for one in used], 2
            rates = {name: tokens / float(np.median(one)) for name, one in seconds.items()}
            found.append(
                Throughput(
                    phase,
                    batch,
                    tokens,
                    **rates,
                    speedup=paired_ratio(seconds["plain"], seconds["var"]),
                    experts=tuple(float(one.sum(-1).mean()) for one in used),
                    distinct=tuple(float(one.any(axis=axes).sum(-1).mean()) for one in used),
                )
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
    phases: Sequence[str] = PHASES,
    seconds_per_token: float = SECONDS_PER_TOKEN,
) -> dict[str, Any]:
    """Throughput of a model and, where VAR is switched on, its paired speed-up over the plain model.

    Args:
        var_model: the model, VAR on or off.
        documents: texts to read; `seed` chooses those of a run.
        batch_size: texts of the prefill.
        max_length: tokens of each.
        decode_tokens: tokens per timed decode run, batch 1, after a prompt of the same length.
        repeats: rounds, each of which times both sides once.
        seed: of the choice of texts and of the order within rounds.
        phases: the phases to time.
        seconds_per_token: on the clock that ages the cached tier.

    Returns:
        As JSON can hold it: `PHASE_tokens_per_second`, details by phase, and `speedup` by phase (`Estimate` fields).
    """
    compared = {"plain": var_model.disabled()} | ({"var": var_model} if var_model.table is not None else {})
    shapes = {"prefill": (batch_size, max_length), "decode": (1, min(2 * decode_tokens, max_length))}
    result: dict[str, Any] = {"repeats": repeats, "speedup": {}}
    for phase in phases:
        ids = _grouped(documents, *shapes[phase], seed)
        tokens, seconds = _time(compared, phase, ids, repeats, seed, seconds_per_token)
        rates = {name: tokens / float(np.median(one)) for name, one in seconds.items()}
        result[f"{phase}_tokens_per_second"] = rates.get("var", rates["plain"])
        result[phase] = {"batch": ids.shape[1], "tokens": tokens}
        if "var" in rates:
            result[phase]["plain_tokens_per_second"] = rates["plain"]
            result["speedup"][phase] = dataclasses.asdict(paired_ratio(seconds["plain"], seconds["var"]))
    return result


def drawn_texts(documents: Sequence[Encoded], number: int, max_length: int, seed: int = 0) -> np.ndarray:
    """The beginnings of some documents, chosen at random among those with at least `max_length` ids.

    Where there are too few of these, the longest documents are taken and cut to the shortest of them.

    Args:
        documents: to choose from.
        number: B, of texts.
        max_length: T at most.
        seed: of the choice.

    Returns:
        int32 [B, T].

    Raises:
        NotTestableError: there is no document.
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


def by_batch_section(found: Sequence[Throughput]) -> Section:
    """Report throughput by batch size; the criterion is decode at the smallest batch and prefill at the largest.

    Args:
        found: from `by_batch`.

    Returns:
        The section.
    """
    prefill, decode = ([one for one in found if one.phase == phase] for phase in PHASES)
    alone, last, many = decode[0], decode[-1], prefill[-1]
    passed = min(alone.speedup.value, many.speedup.value) >= EVALUATION_SPEEDUP
    columns = (
        *(Column("phase"), Column("batch"), Column("plain", ",.0f"), Column("VAR", ",.0f")),
        *(Column("speed-up", ".2f"), Column("low", ".2f"), Column("high", ".2f"), Column("experts", ".2f")),
        *(Column("distinct, plain", ".2f"), Column("distinct, VAR", ".2f")),
    )
    rows = tuple(
        (one.phase, one.batch, one.plain, one.var, *dataclasses.astuple(one.speedup), one.experts[1], *one.distinct)
        for one in found
    )
    return Section(
        NAME,
        "Throughput by batch size",
        "PASS" if passed else "FAIL",
        f"speed-up >= {EVALUATION_SPEEDUP}x in decode at batch {alone.batch} and in prefill at batch {many.batch}: "
        f"{alone.speedup.value:.2f}x and {many.speedup.value:.2f}x",
        (
            "Each round times both sides once in random order; the speed-up is the median of the ratios within rounds.",
            f"A decoding step at batch {last.batch} reads {last.distinct[0]:.1f} distinct experts of a layer in the "
            f"plain model and {last.distinct[1]:.1f} under VAR; at batch {alone.batch}, {alone.distinct[0]:.1f} and "
            f"{alone.distinct[1]:.1f}. A machine limited by reading weights {_most(last.distinct)} on the experts at "
            f"batch {last.batch}; this one measured {last.speedup.value:.2f}x.",
        ),
        (Table("Tokens per second", columns, rows),),
        (
            ReportFigure(
                NAME,
                "Speed-up by batch size",
                "Dots: the measured median of paired rounds, with 95% intervals. Dashed line: experts that the plain "
                "model runs divided by those that VAR runs, which would be the speed-up if experts were all of the "
                "work. Dotted line (decode): the same ratio for distinct experts, a bound where reading weights takes "
                "all the time.",
                "All times come from one machine, and the texts are given, not generated. Medians hide a slow start. "
                "Tokens per second cannot be compared between runs.",
                partial(_figure, found),
            ),
        ),
    )


def _figure(found: Sequence[Throughput]) -> Figure:
    drawn, axes = panels(2, sharey=True)
    for axis, phase in zip(axes, PHASES, strict=True):
        here = [one for one in found if one.phase == phase]
        batch = [one.batch for one in here]
        value, low, high = np.array([dataclasses.astuple(one.speedup) for one in here]).T
        axis.errorbar(batch, value, [value - low, high - value], color="0", marker="o", label="measured")
        axis.plot(batch, [_ratio(one.experts) for one in here], color="0.5", linestyle="--", label="experts run")
        if phase == "decode":
            axis.plot(batch, [_ratio(one.distinct) for one in here], color="0.5", linestyle=":", label="experts read")
        axis.axhline(1, color="0.8", linewidth=0.8)
        axis.set(title=phase, xscale="log", xticks=batch, xticklabels=batch)
        axis.minorticks_off()
    axes[0].set(ylabel="plain time / VAR time")
    axes[1].legend(fontsize="small")
    drawn.supxlabel("batch")
    drawn.tight_layout()
    return drawn


def _ratio(both: Sequence[float]) -> float:
    """Plain over VAR; infinite where VAR runs nothing."""
    return both[0] / both[1] if both[1] else math.inf


def _most(distinct: Sequence[float]) -> str:
    ratio = _ratio(distinct)
    return f"gains at most {ratio:.2f}x" if math.isfinite(ratio) else "has no bound (VAR reads no expert)"


def _time(
    compared: Mapping[str, VARModel], phase: str, ids: np.ndarray, repeats: int, seed: int, pace: float
) -> tuple[int, dict[str, np.ndarray]]:
    """Tokens of a timed run over texts [G, B, T], and the seconds of each side in each round."""
    make = _prefill if phase == "prefill" else partial(_decode, seconds_per_token=pace)
    tokens = ids.size if phase == "prefill" else ids[..., ids.shape[2] // 2 :].size
    return tokens, compare({name: make(side, ids) for name, side in compared.items()}, repeats, seed=seed)


def _prefill(var_model: VARModel, prompts: np.ndarray) -> Callable[[], Any]:
    """Read texts [G, B, T], group by group."""
    groups = [jnp.asarray(group) for group in prompts]
    mask, start = jnp.ones(groups[0].shape, bool), var_model.init(prompts.shape[1])

    def run() -> Any:
        for ids in groups:
            # A cache that already knew these texts would make VAR look too good.
            out, _ = var_model(ids, start, mask)
        return out.logits

    return run


def _decode(var_model: VARModel, texts: np.ndarray, seconds_per_token: float) -> Callable[[], Any]:
    """Feed the second halves of texts [G, B, T] token by token, group by group; the first halves are read untimed."""
    _, batch, length = texts.shape
    half, one = length // 2, jnp.ones((batch, 1), bool)
    groups = []
    for text in texts:
        out, state = var_model.prefill(text[:, :half], var_model.init(batch), capacity=length, now=0.0)
        # The cached tier ages by tokens: a decision must not expire because a repeat came late.
        steps = [(jnp.asarray(text[:, at : at + 1]), at * seconds_per_token) for at in range(half, length)]
        groups.append(((out.kv, state), steps))

    def run() -> Any:
        for start, steps in groups:
            kv, state = jax.tree.map(jnp.copy, start)  # every step donates its inputs
            for ids, now in steps:
                out, state = var_model.advance(state, ids, one, kv, last_logits_only=True, now=now, donate=True)
                kv = out.kv
        return out.logits

    return run


def _grouped(documents: Sequence[Encoded], batch_size: int, max_length: int, seed: int) -> np.ndarray:
    """int32 [G, B, T]: at least `_TEXTS` texts if there are as many, and at least one group."""
    groups = max(1, min(_TEXTS, len(documents)) // batch_size)
    texts = drawn_texts(documents, groups * batch_size, max_length, seed)
    return texts[: len(texts) // groups * groups].reshape(groups, -1, texts.shape[1])
