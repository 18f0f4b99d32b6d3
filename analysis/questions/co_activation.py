"""Which experts are chosen together, and how much more often than their loads alone explain?

Letters: N tokens, D documents, L layers, E experts, K experts per token, P listed pairs.

Busy experts are often chosen together without any relation, and the K experts of a token are always different. So the
share that load alone explains is that of the distribution over sets of K experts with the measured loads and the
largest entropy: P(set) proportional to the product of its members' weights ("conditional Poisson sampling", Chen,
Dempster and Liu 1994). For K = 2 that is quasi-independence, a symmetric matrix w_a w_b without its diagonal, fitted to
the loads; for K > 2 such a matrix is only an approximation.

The strongest of many pairs look strong by chance alone. So the pairs to list are chosen on the trace's build documents
(`Trace.build_documents`), and their ratios and intervals are those of the other documents, with their own loads.

Where documents differ in load, ratios above 1 do not prove that experts belong together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.sparse import csr_array

from analysis.questions.data import RoutingData, TraceSettings, needs_selection
from analysis.questions.nulls import mean
from analysis.questions.question import Question
from analysis.report.figures import heat_map, over_the_depth, subplots
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import Measure, bootstrap, document_sums, measure, ratio
from analysis.traces.trace import Trace
from varjax.errors import InputError, NotTestableError

_TOLERANCE = 1e-8  # of a fitted load
_ITERATIONS = 5000


@dataclass(frozen=True)
class CoActivation:
    """All pairs of experts in each layer."""

    share: np.ndarray  # float64 [L, E, E], share of all tokens that chose both; on the diagonal, that chose the one
    expected: np.ndarray  # float64 [L, E, E], the same if only the loads and K were given
    strongest: np.ndarray  # int64 [L, P, 2], pairs of largest ratio in the build documents; -1: fewer
    pair_share: np.ndarray  # float64 [L, P], their share of the held-out tokens; NaN for missing pairs
    pair_expected: np.ndarray  # float64 [L, P], the same if only the held-out loads and K were given
    strength: Measure  # ratio of the two, one row per rank
    build_documents: int
    held_out_documents: int  # 0: no pair is listed
    tokens: int

    @property
    def ratio(self) -> np.ndarray:
        """Share over expected, float64 [L, E, E]; 1 if load explains the pair, NaN on the diagonal and for no load."""
        off_diagonal = ~np.eye(self.share.shape[-1], dtype=bool)
        return np.where(off_diagonal, ratio(self.share, self.expected), np.nan)


def _co_activation(trace: Trace, settings: TraceSettings, pairs: int = 10, min_expected: float = 25.0) -> CoActivation:
    """Shares of the tokens that chose each pair of experts, and the strongest pairs of each layer.

    The intervals draw held-out documents; a draw's own loads enter its expected shares to first order. Where all
    documents are on one side of the split, no pair is listed. Pairs that are expected in fewer than `min_expected`
    build tokens are not listed, because their ratios are noise.
    """
    if trace.top_k < 2:
        raise NotTestableError(
            "co-activation needs two experts per token or more; this trace has K = 1, which makes no pairs"
        )
    if len(trace.token_id) == 0:
        raise NotTestableError("the trace has no token; give one that has")
    share, expected = _shares(trace)
    build, held_out = (trace.of(part) for part in (trace.build_documents(), ~trace.build_documents()))
    strongest = np.full((trace.num_layers, pairs, 2), -1)
    held_out_share = held_out_expected = np.full_like(share, np.nan)
    if len(build.token_id) and len(held_out.token_id):
        strongest = np.stack(list(_strongest(*_shares(build), pairs, min_expected / len(build.token_id))))
        held_out_share, held_out_expected = _shares(held_out)
    return CoActivation(
        share=share,
        expected=expected,
        strongest=strongest,
        pair_share=_of_pairs(held_out_share, strongest),
        pair_expected=_of_pairs(held_out_expected, strongest),
        strength=_strength(held_out, held_out_share, held_out_expected, strongest, settings),
        build_documents=len(np.unique(build.document)),
        held_out_documents=len(np.unique(held_out.document)),
        tokens=len(trace.token_id),
    )


def _expected_shares(load: np.ndarray, top_k: int) -> np.ndarray:
    """Share of the tokens that choose both, float64 [E, E], if K experts are chosen with these loads [E] of sum K.

    Raises NotTestableError if no distribution over sets of K experts was found that has these loads.
    """
    if not np.isclose(load.sum(), top_k):
        raise InputError(
            f"the loads {np.round(load, 4).tolist()} add up to {load.sum():.4g}; give loads of sum {top_k}"
        )
    expected = np.outer(load, load)  # right where one of the two is always or never chosen
    free = (load > 0) & (load < 1)
    left = top_k - int(np.sum(load >= 1))  # experts of a token that are not certain
    if free.any():
        weights = _fit(load[free], left)
        expected[np.ix_(free, free)] = _pairs(weights, left)
    np.fill_diagonal(expected, load)
    return expected


def _shares(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Measured and expected shares of a trace's tokens, float64 [L, E, E] each."""
    tokens, shape = len(trace.token_id), (len(trace.token_id), trace.num_experts)
    starts = np.arange(0, tokens * trace.top_k + 1, trace.top_k)
    ones = np.ones(tokens * trace.top_k)
    chosen = (csr_array((ones, layer.ravel(), starts), shape=shape) for layer in trace.experts.transpose(1, 0, 2))
    share = np.stack([(one.T @ one).toarray() / tokens for one in chosen])
    return share, np.stack([_expected_shares(np.diagonal(layer), trace.top_k) for layer in share])


