"""What is VAR's error made of: choice, weights or answers; which layers; which tokens?

Letters: L layers, R table rows, K experts per token, M scored tokens, N documents, G groups, V vocabulary.

Every run reads the same tokens, and all runs share one table of fixed shapes: the same tokens are planned, and only
what is done with them differs. Changes are paired with the plain model, and their intervals draw whole documents. The
cached tier is off except where tokens are grouped under the policy as given: what it answers depends on what it read
before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from analysis.evaluate.losses import BY_CACHE, BY_ROUTER, TokenLosses, token_losses
from analysis.evaluate.points import Subject
from analysis.questions.question import Question
from analysis.report.figures import panels, subplots
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import Estimate, ratio_with_interval
from varjax.config import VARConfig
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.routing import LayerAnswers, LayerRules
from varjax.stats import RoutingStats
from varjax.table import RouteTable

_DECILES = 10
_BINS = 12  # of the number of experts, at most


@dataclasses.dataclass(frozen=True)
class Change:
    """One way of routing against the plain model, on the same tokens."""

    name: str
    nats: Estimate  # mean loss added per token
    experts: float  # run per token and layer

    @property
    def perplexity(self) -> Estimate:
        """The relative change in perplexity."""
        return Estimate(*(math.expm1(value) for value in dataclasses.astuple(self.nats)))


@dataclasses.dataclass(frozen=True)
class Group:
    """Some of the tokens."""

    name: str
    tokens: int
    change: Estimate  # nats per token of the group
    part: Estimate  # nats per token of all: the parts of all groups add up to the whole change


@dataclasses.dataclass(frozen=True)
class ErrorSources:
    """What was measured."""

    documents: int
    tokens: int
    perplexity: float  # of the plain model, per token
    kinds: tuple[Change, ...]  # choice, weights, both, and the policy
    dropping: tuple[Change, ...]  # with and without answers for what is dropped
    layers: tuple[Change, ...]  # each planned layer, with all others left to the router
    joint: Change  # all layers together
    total: Estimate  # nats per token, the sum of `layers`
    excess: Estimate  # nats per token, the joint change without that sum; 0 where layers add up
    whole: Change  # under the policy as given, with its cached tier
    groups: Mapping[str, tuple[Group, ...]]  # the tokens of `whole`, by the title of the grouping


@dataclasses.dataclass(frozen=True)
class _Runs:
    """The runs that every part needs."""

    subject: Subject
    table: RouteTable  # of fixed shapes
    plain: TokenLosses
    policy: TokenLosses  # the fast tier alone

    @classmethod
    def of(cls, subject: Subject) -> _Runs:
        """The table, and the documents read plainly and under the policy."""
        table = subject.build()
        off = dataclasses.replace(subject.config, enable_var=False)
        return cls(subject, table, _losses(subject, off), _losses(subject, _fast_alone(subject.config), table))

    def under(self, table: RouteTable) -> TokenLosses:
        """The documents under another table of the same shapes, by the fast tier alone."""
        return _losses(self.subject, _fast_alone(self.subject.config), table)


def examine(subject: Subject) -> ErrorSources:
    """Measure every source of error.

    Args:
        subject: the policy and the documents.

    Returns:
        The changes and groups.
    """
    runs = _Runs.of(subject)
    parts = (_kinds, _dropping, _layers_alone, _groups)
    bar = progress_bar(parts, unit="part", desc="error sources", show=subject.progress)
    found: dict[str, Any] = {}
    for part in bar:
        found |= part(runs)
    return ErrorSources(len(subject.documents), len(runs.plain.nll), math.exp(runs.plain.nll.mean()), **found)


def _kinds(runs: _Runs) -> dict[str, Any]:
    """Choice and weight error: at the tokens that the policy plans all K experts run, chosen or weighed by the table.

    Last the policy itself, where the gate chooses and weighs, and answers replace experts.
    """
    all_run = jnp.full_like(runs.table.experts_kept, runs.table.top_k)
    neutral = LayerRules.neutral(runs.table.num_layers)
    changes = []
    for name, choice, weights in (
        ("the table chooses, the gate weighs", True, False),
        ("the gate chooses, the table weighs", False, True),
        ("the table chooses and weighs", True, True),
    ):
        rules = dataclasses.replace(
            neutral,
            choice_from_table=jnp.full_like(neutral.choice_from_table, choice),
            weights_from_table=jnp.full_like(neutral.weights_from_table, weights),
        )
        table = dataclasses.replace(runs.table, experts_kept=all_run, rules=rules)
        changes.append(_change(runs, name, runs.under(table)))
    return {"kinds": (*changes, _change(runs, "the policy", runs.policy))}


def _dropping(runs: _Runs) -> dict[str, Any]:
    """What replaces dropped experts: their answers, nothing, or the others with more weight.

    First as the policy drops, by the same rules each time; which experts it drops may differ a little, because the
    layers above see something else. Such rules often drop all experts of a token, and nothing is left to rescale. So
    the first expert alone follows, at the tokens that the policy plans.
    """
    table, rules = runs.table, runs.table.rules
    silent = None
    if table.answers is not None:
        silent = tuple(map(_silent, table.answers))
    quiet = dataclasses.replace(table, answers=silent)
    neutral = LayerRules.neutral(table.num_layers)
    first = dataclasses.replace(table, experts_kept=jnp.ones_like(table.experts_kept), rules=neutral)
    changes = [_change(runs, "the policy, with answers", runs.policy)]
    for name, base, rescale in (
        ("the policy, without", quiet, False),
        ("the policy, without, rescaled", quiet, True),
        ("the first expert, without", first, False),
        ("the first expert, without, rescaled", first, True),
    ):
        ruled = dataclasses.replace(base.rules, renormalize=jnp.full_like(rules.renormalize, rescale))
        changes.append(_change(runs, name, runs.under(dataclasses.replace(base, rules=ruled))))
    return {"dropping": tuple(changes)}


def _silent(known: LayerAnswers) -> LayerAnswers:
    """Answers that add nothing, whose expected errors, and so what they let be dropped, stay as they are."""
    affine = known.affine and dataclasses.replace(known.affine, write=jnp.zeros_like(known.affine.write))
    return dataclasses.replace(known, answers=jnp.zeros_like(known.answers), affine=affine)


def _layers_alone(runs: _Runs) -> dict[str, Any]:
    """The policy in one layer at a time, and how nearly the layers' changes add up to the joint one."""
    eligible = np.asarray(runs.table.eligible)
    joint = runs.policy.added_to(runs.plain)
    changes, total = [], np.zeros_like(joint)
    for layer in np.flatnonzero(eligible.any(axis=1)):
        only = jnp.asarray(eligible & (np.arange(len(eligible)) == layer)[:, None])
        run = runs.under(dataclasses.replace(runs.table, eligible=only))
        changes.append(_change(runs, f"layer {layer} alone", run))
        total += run.added_to(runs.plain)
    return {
        "layers": tuple(changes),
        "joint": _change(runs, "all together", runs.policy),
        "total": _per_token(runs, total),
        "excess": _per_token(runs, joint - total),
    }


