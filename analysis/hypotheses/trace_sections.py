"""The tests of a routing trace in words, tables and verdicts: measures in, sections of a report out.

Letters: L layers, O rows of a measure (context orders). Only predictability has a criterion: every layer and order lies
above the family-wise band of the permutation null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.estimators.choice_entropy import ChoiceEntropy
from analysis.estimators.co_activation import CoActivation
from analysis.estimators.expert_load import Load
from analysis.estimators.predictability import Predictability
from analysis.estimators.repetition import Repetition
from analysis.estimators.resampling import Measure
from analysis.hypotheses.figure_notes import NOTES
from analysis.hypotheses.trace_findings import TraceFindings
from analysis.report import Column, Section, Table

NEEDS_TRACE = (
    "needs a trace: experiments/01_routing_analysis.py records one beside the statistics (--trace_tokens), "
    "analysis.traces.importing imports one; then give --trace FILE"
)
NULL = "Null: routing shuffled among the tokens of each document, {} times; bands and p values are family-wise."


def trace_sections(found: TraceFindings | None) -> tuple[Section, ...]:
    """The sections of a trace; without one, that they were not measured."""
    makers: dict[str, tuple[str, Callable[[Any, str], Section]]] = {
        "predictability": ("Token ids foretell routing on unseen documents", _predictability),
        "choice_entropy": ("What the last ids leave open: H(first choice | last n ids)", _choice_entropy),
        "repetition": ("Consecutive tokens repeat their first choice", _repetition),
        "load": ("Experts share the load", _load),
        "co_activation": ("Experts are chosen together", _co_activation),
    }
    made = []
    for name, (title, make) in makers.items():
        one = getattr(found, name, None)
        if one is None:
            made.append(Section(name, title, "not measured", NEEDS_TRACE))
        elif isinstance(one, str):
            made.append(Section(name, title, "not testable", one))
        else:
            made.append(make(one, title))
    return tuple(made)


def above_null(measure: Measure, rows: Sequence[str]) -> tuple[str, str]:
    """Verdict, and per row in how many layers the figure lies above the family-wise band; PASS only if in all."""
    if measure.null_high is None:
        return "reported", "no permutations were made, so there is no band"
    testable = ~np.isnan(measure.value) & ~np.isnan(measure.null_high)
    above = testable & (measure.value > measure.null_high)
    layers = measure.value.shape[1]
    said = []
    for index, row in enumerate(rows):
        missing = layers - int(testable[index].sum())
        said.append(
            f"{row} {above[index].sum()} of {layers} layers" + (f" ({missing} not testable)" if missing else "")
        )
    verdict = "not testable" if not testable.any() else "PASS" if np.all(above[testable]) else "FAIL"
    return verdict, ", ".join(said)


def measure_tables(measure: Measure, rows: Sequence[str], judge: bool = False) -> tuple[Table, ...]:
    """A table per row of the measure, a line per layer: value and interval and, with a null, the band and p.

    Args:
        judge: add a verdict, PASS above the band.
    """
    names = ["value", "low", "high"] + ["null", "null_low", "null_high", "p"] * (measure.null is not None)
    form = ".4f" if measure.unit == "nats" else ".3f"
    columns = [Column("layer"), *(Column(name.replace("_", " "), form) for name in names)]
    judge = judge and measure.null_high is not None
    if judge:
        columns.append(Column("verdict"))
    made = []
    for index, row in enumerate(rows):
        numbers = np.stack([getattr(measure, name)[index] for name in names], axis=-1)  # [L, names]
        body = [(layer, *line) for layer, line in enumerate(numbers.tolist())]
        if judge:
            testable = ~np.isnan(numbers).any(axis=-1)
            above = np.where(numbers[:, 0] > numbers[:, names.index("null_high")], "PASS", "FAIL")
            verdicts = np.where(testable, above, "not testable").tolist()
            body = [(*line, verdict) for line, verdict in zip(body, verdicts, strict=True)]
        made.append(Table(f"{measure.name} [{measure.unit}], {row}", tuple(columns), tuple(body)))
    return tuple(made)


def _predictability(found: Predictability, title: str) -> Section:
    judged = "agreement" if "agreement" in found.measures else "recall"
    orders = _orders(found.orders)
    verdict, outcome = above_null(found.measures[judged], orders)
    return Section(
        "predictability",
        title,
        verdict,
        f"held-out {judged} above the null band: {outcome}",
        (
            f"Tables of the last n ids (order n) are built on {found.build_documents:,} documents "
            f"({found.build_tokens:,} tokens) and scored on {found.held_out_documents:,} others "
            f"({found.held_out_tokens:,} tokens), at keys seen {found.min_count} times or more. agreement: share "
            "of tokens whose first choice is the predicted one; recall: share of the chosen experts that were "
            "predicted; mass: share of their probability that was caught; coverage: share of held-out tokens that "
            "have such a key. A figure without its coverage says little.",
            NULL.format(found.permutations) + f" PASS: above the band. The overall verdict is that of {judged}.",
        ),
        (
            _coverage(found.measures["coverage"], orders),
            *(
                table
                for name, one in found.measures.items()
                if name != "coverage"
                for table in measure_tables(one, orders, judge=True)
            ),
        ),
        (NOTES["predictability"],),
    )


def _choice_entropy(found: ChoiceEntropy, title: str) -> Section:
    orders = _orders(found.orders)
    outcome = "no permutations were made, so what ids explain beyond chance is not known"
    if "explained" in found.measures:
        shares = zip(orders, found.measures["explained"].value, strict=True)
        outcome = "explained by the ids, mean over layers: " + ", ".join(
            f"{one} {_mean(row):.1%}" for one, row in shares
        )
    return Section(
        "choice_entropy",
        title,
        "reported",
        f"{outcome}; no published bound",
        (
            f"Keys seen {found.min_count} times or more; {found.tokens:,} tokens of {found.documents:,} documents. "
            "plug_in: too low where keys are rare; conditional_entropy: with Grassberger's correction (2003); "
            "cross_entropy: loss of a table on documents that did not build it, on average no lower than the "
            "entropy; explained: 1 - conditional_entropy over its mean under the null.",
            NULL.format(found.permutations)
            + " Orders look at different tokens: compare them by explained, beside their coverage.",
        ),
        (
            *measure_tables(found.unconditional, ["first choice, whatever the ids"]),
            _coverage(found.measures["coverage"], orders),
            *(t for name, one in found.measures.items() if name != "coverage" for t in measure_tables(one, orders)),
        ),
        (NOTES["choice_entropy"],),
    )


def _repetition(found: Repetition, title: str) -> Section:
    first = found.measures["first_choice"]
    outcome = above_null(first, ["first choice"])[1]
    chance = ", ".join(f"{name} {share:.1%}" for name, share in found.uniform.items() if name in found.measures)
    return Section(
        "repetition",
        title,
        "reported",
        f"{_mean(first.value):.1%} of pairs, mean over layers; above the null band: {outcome}; no published bound",
        (
            f"{found.pairs:,} pairs of tokens that stand directly after each other. Uniform routing would give "
            f"{chance}.",
            NULL.format(found.permutations) + " So favourites of a document are in the null, and neighbourhood is not.",
        ),
        tuple(table for one in found.measures.values() for table in measure_tables(one, ["consecutive tokens"])),
        (NOTES["repetition"],),
    )


def _load(found: Load, title: str) -> Section:
    share = found.share.value  # [E, L]
    columns = ("layer", "imbalance", "low", "high", "evenness", "evenness low", "evenness high")
    imbalance, evenness = (
        [getattr(one, part)[0] for part in ("value", "low", "high")] for one in (found.imbalance, found.evenness)
    )
    body = tuple(
        (layer, *row, int(busiest), float(most), int(unused))
        for layer, (row, busiest, most, unused) in enumerate(
            zip(
                np.stack([*imbalance, *evenness], axis=-1).tolist(),
                share.argmax(axis=0),
                share.max(axis=0),
                found.unused,
                strict=True,
            )
        )
    )
    heading = (Column(columns[0]), *(Column(name, ".3f") for name in columns[1:]))
    heading += (Column("busiest expert"), Column("its share", ".1%"), Column("unused experts"))
    return Section(
        "load",
        title,
        "reported",
        f"busiest expert over the mean: {_mean(found.imbalance.value):.2f}x, mean over layers; "
        f"{int(found.unused.sum())} experts unused; no published bound",
        (
            f"Shares of the assignments of {found.tokens:,} tokens in {found.documents:,} documents. imbalance: "
            "the busiest expert's share over the mean share; evenness: entropy of the shares over its most.",
        ),
        (Table("Per layer", heading, body),),
        (NOTES["expert_load"],),
    )


def _co_activation(found: CoActivation, title: str) -> Section:
    first, second = found.strongest[..., 0], found.strongest[..., 1]  # [L, P]
    layers, ranks = np.nonzero(first >= 0)
    one, other = first[layers, ranks], second[layers, ranks]
    strength = [getattr(found.strength, part)[ranks, layers] for part in ("value", "low", "high")]
    numbers = np.stack([found.share[layers, one, other], found.expected[layers, one, other], *strength], axis=-1)
    pairs = zip(layers.tolist(), zip(one.tolist(), other.tolist(), strict=True), numbers.tolist(), strict=True)
    body = tuple((layer, f"{a} and {b}", *line) for layer, (a, b), line in pairs)
    shares = (Column("share", ".2%"), Column("by load alone", ".2%"))
    ratios = (Column(name, ".2f") for name in ("ratio", "low", "high"))
    columns = (Column("layer"), Column("experts"), *shares, *ratios)
    return Section(
        "co_activation",
        title,
        "reported" if body else "not testable",
        f"strongest pair over what load alone makes: {_mean(found.strength.value[0]):.2f}x, mean over layers; "
        "no published bound",
        (
            "Share of a layer's tokens that chose both experts, against what the experts' loads alone make "
            "expected. Listed are the strongest pairs that are expected often enough; because they are listed for "
            "being strongest, their ratios lie a little too high.",
        ),
        (Table("Strongest pairs", columns, body),),
        (NOTES["co_activation"],),
    )


def _coverage(coverage: Measure, orders: Sequence[str]) -> Table:
    """A line per order: ids decide the coverage, so that it is the same in every layer."""
    numbers = np.stack([coverage.value[:, 0], coverage.low[:, 0], coverage.high[:, 0]], axis=-1).tolist()
    columns = (Column("keys"), *(Column(name, ".3f") for name in ("value", "low", "high")))
    body = tuple((order, *line) for order, line in zip(orders, numbers, strict=True))
    return Table("coverage [share], the same in every layer", columns, body)


def _orders(orders: Sequence[int]) -> list[str]:
    return [f"order {order}" for order in orders]


def _mean(values: np.ndarray) -> float:
    """Of the known ones."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
