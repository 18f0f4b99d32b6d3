"""Does VAR beat the simple alternatives at equal loss? Families of configurations over one table, on the same
documents.

Letters: L layers, K experts per token, P points of a curve, N documents, S bootstrap draws.

A family is a rule with a dial; its points make a curve of loss against experts per token. All families run in the same
engine over the table of the given policy, built once with fixed shapes, so a difference between two curves is one
between the rules. Alternatives that look at no token are policies of order 0, whose key every token has. The cached
tier is off in all of them, VAR's own included, except in "cache only". What counts is the number of experts at equal
loss: the loss of the given policy.

Where the answers are affine, the mean of an expert over all tokens, which others propose, stays constant: its table is
built without maps. Its affine counterpart is an alternative of its own, which looks at no token id either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.evaluate.losses import Losses
from analysis.evaluate.points import MeasuredPoint, Point, Subject, degradations, measured, score_point
from analysis.questions.question import Question
from analysis.report.figures import panels
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import Estimate, document_counts
from varjax.answers import pruned
from varjax.config import LayerPolicy, VARConfig
from varjax.errors import NotTestableError
from varjax.keys import ANY
from varjax.progress import progress_bar
from varjax.table import RouteTable, with_policies

VAR = "VAR"
_ONE_MAP = "one affine answer per expert"
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the first expert's weight
MASSES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the gate's probability; many experts share it
CACHES = ((0.9, 0.9), (0.7, 0.8), (0.5, 0.7), (0.3, 0.6), (0.0, 0.5))  # confidence to remember, weight to keep
SCALES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the policy's tolerances
_WIDE_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # where the policy says little about the tolerances to try
_HARMFUL_SCALES = (0.05, 0.1, 0.2, 0.5, 1.0)  # where small tolerances already cost much
_NEVER = 2**31 - 1  # occurrences that no key has
_LINEAR = 1.0  # percent, up to which the scale of the figure is linear
_HIGHEST = 100.0  # percent that the figure shows

Points = tuple[tuple[float, VARConfig], ...]  # dial and configuration


@dataclasses.dataclass(frozen=True)
class Family:
    """A rule, and its configurations from timid to bold."""

    name: str
    dial: str  # what is turned
    source: str  # who proposed it, or what it takes away from VAR
    points: Points
    from_plain: bool = True  # the dial's timid end is the plain model
    # Of the table; "same keys": those that the given policy uses; "constant": answers of order 0 alone, without maps.
    change: Literal["", "shuffled", "same keys", "constant"] = ""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A family on the documents."""

    name: str
    dial: str
    source: str
    from_plain: bool
    points: tuple[MeasuredPoint, ...]
    at_equal_loss: Estimate | None  # fewest experts at no more than VAR's loss; None: at no number; inf: in some draws
    spends: bool  # whether the family reaches a loss as high as VAR's; if not, it stays under it at its fewest experts

    @property
    def experts(self) -> float:
        """The fewest experts at no more than VAR's loss; infinite where no number is enough."""
        return self.at_equal_loss.value if self.at_equal_loss else math.inf

    @property
    def interval(self) -> str:
        """The fewest experts with their interval, for people."""
        return f"{self.at_equal_loss:.2f}".replace("inf", "never")


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The curves, VAR's own first, and what they are measured against."""

    var: MeasuredPoint  # the given policy
    curves: tuple[Curve, ...]
    top_k: int
    perplexity: float  # of the plain model, per token
    documents: int
    tokens: int  # scored
    samples: int  # bootstrap draws


def _evaluate(subject: Subject) -> Alternatives:
    """Every point of every family, with 95% percentile bootstraps over documents, the same draws for all points.

    Experts per token are counted over all documents in every draw: they vary far less from text to text than losses do.
    """
    wanted = _families(subject)
    table = subject.build()
    plain = score_point(subject)
    counts = document_counts(len(plain.nll), subject.samples, subject.seed)
    scored: dict[str, list[Point]] = {family.name: [] for family in wanted}
    number = sum(len(family.points) for family in wanted)
    known = 0  # points that an earlier run scored
    with progress_bar(total=number, unit="point", desc="alternatives", show=subject.progress) as bar:
        for family in wanted:
            for _, config in family.points:
                changed = _table_of(subject, table, family, config)
                change = [family.change, subject.seed] if family.change == "shuffled" else family.change
                scored[family.name].append(score_point(subject, config, changed, change))
                known += scored[family.name][-1].read_back
                bar.set_postfix_str(f"{known} read back", refresh=False)
                bar.update()
    given = scored[VAR][SCALES.index(1.0)]
    return Alternatives(
        var=measured(1.0, plain, given, counts),
        curves=tuple(_curve(family, plain, scored[family.name], given, counts) for family in wanted),
        top_k=subject.model.config.top_k,
        perplexity=plain.perplexity,
        documents=len(plain.nll),
        tokens=int(plain.tokens.sum()),
        samples=subject.samples,
    )