def _groups(runs: _Runs) -> dict[str, Any]:
    """Where the loss falls: by the key that answered, by how many experts ran, by the frequency of the token id."""
    subject, table, run = runs.subject, runs.table, runs.policy
    if subject.config.cache_size > 0:
        run = _losses(subject, subject.config, table)
    orders = [order for order in np.unique([*table.ngram_orders, *run.order]) if order >= 0]
    names = {BY_ROUTER: "the router", BY_CACHE: "the cache"} | {int(order): f"order {order}" for order in orders}
    keys = np.array(sorted(names))
    most = table.num_layers * table.top_k
    edges = np.unique(np.linspace(0, most + 1, min(most + 1, _BINS) + 1).astype(int))
    bins = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(edges)]
    deciles, seen = _frequency_deciles(run.token_id, _id_frequency(subject.stats, subject.model.config.vocab_size))
    places = {
        "what answered": (np.searchsorted(keys, run.order), [names[int(key)] for key in keys]),
        "experts that ran": (np.searchsorted(edges, run.experts, side="right") - 1, bins),
        "occurrences of the id": (deciles, seen),
    }
    grouped = {title: _grouped(runs, run, *place) for title, place in places.items()}
    return {"whole": _change(runs, "the policy as given", run), "groups": grouped}


def _id_frequency(stats: RoutingStats, vocab_size: int) -> np.ndarray:
    """int64 [V]: occurrences of each token id, from the keys of the shortest order; 0 where it is in none."""
    shortest = stats.row_orders == min(stats.ngram_orders)
    counted = np.zeros(vocab_size, np.int64)
    np.add.at(counted, stats.keys[shortest, -1], stats.count.max(axis=0)[shortest])
    return counted


