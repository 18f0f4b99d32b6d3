"""The sources of VAR's error and its drift in free generation, as sections of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from analysis.report.report import Column, Section, Table
from analysis.resampling import Estimate
from analysis.studies.error_figures import DRIFT, GROUPS, KINDS, LAYERS
from analysis.studies.error_sources import Change, ErrorSources, Group, LayersAlone
from analysis.studies.generation_drift import Drift

ATTRIBUTION = (
    "A group is that of the position that made the prediction. Its loss also suffers from what was dropped at the "
    "tokens before it: read the parts as where the loss shows, not as who caused it."
)


def sections(sources: ErrorSources | None = None, drifted: Drift | None = None) -> tuple[Section, ...]:
    """What was measured, in words and tables; `error_figures.draw` makes the figures that they name."""
    made: tuple[Section, ...] = ()
    if sources is not None:
        made += (_kinds(sources), _layers(sources.layers), _groups(sources))
    return made if drifted is None else (*made, _drift(drifted))


def _kinds(found: ErrorSources) -> Section:
    table, gate, both, policy = found.kinds
    return Section(
        "error_kinds",
        "What the error is made of",
        "reported",
        f"change of perplexity: {_percent(table)} if the table chooses, {_percent(gate)} if it weighs, "
        f"{_percent(both)} if it does both, {_percent(policy)} under the policy at {policy.experts:.2f} experts",
        (
            f"{found.documents:,} documents, {found.tokens:,} tokens, perplexity {found.perplexity:.3f} with the plain "
            "model. The same tokens are planned in every row, by the fast tier alone; choice and weights from the "
            "table run all experts. Table weights go by rank.",
            "Without answers nothing stands in for what is dropped; rescaled: kept weights are brought to their former "
            "sum. The policy drops by the same rules with and without, often all experts of a token, where nothing is "
            "left to rescale; the first expert alone, at the same tokens, is the fairer test of rescaling.",
        ),
        (
            _changes("choice, weights and answers, against the plain model", found.kinds),
            _changes("with and without answers for what is dropped", found.dropping),
        ),
        (KINDS,),
    )


def _layers(found: LayersAlone) -> Section:
    return Section(
        "error_layers",
        "How the layers' errors add up",
        "reported",
        f"layers one at a time add up to {found.total.value:+.5f} nats per token, together they cost "
        f"{found.joint.nats.value:+.5f}; excess {_interval(found.excess, '+.5f')}",
        (
            "Loss in nats per token: changes of log perplexity add up where layers do not depend on each other. The "
            "excess is what they cost together beyond the sum, document by document; under 0, errors make up for each "
            "other.",
        ),
        (
            _changes("one layer at a time", (*found.alone, found.joint)),
            _estimates("do they add up? [nats per token]", {"sum": found.total, "excess": found.excess}, "+.5f"),
        ),
        (LAYERS,),
    )


def _groups(found: ErrorSources) -> Section:
    groups = found.groups
    worst = max(groups.key, key=lambda group: group.part.value)
    return Section(
        "error_groups",
        "Where the loss falls",
        "reported",
        f"{groups.whole.nats.value:+.5f} nats per token in all; the largest part, {worst.part.value:+.5f}, where the "
        f"longest key that answered was: {worst.name} ({worst.tokens / found.tokens:.0%} of the tokens)",
        (
            ATTRIBUTION,
            "loss: nats per token of the group. part: the same spread over all tokens, so that parts add up to the "
            "whole. Keys: of the longest order that answered in any layer. Experts: those that ran, summed over "
            "layers. Frequency: tenths of the ids that were read, by their occurrences in the text of the statistics.",
        ),
        (
            _group_table("by what answered", groups.key, found.tokens),
            _group_table("by experts that ran, all layers", groups.experts, found.tokens),
            _group_table("by occurrences of the token's id", groups.frequency, found.tokens),
        ),
        (GROUPS,),
    )


def _drift(found: Drift) -> Section:
    agreed, likely = found.agreement, found.likelihood
    shown = np.unique(np.linspace(1, found.new_tokens, min(found.new_tokens, 8)).astype(int))
    curves = (agreed.single_step, agreed.free, agreed.together)
    return Section(
        "generation_drift",
        "Drift in free generation",
        "reported",
        f"single steps agree at {_interval(agreed.single_step_mean, '.1%')} of positions, free texts at "
        f"{_interval(agreed.free_mean, '.1%')}; the plain model gives the text under VAR "
        f"{_interval(likely.difference, '+.3f')} nats per token",
        (
            f"Greedy continuations of {found.prompts} beginnings of {found.prompt_tokens} tokens, {found.new_tokens} "
            "new tokens at most. Positions after the end of the plain model's text are left out.",
            "The plain model's log probability favors its own greedy text, which is made of its likeliest tokens; how "
            "the documents really go on says how little that means. A difference near 0 says that the text is only "
            "different.",
        ),
        (
            Table(
                "agreement with the plain model's text [share of prompts]",
                (Column("new token"), *(Column(name, ".1%") for name in ("single step", "free", "together"))),
                tuple((int(i), *(float(curve.value[i - 1]) for curve in curves)) for i in shown),
            ),
            _estimates(
                "mean log probability under the plain model [nats per token]",
                {
                    "the plain model's text": likely.plain,
                    "the text under VAR": likely.var,
                    "the document itself": likely.document,
                    "under VAR, less plain": likely.difference,
                },
                ".3f",
            ),
        ),
        (DRIFT,),
    )


def _changes(title: str, changes: Sequence[Change]) -> Table:
    columns = (Column(""), Column("experts", ".2f"), Column("perplexity", "+.3%"), Column("low", "+.3%"))
    rows = tuple((one.name, one.experts, *dataclasses.astuple(one.perplexity)) for one in changes)
    return Table(f"{title} [change of perplexity]", (*columns, Column("high", "+.3%")), rows)


def _group_table(title: str, groups: Sequence[Group], tokens: int) -> Table:
    numbers = (Column(name, "+.5f") for name in ("loss", "low", "high", "part", "part low", "part high"))
    rows = ((one.name, one.tokens, one.tokens / tokens, one.change, one.part) for one in groups)
    return Table(
        f"{title} [nats per token]",
        (Column(""), Column("tokens", ","), Column("share", ".1%"), *numbers),
        tuple((*row[:3], *dataclasses.astuple(row[3]), *dataclasses.astuple(row[4])) for row in rows),
    )


def _estimates(title: str, estimates: dict[str, Estimate], form: str) -> Table:
    columns = (Column(""), *(Column(name, form) for name in ("value", "low", "high")))
    return Table(title, columns, tuple((name, *dataclasses.astuple(one)) for name, one in estimates.items()))


def _percent(change: Change) -> str:
    return f"{change.perplexity.value:+.2%}"


def _interval(one: Estimate, form: str) -> str:
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"