def _families(subject: Subject) -> tuple[Family, ...]:
    """VAR by the scale of its tolerances, then the proposals of others, then VAR without one thing at a time.

    Raises NotTestableError if a layer of the policy does something that its tolerance does not govern.
    """
    config = dataclasses.replace(subject.config, cache_size=0, cache_layers=None)
    top_k = subject.model.config.top_k
    rescaled = subject.model.config.normalize_top_k  # rules of others weigh the rest as the model weighs its K
    given = _policies(subject)
    tolerances = [policy.tolerance for policy in given.values() if policy is not None and policy.tolerance]
    typical = math.exp(sum(map(math.log, tolerances)) / len(tolerances))

    def each(scale: float = 1.0, **fields: Any) -> VARConfig:
        """The given policies with other fields, their tolerances scaled."""
        changed = {
            layer: policy and dataclasses.replace(policy, **{"tolerance": scale * (policy.tolerance or 0)} | fields)
            for layer, policy in given.items()
        }
        return dataclasses.replace(config, default=None, layers=changed)

    def everywhere(**fields: Any) -> VARConfig:
        """One policy for all layers and tokens."""
        usual: dict[str, Any] = {"experts_kept": top_k, "ngram_orders": (0,), "use_answers": False}
        return dataclasses.replace(config, default=LayerPolicy(**(usual | fields)), layers={})

    def cached(confidence: float, mass: float) -> VARConfig:
        size = subject.config.cache_size or VARConfig().cache_size
        orders = subject.stats.ngram_orders
        alone = everywhere(renormalize=rescaled, experts_kept=None, ngram_orders=orders, frequency_threshold=_NEVER)
        return dataclasses.replace(alone, cache_size=size, confidence_threshold=confidence, mass_threshold=mass)

    def points(dials: Iterable[float], config_at: Callable[[Any], VARConfig]) -> Points:
        return tuple((dial, config_at(dial)) for dial in dials)

    fewer = range(top_k - 1, -1, -1)
    nothing: dict[str, Any] = {"experts_kept": top_k, "tolerance": None, "use_answers": False, "renormalize": rescaled}
    top_m = points(fewer, lambda m: everywhere(experts_kept=m))
    renormalized = points(fewer[:-1], lambda m: everywhere(experts_kept=m, renormalize=True))
    by_ratio = points(RATIOS, lambda r: everywhere(gate_ratio=r, renormalize=rescaled))
    by_mass = points(MASSES, lambda mass: everywhere(gate_mass=mass, renormalize=rescaled))
    means = points(RATIOS, lambda r: everywhere(gate_ratio=r, use_answers=True))
    top_one = (1, everywhere(experts_kept=1, use_answers=True))
    one_mean = points(_WIDE_SCALES, lambda s: each(s, ngram_orders=(0,)))
    unanswered = points(RATIOS, lambda r: each(gate_ratio=r, **nothing))
    by_id = points(_WIDE_SCALES, lambda s: each(s, ngram_orders=(1,)))
    caches = tuple((confidence, cached(confidence, mass)) for confidence, mass in CACHES)
    uniform = points([typical * one for one in _WIDE_SCALES], lambda t: each(tolerance=t))
    answered = points(fewer, lambda m: each(experts_kept=m, tolerance=None))
    scale, ratio, number = "scale of the tolerances", "weight ratio", "m, experts that run"
    mone, best = "MoNE, arXiv 2507.00390", f"{ratio}; last: top-1"
    kind: Literal["", "constant"] = "" if subject.answers.maps is None else "constant"
    one_map = () if subject.answers.maps is None else one_mean
    found = (
        Family(VAR, scale, "the given policy", points(SCALES, each)),
        Family("top-m for all, renormalized", number, "a smaller K", renormalized, from_plain=False),
        Family("top-m for all, own weights", number, "a smaller K", top_m, from_plain=False),
        Family("weight ratio", ratio, "NAEE, arXiv 2402.14800", by_ratio),
        Family("top-p", "probability to reach", "Huang et al. 2024, arXiv 2403.07652", by_mass),
        Family("one mean per expert, by ratio", best, mone, (*means, top_one), change=kind),
        Family("one mean per expert, by tolerance", scale, mone, one_mean, change=kind),
        Family(_ONE_MAP, scale, "affine answers of order 0 alone", one_map),
        Family("VAR without answers", ratio, "the same keys, by weight ratio", unanswered, change="same keys"),
        Family("token ids only", scale, "answers of order 1 alone", by_id),
        Family("cache only", "confidence to remember, weight to keep with it", "nothing known beforehand", caches),
        Family("shuffled answers", scale, "answers of others", points(_HARMFUL_SCALES, each), change="shuffled"),
        Family("one tolerance for all layers", "tolerance", "no search by layer", uniform),
        Family("m experts and answers", number, "no tolerance: as many at every key", answered, from_plain=False),
    )
    return tuple(one for one in found if one.points)  # no m is between 0 and K where K = 1, no map without maps