def _frequency_deciles(token_id: np.ndarray, frequency: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """int64 [M], 0 the rarest: tenths of the ids that were read, by their frequency int64 [V]; and their names."""
    ids, place = np.unique(token_id, return_inverse=True)
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(frequency[ids], kind="stable")] = np.arange(len(ids))
    deciles = (rank * _DECILES // len(ids))[place]
    seen = [frequency[token_id[deciles == decile]] for decile in range(_DECILES)]
    return deciles, [f"{one.min():,} to {one.max():,}" if len(one) else "none" for one in seen]


def _fast_alone(config: VARConfig) -> VARConfig:
    return dataclasses.replace(config, cache_size=0)


def _losses(subject: Subject, config: VARConfig, table: RouteTable | None = None) -> TokenLosses:
    var_model = VARModel(subject.model, config, table=table)
    return token_losses(var_model, subject.documents, caching=subject.caching, **subject.windows)


def _change(runs: _Runs, name: str, run: TokenLosses) -> Change:
    experts = run.experts.mean() / runs.table.num_layers
    return Change(name, _per_token(runs, run.added_to(runs.plain)), float(experts))


def _per_token(runs: _Runs, values: np.ndarray) -> Estimate:
    """The mean of values [M] over tokens."""
    return _means(runs, values[:, None], np.ones((len(values), 1)))[0]


def _grouped(runs: _Runs, run: TokenLosses, group: np.ndarray, names: Sequence[str]) -> tuple[Group, ...]:
    """The groups that have tokens. `group` int [M] says which one each token is in."""
    inside = group[:, None] == np.arange(len(names))
    added = np.where(inside, run.added_to(runs.plain)[:, None], 0.0)
    changes, parts = _means(runs, added, inside), _means(runs, added, np.ones_like(inside))
    rows = zip(names, inside.sum(axis=0).tolist(), changes, parts, strict=True)
    return tuple(Group(*row) for row in rows if row[1])


def _means(runs: _Runs, values: np.ndarray, counts: np.ndarray) -> list[Estimate]:
    """Sums of values [M, G] over sums of counts [M, G], with 95% intervals over documents."""
    total, count = (runs.plain.per_document(np.asarray(one, np.float64)) for one in (values, counts))
    value, (low, high) = ratio_with_interval(total, count, runs.subject.samples, runs.subject.seed)
    return [Estimate(*map(float, row)) for row in zip(value, low, high, strict=True)]


def _sections(found: ErrorSources) -> tuple[Section, ...]:
    chosen, weighed, both, policy = (f"{one.perplexity.value:+.2%}" for one in found.kinds)
    by_key = found.groups["what answered"]
    worst = max(by_key, key=lambda group: group.part.value)
    both_parts = {"sum": found.total, "excess": found.excess}
    changes, nats = ("experts", ".2f"), [(name, "+.5f") for name in ("value", "low", "high")]
    perplexity = [(name, "+.3%") for name in ("perplexity", "low", "high")]
    loss = [(name, "+.5f") for name in ("loss", "low", "high", "part", "part low", "part high")]

    def change_table(title: str, some: Iterable[Change]) -> Table:
        return _table(title, [changes, *perplexity], [(one.name, one.experts, one.perplexity) for one in some])

    def part(
        name: str, title: str, outcome: str, words: Iterable[str], tables: Iterable[Table], **figure: Any
    ) -> Section:
        shown = ReportFigure(name, title, **figure)
        return Section(name, title, "reported", outcome, tuple(words), tuple(tables), (shown,))

    return (
        part(
            "error_kinds",
            "What the error is made of",
            f"change in perplexity: {chosen} if the table chooses, {weighed} if it weighs, {both} if it does both, "
            f"{policy} under the policy at {found.kinds[-1].experts:.2f} experts",
            (
                f"{found.documents:,} documents, {found.tokens:,} tokens, perplexity {found.perplexity:.3f} with the "
                "plain model. The same tokens are planned in every row, by the fast tier alone; where the table "
                "chooses or weighs (by rank), all experts run. Rescaled: the kept weights are brought to their former "
                "sum, best judged by the first expert alone, because the policy often drops all experts of a token.",
            ),
            (
                change_table("choice, weights and answers, against the plain model", found.kinds),
                change_table("with and without answers for what is dropped", found.dropping),
            ),
            read="Dots with 95% intervals: the change in perplexity if the planned tokens are treated as each row "
            "says. Top: the table chooses the experts or their weights. Bottom: skipped experts with and without "
            "answers. Each panel has its own scale.",
            misleads="Letting the table choose or weight experts saves nothing, and the errors need not add up; they "
            "show where an error comes from. The rows run different numbers of experts (see the tables).",
            draw=partial(_draw_kinds, found),
        ),
        part(
            "error_layers",
            "How the layers' errors add up",
            f"layers one at a time add up to {found.total.value:+.5f} nats per token, together they cost "
            f"{found.joint.nats.value:+.5f}; excess {found.excess:+.5f}",
            (
                "Changes of log perplexity add up where layers do not depend on each other. The excess is what they "
                "cost together beyond the sum; below 0, errors cancel.",
            ),
            (
                change_table("one layer at a time", (*found.layers, found.joint)),
                _table("do they add up? [nats per token]", nats, both_parts.items()),
            ),
            read="Dots with 95% intervals: the loss that is added if only one layer is planned. The last two rows: the "
            "sum of these losses, and the loss of all layers together.",
            misleads="A layer's loss is relative to the plain model, not to the policy. Layers that drop more experts "
            "may cost more for that reason alone.",
            draw=partial(_draw_layers, found),
        ),
        part(
            "error_groups",
            "Where the loss falls",
            f"{found.whole.nats.value:+.5f} nats per token in all; the largest part, {worst.part.value:+.5f}, where "
            f"the longest key that answered was: {worst.name} ({worst.tokens / found.tokens:.0%} of the tokens)",
            (
                "Loss: nats per token of the group, at the position that made the prediction; it also suffers from "
                "what was dropped at the tokens before. Part: the same spread over all tokens, so that parts add up "
                "to the whole. Frequency: tenths of the ids that were read, by their occurrences in the text of the "
                "statistics.",
            ),
            (
                _table(
                    f"by {title} [nats per token]",
                    [("tokens", ","), ("share", ".1%"), *loss],
                    [(one.name, one.tokens, one.tokens / found.tokens, one.change, one.part) for one in some],
                )
                for title, some in found.groups.items()
            ),
            read="Dots with 95% intervals: the loss that is added per token of a group, at the position that made the "
            "prediction. Dashed: the mean over all tokens.",
            misleads="Groups differ in how hard their tokens are. Small groups have wide intervals, and groups from "
            "fewer than 10 documents have none.",
            draw=partial(_draw_groups, found),
        ),
    )


def _table(title: str, columns: Iterable[tuple[str, str]], rows: Iterable[tuple[Any, ...]]) -> Table:
    """A table with a column of names in front, where an `Estimate` fills three columns."""
    flat = []
    for row in rows:
        cells = (dataclasses.astuple(cell) if isinstance(cell, Estimate) else (cell,) for cell in row)
        flat.append(tuple(value for cell in cells for value in cell))
    return Table(title, (Column(""), *(Column(*column) for column in columns)), tuple(flat))


def _draw_kinds(found: ErrorSources) -> Figure:
    parts = (found.kinds, found.dropping)
    figure, axes = subplots(2, 1, figsize=(6.4, 4.4), height_ratios=[len(part) for part in parts])
    for axis, part in zip(axes, parts, strict=True):
        _dot_rows(axis, [(change.name, change.perplexity) for change in part], scale=100)
    axes[0].set(title=_size(found))
    axes[1].set(xlabel="change in perplexity [%]")
    figure.tight_layout()
    return figure


def _draw_layers(found: ErrorSources) -> Figure:
    rows = [(change.name, change.nats) for change in found.layers]
    rows += [("their sum", found.total), ("all together", found.joint.nats)]
    figure, axis = subplots(figsize=(6.4, 0.3 * len(rows) + 1.2))
    _dot_rows(axis, rows)
    axis.set(xlabel="loss added [nats per token]", title=_size(found))
    figure.tight_layout()
    return figure


def _draw_groups(found: ErrorSources) -> Figure:
    figure, axes = panels(len(found.groups), width=4.0)
    for axis, (title, some) in zip(axes, found.groups.items(), strict=True):
        _dot_rows(axis, [(group.name, group.change) for group in some])
        axis.axvline(found.whole.nats.value, color="0.4", linewidth=0.8, linestyle="--")
        axis.set(title=title)
    figure.supxlabel("loss added [nats per token of the group]")
    figure.suptitle(_size(found))
    figure.tight_layout()
    return figure


def _dot_rows(axis: Any, rows: Sequence[tuple[str, Estimate]], scale: float = 1.0) -> None:
    """One row for each estimate, the first on top."""
    values = scale * np.array([dataclasses.astuple(one) for _, one in rows]).reshape(-1, 3)
    places = np.arange(len(rows))
    axis.hlines(places, values[:, 1], values[:, 2], color="0.5")
    axis.plot(values[:, 0], places, "o", color="0", markersize=4)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.set_yticks(places, [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)


def _size(found: ErrorSources) -> str:
    return f"{found.documents:,} documents, {found.tokens:,} tokens"


QUESTION = Question("error_sources", "What VAR's error is made of", examine, kind=ErrorSources, present=_sections)
