"""Do consecutive tokens repeat their first choice? As in table 5 of Mixtral's paper (arXiv 2401.04088).

Letters: N tokens, D documents, L layers, K experts per token.

Over pairs of tokens that directly follow each other in a document:

| measure | share of the pairs in which |
|---|---|
| `first_choice` | both tokens have the same first choice |
| `first_or_second` | an expert is first or second choice of both; only where K >= 2 |

Uniform routing repeats by chance: 12.5% and 46% for Mixtral's 8 experts. Uneven loads and documents with favorite
experts repeat more. The permutation null keeps both and breaks the order of a document's tokens, so what is above its
band is due to that order: routing persists, or token ids come in bursts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.questions import nulls
from analysis.questions.data import RoutingData, TraceSettings, needs_routing
from analysis.questions.question import Question
from analysis.report.report import ReportFigure, Section
from analysis.resampling import Measure, document_sums
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError


@dataclass(frozen=True)
class Repetition:
    """Repetition per layer, and what uniform routing would give."""

    measures: dict[str, Measure]  # name -> one row
    uniform: dict[str, float]  # name -> share of the pairs under uniform routing
    pairs: int
    tokens: int
    documents: int


def _repetition(trace: Trace, settings: TraceSettings, progress: bool = False) -> Repetition:
    """Share of consecutive tokens that repeat an expert, against uniform routing and the null."""
    nulls.check_ranked(trace)
    pair = ~trace.begins()
    if not pair.any():
        raise NotTestableError("no two tokens of the trace directly follow each other; give a trace of running text")
    best = np.ascontiguousarray(trace.experts[:, :, :2].transpose(2, 1, 0))  # [2 or 1, L, N]
    pairs = np.repeat(document_sums(pair, trace.document)[:, None, None], trace.num_layers, axis=-1)
    uniform = _uniform_repetition(trace.num_experts, trace.top_k)

    def sums(shuffled: np.ndarray | slice) -> dict[str, np.ndarray]:
        return _sums(best[..., shuffled], pair, trace.document)

    totals = dict.fromkeys(uniform, pairs)
    return Repetition(
        measures=nulls.against_permutations(sums, totals, trace.document, settings, "repetition", progress),
        uniform=uniform,
        pairs=int(pair.sum()),
        tokens=len(trace.token_id),
        documents=len(pairs),
    )


def _uniform_repetition(num_experts: int, top_k: int) -> dict[str, float]:
    """The same shares where every choice of experts is equally likely and tokens are independent."""
    e, shares = num_experts, {"first_choice": 1 / num_experts}
    if top_k >= 2:
        shares["first_or_second"] = 1 - (e - 2) * (e - 3) / (e * (e - 1))
    return shares


def _sums(best: np.ndarray, pair: np.ndarray, document: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs that repeat by name, counted at their second token, float64 [D, 1, L]."""

    def repeats(slots: Sequence[tuple[int, int]]) -> np.ndarray:
        same = np.zeros(best.shape[1:], bool)
        for before, after in slots:
            same[:, 1:] |= best[before, :, :-1] == best[after, :, 1:]
        return document_sums((same & pair).T, document)[:, None]

    sums = {"first_choice": repeats([(0, 0)])}
    if len(best) == 2:
        sums["first_or_second"] = repeats([(0, 0), (0, 1), (1, 0), (1, 1)])
    return sums


def _examine(data: RoutingData) -> Section:
    found = data.on_trace(lambda trace: _repetition(trace, data.settings, data.progress))
    first = found.measures["first_choice"]
    chance = ", ".join(f"{name} {share:.1%}" for name, share in found.uniform.items())
    words = [
        f"{found.pairs:,} pairs of tokens that directly follow each other. Uniform routing would give {chance}.",
        f"{nulls.NULL} That keeps each document's favorite experts, so a value above the band means persistent "
        "routing, or ids that come in bursts.",
    ]
    figure = ReportFigure(
        "repetition",
        "Repetition of the first choice",
        "Dots: share of consecutive tokens with the same first choice. Dashed line and gray: the same with the tokens "
        "of each document shuffled. Dotted: uniform routing.",
        "Text that repeats itself repeats its routing: a token id that follows itself counts as well.",
        lambda: _draw(found),
    )
    above = nulls.layers_above(first, 0)
    outcome = f"{nulls.mean(first.value):.1%} of pairs, mean over layers; {above}; no published bound"
    tables = [table for one in found.measures.values() for table in nulls.tables(one, ["consecutive tokens"])]
    return QUESTION.section("reported", outcome, words, tables, [figure])


def _draw(found: Repetition) -> Figure:
    figure, axes = nulls.panels(1, len(found.measures), sharey=False)
    for axis, (name, one) in zip(axes.flat, found.measures.items(), strict=True):
        nulls.plot(axis, one, 0)
        axis.axhline(found.uniform[name], color="0.5", linestyle=":", linewidth=1)
        axis.set_ylim(0, None)
        axis.set_title(name.replace("_", " "), fontsize="medium")
    axes[0, 0].set_ylabel("share of consecutive pairs")
    figure.suptitle(
        f"Repetition — {found.pairs:,} pairs; {found.tokens:,} tokens, {found.documents:,} documents\ndots: observed; "
        "dashed and gray: shuffled within documents; dotted: uniform"
    )
    figure.tight_layout()
    return figure


QUESTION = Question("repetition", "Consecutive tokens repeat their first choice", _examine, needs_routing)