def _of_pairs(matrix: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cells of a matrix [L, E, E] at pairs [L, P, 2], float64 [L, P]; NaN for missing pairs."""
    first, second = pairs[..., 0], pairs[..., 1]
    return np.where(first < 0, np.nan, matrix[np.arange(len(matrix))[:, None], first, second])


def _fit(load: np.ndarray, size: int) -> np.ndarray:
    """Weights [E] whose sets of `size` have these loads [E], each over 0 and under 1."""
    odds = load / (1 - load)
    weights = odds
    for _ in range(_ITERATIONS):
        weights = weights / np.exp(np.mean(np.log(weights)))
        term = weights * _polynomials(weights, size, np.eye(len(weights), dtype=bool))[:, -1]
        fitted = size * term / term.sum()
        if np.max(np.abs(fitted - load)) < _TOLERANCE:
            return weights
        weights = weights * odds * (1 - fitted) / fitted
    raise NotTestableError(
        f"no weights were found that give the loads {np.round(load, 4).tolist()} with {size} experts per token, so "
        "what chance alone would pair is not known; give a longer trace"
    )


def _polynomials(weights: np.ndarray, size: int, left_out: np.ndarray) -> np.ndarray:
    """Elementary symmetric polynomials of degree 0 to size - 1, float64 [..., size], without weights bool [..., E]."""
    polynomial = np.zeros((*left_out.shape[:-1], size))
    polynomial[..., 0] = 1
    for expert, weight in enumerate(weights):
        polynomial[..., 1:] += np.where(left_out[..., expert, None], 0, weight * polynomial[..., :-1])
    return polynomial


def _pairs(weights: np.ndarray, size: int) -> np.ndarray:
    """Probability that a set of `size` holds both, float64 [E, E]; zero on the diagonal."""
    if size < 2:
        return np.zeros((len(weights), len(weights)))
    one = np.eye(len(weights), dtype=bool)
    both = np.outer(weights, weights) * _polynomials(weights, size - 1, one[:, None] | one)[..., -1]
    np.fill_diagonal(both, 0)
    return both * size * (size - 1) / both.sum()


def _strongest(share: np.ndarray, expected: np.ndarray, pairs: int, least: float) -> Iterator[np.ndarray]:
    """Per layer the `pairs` (a < b) of largest ratio, int64 [P, 2], among those expected often enough."""
    first, second = np.triu_indices(share.shape[-1], k=1)
    for layer_share, layer_expected in zip(share[:, first, second], expected[:, first, second], strict=True):
        listed = np.flatnonzero((layer_expected >= least) & (layer_expected > 0))
        order = np.argsort(-layer_share[listed] / layer_expected[listed], kind="stable")[:pairs]
        chosen = np.full((pairs, 2), -1)
        chosen[: len(order)] = np.stack([first[listed[order]], second[listed[order]]], axis=-1)
        yield chosen


def _strength(
    trace: Trace, share: np.ndarray, expected: np.ndarray, pairs: np.ndarray, settings: TraceSettings
) -> Measure:
    """Ratios of the listed pairs in a trace, [P, L], with their intervals; NaN for missing pairs or tokens."""
    a, b = pairs[..., 0], pairs[..., 1]  # [L, P]
    if len(trace.token_id) == 0:
        none = np.full(a.T.shape, np.nan)
        return measure("pair_ratio", "ratio", none, (none, none))
    one, other = (_of_pairs(share, np.stack([each, each], axis=-1)) for each in (a, b))
    per_loads = ratio(_of_pairs(expected, pairs), one * other)

    def statistic(both: np.ndarray, one: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return ratio(ratio(both * tokens, one * other), per_loads).swapaxes(-1, -2)

    sums = [np.zeros((len(np.unique(trace.document)), *a.shape)) for _ in range(3)]
    for layer, rank in np.argwhere(a >= 0):
        experts = trace.experts[:, layer]
        first, second = np.any(experts == a[layer, rank], axis=-1), np.any(experts == b[layer, rank], axis=-1)
        for total, chosen in zip(sums, (first & second, first, second), strict=True):
            total[:, layer, rank] = document_sums(chosen, trace.document)
    tokens = document_sums(np.ones(len(trace.document)), trace.document)
    sums.append(np.broadcast_to(tokens[:, None, None], sums[0].shape))
    value = statistic(*[one.sum(axis=0) for one in sums])
    return measure(
        "pair_ratio", "ratio", value, bootstrap(statistic, *sums, samples=settings.samples, seed=settings.seed)
    )


def _examine(data: RoutingData) -> Section:
    found = data.on_trace(lambda trace: _co_activation(trace, data.settings))
    first, second = found.strongest[..., 0], found.strongest[..., 1]  # [L, P]
    layers, ranks = np.nonzero(first >= 0)
    strength = [getattr(found.strength, part)[ranks, layers] for part in ("value", "low", "high")]
    numbers = np.stack([found.pair_share[layers, ranks], found.pair_expected[layers, ranks], *strength], axis=-1)
    names = [f"{a} and {b}" for a, b in zip(first[layers, ranks], second[layers, ranks], strict=True)]
    body = tuple(zip(layers.tolist(), names, *numbers.T.tolist(), strict=True))
    columns = [Column("layer"), Column("experts"), Column("share", ".2%"), Column("by load alone", ".2%")]
    columns += [Column(name, ".2f") for name in ("ratio", "low", "high")]
    outcome = "not measured: no pair is expected often enough in the build documents"
    if not found.build_documents or not found.held_out_documents:
        outcome = "not measured: all documents are on one side of the split into build and held-out documents"
    elif body:
        outcome = (
            "pair that is strongest in the build documents, on the held-out ones, over what load alone makes: "
            f"{mean(found.strength.value[0]):.2f}x, mean over layers; no published bound"
        )
    words = [
        "Share of a layer's tokens that chose both experts, against what the experts' loads alone explain. The pairs "
        f"are the strongest ones in {found.build_documents:,} documents, among those expected often enough; all "
        f"figures are those of {found.held_out_documents:,} other documents. Documents whose loads differ raise the "
        "ratios too.",
    ]
    figure = ReportFigure(
        "co_activation",
        "Co-activation of experts",
        "Each panel is a layer. A cell shows how often two experts are chosen for the same token, relative to what "
        "their loads alone explain, on a logarithmic scale: +1 is twice as often, -1 half as often. Medium gray is "
        "chance.",
        "The cells of rarely chosen experts are noise, and documents whose loads differ raise the ratios by "
        "themselves. The table lists frequent pairs on held-out documents.",
        lambda: _draw(found),
    )
    table = Table("Strongest pairs", tuple(columns), body)
    return QUESTION.section("reported" if body else "not testable", outcome, words, [table], [figure])


def _draw(found: CoActivation, layers: int = 4) -> Figure:
    known = np.flatnonzero(~np.isnan(found.share).all(axis=(1, 2)))  # the others were not captured
    shown = over_the_depth(known, layers)
    figure, axes = subplots(1, len(shown), figsize=(2.4 * len(shown) + 1.2, 2.9), squeeze=False, sharey=True)
    for axis, layer in zip(axes.flat, shown, strict=True):
        ratios = found.ratio[layer]
        drawn = np.where(ratios > 0, ratios, np.where(np.isnan(ratios), np.nan, 0.25))  # never together: the lightest
        image = heat_map(axis, np.log2(drawn), vmin=-2, vmax=2)
        axis.set(title=f"layer {layer}", xlabel="expert")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("expert")
    figure.colorbar(image, ax=list(axes.flat), label="log2(share / expected)", extend="both")
    documents = found.build_documents + found.held_out_documents
    figure.suptitle(f"Co-activation of experts — {found.tokens:,} tokens, {documents:,} documents", y=1.04)
    return figure


QUESTION = Question("co_activation", "Experts are chosen together", _examine, needs_selection)
