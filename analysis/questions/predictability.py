"""Do token ids predict routing on unseen documents? Tables of the last ids, built on some documents, scored on others.

Letters: N tokens, H held-out tokens, D documents, O context orders, L layers, E experts, K experts per token, R keys.

Per layer and context order a table is built on the trace's build documents (`Trace.build_documents`): for every key
(the last n ids) its most common first choice, and the K experts that it chose most often (or that got most of the
probability, where probabilities are known). The other documents score the table, at the keys that occur `min_count`
times or more in the build part.

| measure | what, at the known keys of the held-out documents |
|---|---|
| `coverage` | share of all held-out tokens that have a known key; the same in every layer, no null |
| `agreement` | share of tokens whose first choice is the predicted one; only where the experts are ranked |
| `agreement_of_shortest` | the same by the shortest order's table, at the keys of the longer order |
| `recall` | share of the chosen experts that are among the K predicted; only where K < E |
| `mass` | share of the chosen experts' probability that the K predicted have; only where that is known, and K < E |

A long context that is frequent is an easy one, so `agreement` rises with the order even where the added ids say
nothing. What they add is its distance from `agreement_of_shortest`, at the same tokens (of unranked experts
`recall_of_shortest`). The longest known key of each token covers the same tokens as the shortest order.

Probabilities count as shares of the chosen experts' sum. Nothing is scored on the build part: a bigram seen once is
never wrong there. The null shuffles routing among each document's tokens and rebuilds and rescores the tables, so what
is above the band is not due to the load of the experts or the topics of documents. It also breaks the similarity of
neighbors: where routing persists from token to token and ids come in bursts, a table can exceed the band a little
though no id decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.questions import nulls
from analysis.questions.data import RoutingData, TraceSettings, check_selection, needs_routing
from analysis.questions.question import Question
from analysis.report.report import ReportFigure, Section
from analysis.resampling import Measure, document_sums, measure, ratio_with_interval
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError

_MEANINGS = {
    "agreement": "agreement: the first choice is the predicted one",
    "recall": "recall: share of the chosen experts that were predicted",
    "mass": "mass: share of their probability",
}
_OF_SHORTEST = "_of_shortest"  # ends the name of what the shortest order gets at another order's tokens


@dataclass(frozen=True)
class Predictability:
    """Held-out figures of one trace, per context order and layer, and what they rest on."""

    measures: dict[str, Measure]  # name -> one row per order, and a last one: each token by its longest known key
    build_documents: int
    held_out_documents: int
    build_tokens: int
    held_out_tokens: int


def predictability(trace: Trace, settings: TraceSettings, progress: bool = False) -> Predictability:
    """Compute coverage, agreement, recall and mass on held-out documents, each but coverage against a null.

    A band and its p values hold for all figures of one measure together. The intervals draw held-out documents and keep
    the tables as they are.

    Args:
        trace: captured in all layers; without a ranking of the experts there is no agreement.
        settings: of the tables and the null.
        progress: show a bar on standard error.

    Returns:
        The figures.

    Raises:
        NotTestableError: all documents are on one side of the split, no key has enough evidence, or every token runs
            all experts and these are not ranked.
    """
    if not trace.ranked:
        check_selection(trace)
    build = trace.build_documents()[trace.document]
    if build.all() or not build.any():
        raise NotTestableError(
            f"the trace's {len(np.unique(trace.document))} documents are all on one side of the split into build and "
            "held-out documents; give a trace of more documents"
        )
    keys = [nulls.known_keys(trace.contexts(order), build, settings.min_count) for order in settings.orders]
    if all(np.all(key < 0) for key in keys):
        raise NotTestableError(
            f"no context of {', '.join(map(str, settings.orders))} ids occurs {settings.min_count} times in the build "
            "documents; give a longer trace or a lower min_count"
        )
    scored = _Scored(trace, build)
    known = scored.known(keys)

    def sums(shuffled: np.ndarray | slice) -> dict[str, np.ndarray]:
        return scored.sums([key[shuffled] for key in keys])  # the same as moving the routing, and cheaper

    tokens = np.broadcast_to(scored.tokens[:, None, None], known.shape)
    covered = ratio_with_interval(known, tokens, settings.samples, settings.seed)
    totals = dict.fromkeys(scored.names, known)
    measures = nulls.against_permutations(sums, totals, trace.document, settings, "predictability", progress)
    return Predictability(
        measures={"coverage": measure("coverage", "share", *covered)} | measures,
        build_documents=len(np.unique(trace.document[build])),
        held_out_documents=len(scored.tokens),
        build_tokens=int(build.sum()),
        held_out_tokens=int(np.sum(~build)),
    )


class _Scored:
    """A trace arranged for scoring: the held-out tokens, and routing with the tokens last.

    Sums over documents are [D, O + 1, L]; the last row takes each token by its longest known key.
    """

    def __init__(self, trace: Trace, build: np.ndarray):
        self.build, self.held_out = np.flatnonzero(build), np.flatnonzero(~build)
        self.document = trace.document[self.held_out]
        self.tokens = document_sums(np.ones(len(self.held_out)), self.document)  # [D]
        self.experts = np.ascontiguousarray(trace.experts.transpose(1, 2, 0))  # [L, K, N]
        self.num_experts = trace.num_experts
        self.shares = None if trace.probs is None else np.ascontiguousarray(_shares(trace.probs).transpose(1, 2, 0))
        ranked = trace.ranked or trace.top_k == 1
        selects = trace.top_k < trace.num_experts  # else every expert is chosen, and so are those predicted
        self.scores = ["agreement"] * ranked + ["recall"] * selects + ["mass"] * (selects and self.shares is not None)
        self.names = [*self.scores, f"{self.scores[0]}{_OF_SHORTEST}"]

    def known(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Number of tokens with a known key, float64 [D, O + 1, L]."""
        known = np.stack([key[self.held_out] >= 0 for key in keys], axis=-1)
        known = np.concatenate([known, known.any(axis=-1, keepdims=True)], axis=-1)
        return np.repeat(document_sums(known, self.document)[..., None], len(self.experts), axis=-1)

    def sums(self, keys: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Scores of tables from the build part by name, summed over each document, float64 [D, O + 1, L]."""
        judged, of_shortest = self.names[0], self.names[-1]
        sums = {name: np.empty((len(self.tokens), len(keys) + 1, len(self.experts))) for name in self.names}
        split = []  # per order: tokens of the build part, their keys, places in the held-out part, their keys
        for key in keys:
            rows = self.build[key[self.build] >= 0]
            places = np.flatnonzero(key[self.held_out] >= 0)
            split.append((rows, key[rows], places, key[self.held_out[places]]))
        for layer in range(len(self.experts)):
            longest = {name: np.zeros(len(self.held_out)) for name in self.scores}
            for row, (rows, build_keys, places, held_keys) in enumerate(split):
                predicted = self._table(layer, rows, build_keys)
                scores = self._scores(layer, self.held_out[places], held_keys, *predicted)
                for name in self.scores:
                    alone = np.zeros(len(self.held_out))
                    alone[places] = longest[name][places] = scores[name]
                    sums[name][:, row, layer] = document_sums(alone, self.document)
                if row == 0:
                    shortest = longest[judged].copy()
                there = np.zeros(len(self.held_out))
                there[places] = shortest[places]  # a token with a known key has a known shorter one
                sums[of_shortest][:, row, layer] = document_sums(there, self.document)
            for name in self.scores:
                sums[name][:, -1, layer] = document_sums(longest[name], self.document)
            sums[of_shortest][:, -1, layer] = sums[judged][:, 0, layer]
        return sums

    def _table(self, layer: int, rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per key the first choice [R], and which experts are predicted, bool [R, E]; the lowest id among equals."""
        size, top_k = int(keys.max(initial=-1)) + 1, self.experts.shape[1]
        cells = keys * self.num_experts + self.experts[layer][:, rows]  # [K, n]
        weights = None if self.shares is None else self.shares[layer][:, rows].ravel()
        chosen = np.bincount(cells.ravel(), weights, size * self.num_experts).reshape(size, self.num_experts)
        members = np.zeros((size, self.num_experts), bool)
        np.put_along_axis(members, np.argsort(-chosen, axis=-1, kind="stable")[:, :top_k], True, axis=-1)
        first = np.bincount(cells[0], minlength=size * self.num_experts).reshape(members.shape)
        return first.argmax(axis=-1), members

    def _scores(
        self, layer: int, rows: np.ndarray, keys: np.ndarray, first: np.ndarray, members: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Each held-out token's scores by the table, by name, [h]."""
        experts = self.experts[layer][:, rows]  # [K, h]
        found = members[keys, experts]
        scores = {"agreement": first[keys] == experts[0], "recall": found.mean(axis=0)}
        if self.shares is not None:
            scores["mass"] = np.sum(found * self.shares[layer][:, rows], axis=0)
        return scores


def _shares(probs: np.ndarray) -> np.ndarray:
    """Probabilities as shares of the chosen experts' sum, float32 [N, L, K]; equal shares where that is 0."""
    total = probs.sum(axis=-1, keepdims=True, dtype=np.float32)
    return np.where(total > 0, probs / np.where(total > 0, total, 1), np.float32(1 / probs.shape[-1]))


def _examine(data: RoutingData) -> Section:
    settings = data.settings
    found = data.on_trace(lambda trace: predictability(trace, settings, data.progress))
    # With one order its row and that of the longest key are the same, and only the first is shown.
    names = [*settings.order_names, *["longest known key"] * (len(settings.orders) > 1)]
    rows = found.measures
    judged = "agreement" if "agreement" in rows else "recall"
    of_shortest, there = rows[f"{judged}{_OF_SHORTEST}"], f"{names[0]} there"
    tables = [nulls.coverage_table("coverage [share], the same in every layer", rows["coverage"], names)]
    for name, one in rows.items():
        if name not in ("coverage", of_shortest.name):
            extra = (there, of_shortest.value) if name == judged and len(names) > 1 else None
            tables += nulls.tables(one, names, judge=True, extra=extra)
    unranked = "" if judged == "agreement" else " agreement: not measured, because the experts are not ranked."
    words = [
        f"Tables of the last n ids (order n) are built on {found.build_documents:,} documents "
        f"({found.build_tokens:,} tokens) and scored on {found.held_out_documents:,} others "
        f"({found.held_out_tokens:,} tokens), at keys seen {settings.min_count} times or more; coverage is the share "
        f"of tokens with such a key. {'; '.join(_MEANINGS[name] for name in rows if name in _MEANINGS)}.{unranked}",
        f"Longer orders are scored at fewer and easier tokens. {there}: {judged} of the shortest order at the same "
        "tokens; the distance from it is what the further ids add.",
        f"{nulls.NULL} PASS: above the band. The verdict is that of {judged} over all orders; this criterion is "
        "this project's, not a published one.",
    ]
    outcomes = "; ".join(_outcome(rows, judged, row, name, there) for row, name in enumerate(names))
    figure = ReportFigure(
        "predictability",
        "Held-out predictability by layer and order",
        "How well tables of token contexts predict the routing of documents that they were not built on. One row per "
        "measure, one column per context order. Dots with intervals: observed. Dashed line and gray: with shuffled "
        "routing. Dotted: the shortest order at the same tokens. The higher the dots are above the gray band, the more "
        "the ids predict.",
        "Longer contexts are scored at fewer and easier tokens (the share is given above each column), so an order "
        "that is better at its own keys may not be better over all tokens. The intervals do not include the "
        "uncertainty of the tables.",
        lambda: _draw(found, settings),
    )
    verdict = "reported"  # without permutations
    if settings.permutations:
        of_orders = set(nulls.verdicts(found.measures[judged])[: len(settings.orders)].flat)
        verdict = "FAIL" if "FAIL" in of_orders else "PASS" if "PASS" in of_orders else "not testable"
    outcome = f"held-out {judged}, mean over layers: {outcomes}"
    headline = f"{nulls.mean(rows[judged].value[0]):.2f} {judged}"
    return QUESTION.section(verdict, outcome, words, tables, [figure], headline)


def _outcome(rows: Mapping[str, Measure], judged: str, row: int, name: str, there: str) -> str:
    """How large a row of the judged measure is, against what, at how many tokens, in how many layers above the band."""
    one = rows[judged]
    null = "" if one.null is None else f" (null {nulls.mean(one.null[row]):.2f})"
    of_shortest = f" ({there}: {nulls.mean(rows[f'{judged}{_OF_SHORTEST}'].value[row]):.2f})" if row else ""
    covered, above = f"at {rows['coverage'].value[row, 0]:.0%} of tokens", nulls.layers_above(one, row)
    return f"{name}: {nulls.mean(one.value[row]):.2f}{null} {covered}{of_shortest}, {above}"


def _draw(found: Predictability, settings: TraceSettings) -> Figure:
    names = [name for name in found.measures if name != "coverage" and not name.endswith(_OF_SHORTEST)]
    figure, axes = nulls.panels(len(names), len(settings.orders))
    for row, name in enumerate(names):
        for column, order in enumerate(settings.orders):
            nulls.plot(axes[row, column], found.measures[name], column)
            axes[row, column].set_ylim(0, 1.02)
            shortest = found.measures.get(f"{name}{_OF_SHORTEST}")
            if shortest is not None and column > 0:
                axes[row, column].plot(shortest.value[column], color="0.0", linestyle=":", linewidth=1)
            covered = found.measures["coverage"].value[column, 0]
            axes[0, column].set_title(f"order {order}: {covered:.0%} of tokens", fontsize="medium")
        axes[row, 0].set_ylabel(f"{name} [{found.measures[name].unit}]")
    figure.suptitle(
        f"Held-out predictability — {found.held_out_tokens:,} tokens, {found.held_out_documents:,} documents; tables "
        f"from {found.build_tokens:,} tokens\ndots: observed; dashed and gray: shuffled within documents; dotted: "
        f"order {settings.orders[0]} at the same tokens"
    )
    figure.tight_layout()
    return figure


QUESTION = Question("predictability", "Token ids predict routing on unseen documents", _examine, needs_routing)
