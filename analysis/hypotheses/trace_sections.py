"""The tests of a routing trace in words, tables and verdicts: measures in, sections of a report out.

Letters: L layers, O rows of a measure (context orders). Only predictability has a criterion, this project's and not a
published one: every layer and order lies above the family-wise band of the permutation null.
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
from analysis.hypotheses.figure_notes import NOTES
from analysis.hypotheses.trace_findings import TraceFindings
from analysis.hypotheses.trace_tables import coverage_table, layers_above_null, measure_tables, verdict_above_null
from analysis.report.report import Column, Section, Table
from analysis.resampling import MIN_DIFFERENT, MIN_DOCUMENTS, Measure

NEEDS_TRACE = (
    "needs a trace: experiments/01_routing_analysis.py records one beside the statistics (--trace_tokens), "
    "analysis.traces.importing imports one; then give --trace FILE"
)
NULL = (
    "Null: routing shuffled among the tokens of each document, {} times; bands and p values are family-wise, but for "
    f"figures with fewer than {MIN_DIFFERENT} different values in it, which are judged alone."
)
INTERVALS = (
    f"A figure over fewer than {MIN_DOCUMENTS} documents has no interval: they say too little of how documents differ."
)


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


def _predictability(found: Predictability, title: str) -> Section:
    judged = "agreement" if "agreement" in found.measures else "recall"
    of_shortest = f"{judged}_of_shortest"
    orders, longest = _orders(found.orders), ["longest known key"] * (len(found.orders) > 1)
    there = f"{orders[0]} there"
    unranked = "" if judged == "agreement" else " agreement: not measured, because the experts are not ranked."
    outcomes = [_size(found.measures, judged, row, name, orders[0]) for row, name in enumerate(orders)]
    outcomes += [_size(found.longest, judged, 0, name, orders[0]) for name in longest]
    tables: list[Table] = []
    for name, one in found.measures.items():
        if name not in ("coverage", of_shortest):
            compared = found.measures[of_shortest].value, found.longest[of_shortest].value
            beside = [(there, values) if name == judged and longest else None for values in compared]
            tables += measure_tables(one, orders, judge=True, beside=beside[0])
            tables += measure_tables(found.longest[name], longest, judge=True, beside=beside[1])
    return Section(
        "predictability",
        title,
        verdict_above_null(found.measures[judged]),
        f"held-out {judged}, mean over layers: {'; '.join(outcomes)}",
        (
            f"Tables of the last n ids (order n) are built on {found.build_documents:,} documents "
            f"({found.build_tokens:,} tokens) and scored on {found.held_out_documents:,} others "
            f"({found.held_out_tokens:,} tokens), at keys seen {found.min_count} times or more. agreement: share "
            "of tokens whose first choice is the predicted one; recall: share of the chosen experts that were "
            "predicted; mass: share of their probability that was caught; coverage: share of held-out tokens that "
            f"have such a key. A figure without its coverage says little.{unranked}",
            f"Longer orders are scored at fewer and easier tokens. {there}: {judged} of the shortest order at the same "
            "tokens; what the further ids add is the distance from it. The longest known key of each token covers the "
            "same tokens as the shortest order.",
            NULL.format(found.permutations) + f" PASS: above the band. The overall verdict is that of {judged} over "
            "all orders; this criterion is this project's, not a published one. The null also breaks the likeness of "
            "neighboring tokens: persistent routing together with ids that come in bursts can pass it a little.",
            INTERVALS,
        ),
        (
            coverage_table(
                "coverage [share], the same in every layer",
                [found.measures["coverage"], found.longest["coverage"]],
                [*orders, *longest],
            ),
            *tables,
        ),
        (NOTES["predictability"],),
    )


def _size(measures: dict[str, Measure], judged: str, row: int, name: str, shortest: str) -> str:
    """One row of the judged measure: how large, against what, at how many tokens, in how many layers above the band."""
    one = measures[judged]
    null = "" if one.null is None else f" (null {_mean(one.null[row]):.2f})"
    there = f" ({shortest} there: {_mean(measures[f'{judged}_of_shortest'].value[row]):.2f})" * (name != shortest)
    covered = f"at {measures['coverage'].value[row, 0]:.0%} of tokens"
    return f"{name}: {_mean(one.value[row]):.2f}{null} {covered}{there}, {layers_above_null(one, row)}"


def _choice_entropy(found: ChoiceEntropy, title: str) -> Section:
    orders = _orders(found.orders)
    outcome = "no permutations were made, so what ids explain beyond chance is not known"
    if "explained_held_out" in found.measures and np.isnan(found.measures["held_out_coverage"].value).all():
        outcome = "what ids explain on unseen text is not known: all documents are on one side of the split; in sample "
        outcome += "; ".join(
            f"{name} {_mean(inside):.1%}"
            for name, inside in zip(orders, found.measures["explained"].value, strict=True)
        )
    elif "explained_held_out" in found.measures:
        outcome = "explained by the ids on held-out documents, mean over layers: " + "; ".join(
            f"{name} {_mean(held_out):.1%} at {covered:.0%} of tokens (in sample {_mean(inside):.1%})"
            for name, held_out, covered, inside in zip(
                orders,
                found.measures["explained_held_out"].value,
                found.measures["held_out_coverage"].value[:, 0],
                found.measures["explained"].value,
                strict=True,
            )
        )
    coverages = {
        "coverage": "coverage [share] of the entropy: keys of the whole trace",
        "held_out_coverage": "coverage [share] of the cross entropy: held-out tokens, keys of the build documents",
    }
    figures = ("explained_held_out", "cross_entropy", "explained", "conditional_entropy", "plug_in")
    return Section(
        "choice_entropy",
        title,
        "reported",
        f"{outcome}; no published bound",
        (
            f"Keys seen {found.min_count} times or more; {found.tokens:,} tokens of {found.documents:,} documents. "
            "cross_entropy: loss of a table on documents that did not build it; explained_held_out: 1 - cross_entropy "
            "over its mean under the null, negative where the table misleads. It can flatter where held-out documents "
            "are near-duplicates of build documents.",
            "In sample: plug_in, too low where keys are rare; conditional_entropy, with Grassberger's correction "
            "(2003); explained, 1 - conditional_entropy over its mean under the null. What a document repeats word "
            "for word counts as explained there. cross_entropy and conditional_entropy are taken over other tokens, "
            "so neither bounds the other.",
            NULL.format(found.permutations)
            + " Orders look at different tokens, and no explained removes that selection: see predictability for "
            "orders at equal tokens.",
            INTERVALS,
        ),
        (
            *measure_tables(found.unconditional, ["first choice, whatever the ids"]),
            *(coverage_table(said, [found.measures[name]], orders) for name, said in coverages.items()),
            *(
                table
                for name in figures
                if name in found.measures
                for table in measure_tables(found.measures[name], orders)
            ),
        ),
        (NOTES["choice_entropy"],),
    )


def _repetition(found: Repetition, title: str) -> Section:
    first = found.measures["first_choice"]
    chance = ", ".join(f"{name} {share:.1%}" for name, share in found.uniform.items() if name in found.measures)
    return Section(
        "repetition",
        title,
        "reported",
        f"{_mean(first.value):.1%} of pairs, mean over layers; {layers_above_null(first, 0)}; no published bound",
        (
            f"{found.pairs:,} pairs of tokens that stand directly after each other. Uniform routing would give "
            f"{chance}.",
            NULL.format(found.permutations) + " So favorites of a document are in the null, and neighborhood is "
            "not: what is above the band is persistent routing, or ids that come in bursts.",
            INTERVALS,
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
        if unused >= 0  # else the layer was not captured
    )
    heading = (Column(columns[0]), *(Column(name, ".3f") for name in columns[1:]))
    heading += (Column("busiest expert"), Column("its share", ".1%"), Column("unused experts"))
    return Section(
        "load",
        title,
        "reported",
        f"busiest expert over the mean: {_mean(found.imbalance.value):.2f}x, mean over layers; "
        f"{int(found.unused[found.unused > 0].sum())} experts unused; no published bound",
        (
            f"Shares of the assignments of {found.tokens:,} tokens in {found.documents:,} documents. imbalance: "
            "the busiest expert's share over the mean share; evenness: entropy of the shares over its most.",
            INTERVALS,
        ),
        (Table("Per layer", heading, body),),
        (NOTES["expert_load"],),
    )


def _co_activation(found: CoActivation, title: str) -> Section:
    first, second = found.strongest[..., 0], found.strongest[..., 1]  # [L, P]
    layers, ranks = np.nonzero(first >= 0)
    one, other = first[layers, ranks], second[layers, ranks]
    strength = [getattr(found.strength, part)[ranks, layers] for part in ("value", "low", "high")]
    numbers = np.stack([found.pair_share[layers, ranks], found.pair_expected[layers, ranks], *strength], axis=-1)
    pairs = zip(layers.tolist(), zip(one.tolist(), other.tolist(), strict=True), numbers.tolist(), strict=True)
    body = tuple((layer, f"{a} and {b}", *line) for layer, (a, b), line in pairs)
    shares = (Column("share", ".2%"), Column("by load alone", ".2%"))
    ratios = (Column(name, ".2f") for name in ("ratio", "low", "high"))
    columns = (Column("layer"), Column("experts"), *shares, *ratios)
    outcome = "not measured: no pair is expected often enough in the build documents"
    if not found.build_documents or not found.held_out_documents:
        outcome = "not measured: all documents are on one side of the split into build and held-out documents"
    elif body:
        outcome = (
            "pair that is strongest in the build documents, on the held-out ones, over what load alone makes: "
            f"{_mean(found.strength.value[0]):.2f}x, mean over layers; no published bound"
        )
    return Section(
        "co_activation",
        title,
        "reported" if body else "not testable",
        outcome,
        (
            "Share of a layer's tokens that chose both experts, against what the experts' loads alone make expected. "
            f"The pairs are those strongest in {found.build_documents:,} documents, among those expected often enough; "
            f"all figures are those of {found.held_out_documents:,} other documents, with their own loads. Mixing "
            "documents of different load lifts ratios too: experts that are busy in the same documents meet more "
            "often, though nothing binds them.",
            INTERVALS,
        ),
        (Table("Strongest pairs", columns, body),),
        (NOTES["co_activation"],),
    )


def _orders(orders: Sequence[int]) -> list[str]:
    return [f"order {order}" for order in orders]


def _mean(values: np.ndarray) -> float:
    """Of the known ones."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
