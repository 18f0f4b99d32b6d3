"""How much of the first choice do the last token ids leave open? H(first choice | last n ids), in nats.

Letters: N tokens, D documents, O context orders, L layers, E experts, c(k, e) first choices of e at key k, n(k)
occurrences of k.

| measure | tokens | what |
|---|---|---|
| `coverage` | all | share of the tokens whose key occurs `min_count` times or more in the trace; no null |
| `plug_in` | at such keys | mean of -ln(c / n): too low, the more so the rarer the keys |
| `conditional_entropy` | at such keys | the same with Grassberger's correction |
| `explained` | at such keys | in sample: 1 - `conditional_entropy` / its mean under the null; needs permutations |
| `held_out_coverage` | held-out | share of them whose key occurs `min_count` times in the build documents; no null |
| `cross_entropy` | held-out, at such keys | loss of a table of the build documents |
| `explained_held_out` | held-out, at such keys | 1 - `cross_entropy` / its mean under the null; needs permutations |

Grassberger's estimate (2003, arXiv physics/0307138) replaces ln c by G(c) = psi(c) + (-1)^c / 2 (psi((c + 1) / 2) -
psi(c / 2)). Of the estimates that are sums over tokens, so that documents can be resampled, it loses least where n is
below E (docs/phase1.md). The null has the same keys with the same counts, so its bias is the same.

`explained` is in sample: a phrase that a document repeats word for word, routed alike each time, counts as explained.
`explained_held_out` is the figure to rely on; it is negative where the table misleads, and can be too high where
held-out documents are near-duplicates of build documents. Longer orders look at fewer and easier tokens:
`agreement_of_shortest` of `analysis.questions.predictability` compares orders at the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure
from scipy.special import digamma

from analysis.questions import nulls
from analysis.questions.data import RoutingData, TraceSettings, needs_routing
from analysis.questions.question import Question
from analysis.report.report import ReportFigure, Section
from analysis.resampling import Measure, document_sums, measure, ratio, ratio_with_interval
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError

PRIOR = 2.0  # occurrences that the layer's marginal counts for in the table of the cross entropy; 1 to 8 do as well


@dataclass(frozen=True)
class ChoiceEntropy:
    """Entropies of one trace, per context order and layer, and what they rest on."""

    measures: dict[str, Measure]  # name -> one row per order
    unconditional: Measure  # one row: H(first choice), whatever the ids
    tokens: int
    documents: int


def choice_entropy(trace: Trace, settings: TraceSettings, progress: bool = False) -> ChoiceEntropy:
    """Estimate H(first choice | last n ids) per order and layer, against the permutation null, and H(first choice).

    Intervals draw documents and keep each token's contribution as it is (to first order an entropy is a mean over
    tokens); those of what is explained take the null as known. The cross entropy and what comes with it are NaN where
    all documents are on one side of the split into build and held-out documents.

    Args:
        trace: captured in all layers.
        settings: of the keys and the null.
        progress: show a bar on standard error.

    Returns:
        The entropies.

    Raises:
        NotTestableError: the experts are not ranked, or no key occurs often enough.
    """
    nulls.check_ranked(trace)
    choices = _Choices(trace)
    everywhere = np.ones(len(trace.token_id), bool)
    contexts = [trace.contexts(order) for order in settings.orders]
    keys = [nulls.known_keys(context, everywhere, settings.min_count) for context in contexts]
    if all(np.all(key < 0) for key in keys):
        raise NotTestableError(
            f"no context of {', '.join(map(str, settings.orders))} ids occurs {settings.min_count} times; "
            "give a longer trace or a lower min_count"
        )
    build = trace.build_documents()[trace.document]
    build_keys = [nulls.known_keys(context, build, settings.min_count) for context in contexts]

    def sums(shuffled: np.ndarray | slice) -> dict[str, np.ndarray]:
        inside = choices.entropies([key[shuffled] for key in keys])
        return inside | {"cross_entropy": choices.cross_entropies([key[shuffled] for key in build_keys], build)}

    every, held_out = choices.count(keys, everywhere), choices.count(build_keys, ~build)
    drawn = (settings.samples, settings.seed)
    measures = {}
    for name, covered, counted in (("coverage", every, everywhere), ("held_out_coverage", held_out, ~build)):
        size = np.broadcast_to(document_sums(counted, trace.document)[:, None, None], covered.shape)
        measures[name] = measure(name, "share", *ratio_with_interval(covered, size, *drawn))
    totals = {"plug_in": every, "conditional_entropy": every, "cross_entropy": held_out}
    measures |= nulls.against_permutations(
        sums, totals, trace.document, settings, "choice entropy", progress, "nats", (0, math.inf)
    )
    if settings.permutations:
        measures["explained"] = _explained("explained", measures["conditional_entropy"])
        measures["explained_held_out"] = _explained("explained_held_out", measures["cross_entropy"])
    empty = [np.zeros(len(trace.token_id), np.int64)]
    whatever = choices.entropies(empty)["conditional_entropy"], choices.count(empty, everywhere)
    unconditional = measure("entropy", "nats", *ratio_with_interval(*whatever, *drawn))
    return ChoiceEntropy(measures, unconditional, len(trace.token_id), choices.documents)


class _Choices:
    """First choices of a trace, arranged for counting. All sums are float64 [D, O, L]."""

    def __init__(self, trace: Trace):
        self.first = np.ascontiguousarray(trace.experts[:, :, 0].T).astype(np.int64)  # [L, N]
        self.document = trace.document
        self.num_experts = trace.num_experts
        self.documents = len(np.unique(trace.document))
        self.correction = _grassberger(len(trace.token_id))

    def count(self, keys: Sequence[np.ndarray], counted: np.ndarray) -> np.ndarray:
        """Tokens among `counted` that have a key."""
        known = np.stack([(key >= 0) & counted for key in keys], axis=-1)
        return np.repeat(document_sums(known, self.document)[..., None], len(self.first), axis=-1)

    def entropies(self, keys: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Sums of each token's contribution to the plug-in and to the corrected entropy."""
        sums = {name: self._empty(keys) for name in ("plug_in", "conditional_entropy")}
        for order, key in enumerate(keys):
            rows = np.flatnonzero(key >= 0)
            occurrences = np.log(np.bincount(key[rows]))[key[rows]]
            for layer, first in enumerate(self.first):
                cells = key[rows] * self.num_experts + first[rows]
                chosen = np.bincount(cells)[cells]
                self._put(sums["plug_in"], order, layer, rows, occurrences - np.log(chosen))
                self._put(sums["conditional_entropy"], order, layer, rows, occurrences - self.correction[chosen])
        return sums

    def cross_entropies(self, keys: Sequence[np.ndarray], build: np.ndarray) -> np.ndarray:
        """Sums of -ln p(first choice) over the tokens outside `build`, p from a table of those inside.

        p = (c + PRIOR * m) / (n + PRIOR), m the layer's share of the expert in the build part (half a count added).
        """
        sums = self._empty(keys)
        for order, key in enumerate(keys):
            inside, outside = np.flatnonzero(build & (key >= 0)), np.flatnonzero(~build & (key >= 0))
            size = int(key.max(initial=-1)) + 1
            occurrences = np.bincount(key[inside], minlength=size)[key[outside]]
            for layer, first in enumerate(self.first):
                load = np.bincount(first[build], minlength=self.num_experts) + 0.5
                counts = np.bincount(key[inside] * self.num_experts + first[inside], minlength=size * self.num_experts)
                chosen = counts[key[outside] * self.num_experts + first[outside]]
                marginal = (load / load.sum())[first[outside]]
                loss = -np.log((chosen + PRIOR * marginal) / (occurrences + PRIOR))
                self._put(sums, order, layer, outside, loss)
        return sums

    def _empty(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((self.documents, len(keys), len(self.first)))

    def _put(self, sums: np.ndarray, order: int, layer: int, rows: np.ndarray, values: np.ndarray) -> None:
        every = np.zeros(len(self.document))
        every[rows] = values
        sums[:, order, layer] = document_sums(every, self.document)


def _grassberger(largest: int) -> np.ndarray:
    """G(c), Grassberger's replacement for ln c, float64 [largest + 1]; 0 at c = 0, which no token has."""
    c = np.arange(1, largest + 1)
    sign = np.where(c % 2 == 0, 1, -1)
    return np.r_[0.0, digamma(c) + sign / 2 * (digamma((c + 1) / 2) - digamma(c / 2))]


def _explained(name: str, entropy: Measure) -> Measure:
    """1 - H / mean H under the null: 0 where the ids say nothing, 1 where they say all; NaN where all is constant."""

    def share(nats: np.ndarray | None) -> np.ndarray:
        return 1 - ratio(np.asarray(nats), np.asarray(entropy.null))

    # A high entropy is a low share, so the ends of intervals and bands change places.
    return replace(
        entropy,
        name=name,
        unit="share",
        value=share(entropy.value),
        low=share(entropy.high),
        high=share(entropy.low),
        null=share(entropy.null),
        null_low=share(entropy.null_high),
        null_high=share(entropy.null_low),
    )


def _examine(data: RoutingData) -> Section:
    settings, orders = data.settings, data.settings.order_names
    found = data.on_trace(lambda trace: choice_entropy(trace, settings, data.progress))
    measures = found.measures
    in_sample = (
        [f"in sample {nulls.mean(row):.1%}" for row in measures["explained"].value] if settings.permutations else []
    )
    covered = measures["held_out_coverage"].value[:, 0]
    if not settings.permutations:
        outcome = "no permutations were made, so what ids explain beyond chance is not known"
    elif np.isnan(covered).all():
        outcome = (
            "what ids explain on unseen text is not known: all documents are on one side of the split; "
            + "; ".join(f"{name} {inside}" for name, inside in zip(orders, in_sample, strict=True))
        )
    else:
        outcome = "explained by the ids on held-out documents, mean over layers: " + "; ".join(
            f"{name} {nulls.mean(held_out):.1%} at {share:.0%} of tokens ({inside})"
            for name, held_out, share, inside in zip(
                orders, measures["explained_held_out"].value, covered, in_sample, strict=True
            )
        )
    words = [
        f"Keys seen {settings.min_count} times or more; {found.tokens:,} tokens of {found.documents:,} documents. "
        "cross_entropy: loss of a table on documents that did not build it; explained_held_out: 1 - cross_entropy "
        "over its mean under the null, negative where the table misleads.",
        "In sample: plug_in, too low where keys are rare; conditional_entropy, with Grassberger's correction (2003); "
        "explained, 1 - conditional_entropy over its mean under the null, which counts word-for-word repetition "
        "within a document as explained.",
        f"{nulls.NULL} Longer orders look at fewer and easier tokens: see predictability for orders at equal tokens.",
    ]
    coverages = {
        "coverage": "coverage [share] of the entropy: keys of the whole trace",
        "held_out_coverage": "coverage [share] of the cross entropy: held-out tokens, keys of the build documents",
    }
    tables = nulls.tables(found.unconditional, ["first choice, whatever the ids"])
    tables += [nulls.coverage_table(title, measures[name], orders) for name, title in coverages.items()]
    for name in ("explained_held_out", "cross_entropy", "explained", "conditional_entropy", "plug_in"):
        if name in measures:
            tables += nulls.tables(measures[name], orders)
    figure = ReportFigure(
        "choice_entropy",
        "Entropy of the first choice, given the last ids",
        "Dots: the entropy of the first choice that is left once the last n ids are known, with intervals. Dashed line "
        "and gray: the same with shuffled routing. Dotted: without knowing any ids. The further the dots are below the "
        "gray band, the more the ids explain.",
        "With few occurrences per key, even the corrected entropy is biased, so compare the dots with the gray band, "
        "which has the same counts, and not with the dotted line.",
        lambda: _draw(found, settings),
    )
    return QUESTION.section("reported", f"{outcome}; no published bound", words, tables, [figure])


def _draw(found: ChoiceEntropy, settings: TraceSettings) -> Figure:
    figure, axes = nulls.panels(1, len(settings.orders))
    for column, (axis, order) in enumerate(zip(axes.flat, settings.orders, strict=True)):
        nulls.plot(axis, found.measures["conditional_entropy"], column)
        axis.plot(found.unconditional.value[0], color="0.5", linestyle=":", linewidth=1)
        axis.set_title(f"order {order}: {found.measures['coverage'].value[column, 0]:.0%} of tokens", fontsize="medium")
    axes[0, 0].set(ylabel="entropy [nats]", ylim=(0, None))  # of all panels, once all are drawn
    figure.suptitle(
        f"H(first choice | last n ids) — {found.tokens:,} tokens, {found.documents:,} documents\ndots: observed; "
        "dashed and gray: shuffled within documents; dotted: no ids"
    )
    figure.tight_layout()
    return figure


QUESTION = Question(
    "choice_entropy", "What the last ids leave open: H(first choice | last n ids)", _examine, needs_routing
)