def _table_of(subject: Subject, table: RouteTable, family: Family, config: VARConfig) -> RouteTable:
    """The table, which was built with `keep_shapes`, under the policies of one point of a family."""
    if family.change == "constant":
        answers, root = subject.answers, (subject.answers.keys == ANY).all(axis=1)
        means = dataclasses.replace(answers, keys=answers.keys[root], entry=answers.entry[:, root], maps=None)
        unbounded = dataclasses.replace(config, answers_per_layer=None)
        return dataclasses.replace(subject, answers=pruned(means)).build(unbounded, keep_shapes=False)
    changed = with_policies(table, config, subject.stats, subject.answers)
    if family.change == "shuffled":
        return shuffled_answers(changed, np.random.default_rng(subject.seed))
    if family.change == "same keys":
        given = with_policies(table, subject.config, subject.stats, subject.answers)
        return dataclasses.replace(changed, eligible=given.eligible)
    return changed


def shuffled_answers(table: RouteTable, rng: np.random.Generator) -> RouteTable:
    """Let each layer's answers change places, while keys and deviations stay: a null, and a fault to plant.

    Of affine answers, the mean outputs change places; maps and centers stay. A center says how far a token is from the
    mean input of its own key and expert, which also decides what is dropped, so that the same experts run as under the
    right answers. With the center of another expert, the map would be applied far from where it was fitted.

    Args:
        table: with answers.
        rng: draws the places.

    Returns:
        The table with wrong answers.
    """
    layers = []
    for layer in table.answers or ():
        order = jnp.asarray(rng.permutation(len(layer.answers)))
        rows, scale = jax.tree.map(lambda leaf, order=order: leaf[order], (layer.answers, layer.scale))
        layers.append(dataclasses.replace(layer, answers=rows, scale=scale))
    return dataclasses.replace(table, answers=tuple(layers) or None)


def _fewest_experts(experts: np.ndarray, loss: np.ndarray, most: np.ndarray) -> np.ndarray:
    """[...]: the fewest experts along a curve whose loss is at most `most`, infinite where none is.

    Between neighboring points the curve is a line.

    Args:
        experts: [P], in the order of the curve.
        loss: [P, ...].
        most: [...].
    """
    shape = (-1,) + (1,) * np.ndim(most)
    experts = np.broadcast_to(np.reshape(experts, shape), loss.shape)
    at_points = np.where(loss <= most, experts, np.inf).min(axis=0)
    over, under = loss[:-1] - most, loss[1:] - most
    crosses = over * under < 0
    share = over / np.where(crosses, over - under, 1)
    between = np.where(crosses, experts[:-1] + share * (experts[1:] - experts[:-1]), np.inf)
    return np.minimum(at_points, between.min(axis=0, initial=np.inf))


