"""Does VAR beat the simple alternatives? Families of configurations over one table, scored on the same documents.

Letters: P points of a curve, N documents, S bootstrap draws.

A family is a rule with a dial; its points make a curve of loss against experts per token. All of them run in the same
engine over a table of fixed shapes, so a difference between two curves is one between the rules. What counts is the
number of experts at equal loss: that of the policy that was given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from analysis.policies.scored_points import Losses, Measured, Subject, degradations, losses, measured
from analysis.resampling import Estimate, document_counts
from analysis.studies.families import SCALES, VAR, Family, families, table_of
from varjax.model import build_for
from varjax.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Curve:
    """A family on the documents."""

    name: str
    dial: str
    source: str
    from_plain: bool
    points: tuple[Measured, ...]
    at_equal_loss: Estimate | None  # fewest experts at no more than VAR's loss; None: at no number; inf: in some draws
    spends: bool  # whether the family gets to a loss as high as VAR's; if not, it stays under it at its fewest experts


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The curves, VAR's own first, and what they are measured against."""

    var: Measured  # the policy as it was given
    curves: tuple[Curve, ...]
    top_k: int
    perplexity: float  # of the plain model, per token
    documents: int
    tokens: int  # scored
    samples: int  # bootstrap draws


def evaluate(subject: Subject) -> Alternatives:
    """Every point of every family on the subject's documents.

    Intervals are 95 % percentile bootstraps over documents, the same draws for all points. Experts per token are those
    over all documents in every draw: they vary far less from text to text than losses do.

    Raises:
        InputError: as `analysis.studies.families.families`.
    """
    table = build_for(subject.model, subject.config, subject.stats, subject.answers, keep_shapes=True)
    wanted = families(subject)
    plain = losses(subject)
    counts = document_counts(len(plain.nll), subject.samples, subject.seed)
    scored: dict[str, list[Losses]] = {}
    number = sum(len(family.points) for family in wanted)
    known = 0  # points that an earlier run scored
    with progress_bar(total=number, unit="point", desc="alternatives", show=subject.progress) as bar:
        for family in wanted:
            scored[family.name] = []
            for point in family.points:
                changed = table_of(subject, table, family, point)
                change = [family.change, subject.seed] if family.change == "shuffled" else family.change
                scored[family.name].append(losses(subject, point.config, changed, change))
                known += scored[family.name][-1].read_back
                bar.set_postfix_str(f"{known} read back", refresh=False)
                bar.update()
    given = scored[VAR][SCALES.index(1.0)]
    return Alternatives(
        var=measured(1.0, plain, given, counts),
        curves=tuple(_curve(family, plain, scored[family.name], given, counts) for family in wanted),
        top_k=subject.model.config.top_k,
        perplexity=math.exp(plain.nll.sum() / plain.tokens.sum()),
        documents=len(plain.nll),
        tokens=int(plain.tokens.sum()),
        samples=subject.samples,
    )


def fewest_experts(experts: np.ndarray, loss: np.ndarray, most: np.ndarray) -> np.ndarray:
    """[...]: the fewest experts along a curve whose loss is at most `most`, infinite where none is.

    Between neighboring points the curve is a straight line.

    Args:
        experts: [P], in the order of the curve.
        loss: [P, ...]
        most: [...]
    """
    shape = (-1,) + (1,) * np.ndim(most)
    experts = np.broadcast_to(np.reshape(experts, shape), loss.shape)
    at_points = np.where(loss <= most, experts, np.inf).min(axis=0)
    over, under = loss[:-1] - most, loss[1:] - most
    crosses = over * under < 0
    share = over / np.where(crosses, over - under, 1)
    between = np.where(crosses, experts[:-1] + share * (experts[1:] - experts[:-1]), np.inf)
    return np.minimum(at_points, between.min(axis=0, initial=np.inf))


def _curve(family: Family, plain: Losses, points: Sequence[Losses], given: Losses, counts: np.ndarray) -> Curve:
    chain = [plain, *points] if family.from_plain else list(points)
    experts = np.array([point.experts_per_token for point in chain])
    whole = np.ones((1, counts.shape[1]))

    def at_equal_loss(counts: np.ndarray) -> np.ndarray:
        return fewest_experts(experts, degradations(plain, chain, counts), degradations(plain, [given], counts)[0])

    (value,) = at_equal_loss(whole)
    low, high = np.quantile(at_equal_loss(counts), [0.025, 0.975], method="inverted_cdf")  # some may be infinite
    highest = degradations(plain, chain, whole).max()
    return Curve(
        family.name,
        family.dial,
        family.source,
        family.from_plain,
        tuple(measured(at.dial, plain, point, counts) for at, point in zip(family.points, points, strict=True)),
        Estimate(float(value), float(low), float(high)) if np.isfinite(value) else None,
        bool(highest >= degradations(plain, [given], whole)[0, 0]),
    )