def _policies(subject: Subject) -> dict[int, LayerPolicy | None]:
    """The policies of all layers, each one governed by its tolerance alone."""
    found = {layer: subject.config.policy(layer) for layer in range(subject.model.config.num_layers)}
    planned = {layer: policy for layer, policy in found.items() if policy is not None}
    strange = [
        layer
        for layer, one in planned.items()
        if not one.tolerance
        or one.experts_kept not in (None, subject.model.config.top_k)
        or one.gate_ratio
        or one.gate_mass
    ]
    if strange or not planned:
        raise NotTestableError(
            f"the policies of layers {strange or 'all'} are not governed by a tolerance, so there is no dial to turn: "
            "expected policies with a tolerance, experts_kept=None, gate_ratio=None, gate_mass=None (--search_policy "
            "finds such)"
        )
    return found


def _curve(family: Family, plain: Point, points: Sequence[Point], given: Losses, counts: np.ndarray) -> Curve:
    chain = [plain, *points] if family.from_plain else list(points)
    experts = np.array([point.experts_per_token for point in chain])
    whole = np.ones((1, counts.shape[1]))

    def at_equal_loss(counts: np.ndarray) -> np.ndarray:
        return _fewest_experts(experts, degradations(plain, chain, counts), degradations(plain, [given], counts)[0])

    (value,) = at_equal_loss(whole)
    low, high = np.quantile(at_equal_loss(counts), [0.025, 0.975], method="inverted_cdf")  # some may be infinite
    highest = degradations(plain, chain, whole).max()
    return Curve(
        family.name,
        family.dial,
        family.source,
        family.from_plain,
        tuple(measured(dial, plain, point, counts) for (dial, _), point in zip(family.points, points, strict=True)),
        Estimate(float(value), float(low), float(high)) if np.isfinite(value) else None,
        bool(highest >= degradations(plain, [given], whole)[0, 0]),
    )


def _section(found: Alternatives) -> Section:
    """PASS if no alternative runs fewer experts than VAR at VAR's loss, by the estimates; ties are named."""
    ours = found.var.experts_per_token
    others = sorted(found.curves[1:], key=lambda curve: curve.experts)
    lost = [curve for curve in others if curve.experts < ours]
    tied = [curve for curve in others if curve.at_equal_loss and curve.at_equal_loss.low < ours <= curve.experts]
    words = [
        f"VAR loses to {curve.name}: {curve.interval} experts per token and layer at no more than VAR's loss, VAR runs "
        f"{ours:.2f}"
        + (
            "."
            if curve.at_equal_loss and curve.at_equal_loss.high < ours
            else "; the interval does not rule out a tie."
        )
        for curve in lost
    ]
    if tied:
        named = "; ".join(f"{curve.name} {curve.interval}" for curve in tied)
        words.append(f"VAR ({ours:.2f} experts) is not distinguishable from {named}: these intervals reach below it.")
    words += [
        f"VAR as given, without a cached tier: perplexity {found.var.degradation:+.2%} against the plain model's "
        f"{found.perplexity:.3f} per token, {ours:.2f} of {found.top_k} experts, {found.var.open_share:.1%} of tokens "
        "left to the learned router.",
        "Experts at VAR's loss are the fewest along an alternative's curve, on straight lines between points; "
        f"intervals are 95%, from {found.samples:,} bootstrap draws of the {found.documents:,} documents. The place "
        "on the curve was picked on these documents, which flatters the alternatives; VAR's policy must have been "
        "chosen on others.",
        "Token ids only, one tolerance for all layers, shuffled answers and VAR without answers are VAR without one "
        "thing: where they need no more experts, that thing earns nothing.",
    ]
    if any(curve.name == _ONE_MAP for curve in found.curves):
        words.append(
            "The answers are affine. One affine answer per expert is VAR without token ids; one mean per expert has no "
            "maps, as it was proposed; shuffled answers are moved by the right maps from the wrong mean outputs."
        )
    figure = ReportFigure(
        QUESTION.name,
        "VAR and its alternatives",
        "One panel per alternative: increase in perplexity against experts run. Black dots: VAR, with a ring at the "
        "given policy. White squares: the alternative, with 95% intervals. The dotted line is VAR's loss; the curve "
        "that crosses it further to the left runs fewer experts. Beyond the thin lines, the scale is logarithmic.",
        "The lines between points are straight, but the true curves bend: where points are far apart, an alternative "
        "looks worse than it is. All experts count the same here; how much time they take depends on the batch.",
        partial(_draw, found),
    )
    verdict = "FAIL" if lost else "PASS"
    return QUESTION.section(
        verdict, _outcome(found, others, lost, tied), words, (_summary(found), _points(found)), (figure,)
    )


def _outcome(found: Alternatives, others: Sequence[Curve], lost: Sequence[Curve], tied: Sequence[Curve]) -> str:
    """`others` from the fewest experts on."""
    ours = f"{found.var.experts_per_token:.2f} experts at {found.var.degradation:+.2%}"
    if lost:
        named = "; ".join(f"{curve.name} {curve.interval}" for curve in lost)
        return f"VAR ({ours}) loses at equal loss to {len(lost)} of {len(others)} alternatives: {named}"
    if others[0].at_equal_loss is None:
        return f"no alternative reaches VAR's loss: {ours}"
    equal = ", ".join(curve.name for curve in tied)
    return (
        f"no alternative needs fewer experts than VAR: {ours}; the nearest, {others[0].name}, "
        f"needs {others[0].interval}"
        f"{f'; not distinguishable from {equal}' if equal else ''}"
    )


def _summary(found: Alternatives) -> Table:
    rows = []
    for curve in found.curves:
        at, least = curve.at_equal_loss, min(one.experts_per_token for one in curve.points)
        remark = "loses more at every point" if at is None else "" if curve.spends else "loses less at its fewest"
        numbers = [end if math.isfinite(end) else None for end in dataclasses.astuple(at)] if at else [None] * 3
        over = at and at.value / found.var.experts_per_token
        rows.append((curve.name, curve.dial, *numbers, over, least, remark, curve.source))
    columns = (
        *(Column("rule"), Column("dial")),
        *(Column(name, ".2f") for name in ("experts at VAR's loss", "low", "high", "over VAR's", "fewest experts")),
        *(Column("remark"), Column("from")),
    )
    title = f"Experts per token and layer at VAR's loss ({found.var.degradation.value:+.2%})"
    return Table(title, columns, tuple(rows))


def _points(found: Alternatives) -> Table:
    columns = (
        *(Column("rule"), Column("dial", ".3g"), Column("experts", ".3f"), Column("left open", ".1%")),
        *(Column(name, "+.2%") for name in ("perplexity", "low", "high")),
    )
    rows = [
        (curve.name, one.dial, one.experts_per_token, one.open_share, *dataclasses.astuple(one.degradation))
        for curve in found.curves
        for one in curve.points
    ]
    return Table("Every point", columns, tuple(rows))


def _draw(found: Alternatives) -> Figure:
    ours, *others = found.curves
    drawn, axes = panels(len(others), sharex=True, sharey=True)
    for axis, curve in zip(axes, others, strict=True):
        axis.axhline(100 * found.var.degradation.value, color="0.4", linestyle=":", linewidth=0.9)
        for edge in (-_LINEAR, _LINEAR):
            axis.axhline(edge, color="0.85", linewidth=0.6)
        _draw_curve(axis, curve, found.top_k, color="0.5", marker="s", markerfacecolor="1", linestyle="--")
        _draw_curve(axis, ours, found.top_k, color="0", marker="o", markersize=2.5, linestyle="-")
        given = (found.var.experts_per_token, 100 * found.var.degradation.value)
        axis.plot(*given, "o", color="0", markerfacecolor="none", markersize=9)
        axis.set_yscale("symlog", linthresh=_LINEAR)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(curve.name, fontsize=7.5)
    axes[0].set_ylim(top=min(axes[0].get_ylim()[1], _HIGHEST))  # of all panels
    drawn.supxlabel("experts run per token and layer")
    drawn.supylabel("change in perplexity [%]")
    drawn.suptitle(
        f"VAR (black) and its alternatives (white squares) — {found.tokens:,} tokens, {found.documents:,} documents"
    )
    drawn.tight_layout()
    return drawn


def _draw_curve(axis: Any, curve: Curve, top_k: int, **style: Any) -> None:
    points = [(one.experts_per_token, *dataclasses.astuple(one.degradation)) for one in curve.points]
    if curve.from_plain:
        points.insert(0, (float(top_k), 0.0, 0.0, 0.0))
    experts, *change = np.array(points).T
    value, low, high = 100 * np.array(change)
    bars = np.maximum([value - low, high - value], 0)
    axis.errorbar(experts, value, bars, linewidth=0.9, **({"markersize": 4} | style))


QUESTION = Question(
    "alternatives",
    "VAR against the simple alternatives at equal loss",
    _evaluate,
    kind=Alternatives,
    present=lambda found: [_section(found)],
)
