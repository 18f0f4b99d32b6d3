"""Confidence bounds for the mean of bounded observations that hold for every sample size.

Letters: N observations, S sides, F bets, M candidate means.

The only assumptions are that the observations are in [low, high] and are drawn independently from one population.
Scaled to x in [0, 1], a mean m or higher is tested by a bet against it (Waudby-Smith & Ramdas 2023, arXiv 2010.09686):
capital starts at 1 and is multiplied by 1 + bet * (m - x) for each x. Where the mean is m or higher, the game is
unfavorable whatever the bets, as long as each is fixed before its x is seen, so the capital reaches 1 / alpha with a
probability of at most alpha at any time (Ville). The upper bound is the least m at which it did; the capital never
falls as m rises, so that is one number. A lower bound is the upper bound of -x.

`upper_bound`, `p_value` and `documents_needed` are for a sample whose size was fixed in advance. A
`ConfidenceSequence` is for observations that go on coming in: it may be looked at after any of them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from varjax.errors import InputError

Side = Literal["both", "upper", "lower"]

MAX_FRACTION = 0.9  # of the capital that one observation may take: what is lost at once when x = 1

_HALVINGS = 50  # of [0, 1], to find a bound
_FRACTIONS = MAX_FRACTION * 0.5 ** np.arange(10)  # [F], a sequence's bets
_PAYOFFS = 1 / (1 - np.arange(128) / 128)  # [M], 1 / (1 - m) of a sequence's candidate means
_CHUNK = 4096  # observations that a sequence takes at a time, for the sake of memory


def upper_bound(values: ArrayLike, low: float, high: float, level: float = 0.95, *, seed: int = 0) -> float:
    """A number that the mean of the population does not exceed, with probability `level` or more.

    The bets depend on the order of the observations, which is drawn by `seed`, so sorted values do no harm. Choose the
    seed before looking; the least bound over several seeds is not a bound.

    Args:
        values: [N], at least two, of a sample whose size did not depend on them.
        low: limit that no observation can pass, known in advance, not taken from the sample.
        high: the same from above.
        level: confidence.
        seed: of the order.

    Returns:
        The bound, at most `high`.

    Raises:
        InputError: values outside [low, high] or not finite, fewer than two, or a level outside (0, 1).
    """
    x = np.random.default_rng(seed).permutation(_scaled(values, low, high, level))
    bets = _bets(x, level)
    fair, refuted = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (fair + refuted) / 2
        if _log_capital(x, bets, middle) >= -math.log(1 - level):
            refuted = middle
        else:
            fair = middle
    return low + (high - low) * refuted


def p_value(values: ArrayLike, limit: float, low: float, high: float, level: float = 0.95, *, seed: int = 0) -> float:
    """The p-value of "the mean of the population is `limit` or more".

    1 / the largest capital of the bets of `upper_bound`, so it is 1 - `level` or less where that bound is `limit` or
    less and below `high`. It is valid at every level; `level` says at which one the bets do best.

    Args:
        values: as in `upper_bound`.
        limit: of the hypothesis.
        low: as in `upper_bound`.
        high: as in `upper_bound`.
        level: confidence at which the bets do best.
        seed: as in `upper_bound`.

    Returns:
        A probability.

    Raises:
        InputError: as `upper_bound`.
    """
    x = np.random.default_rng(seed).permutation(_scaled(values, low, high, level))
    m = (limit - low) / (high - low)
    if m > 1:  # no mean is so high
        return 0.0
    if m == 1:  # the mean of a population of nothing but `high`
        return 0.0 if x.min() < 1 else 1.0
    return math.exp(-max(0.0, _log_capital(x, _bets(x, level), m)))


def documents_needed(values: ArrayLike, low: float, high: float, level: float, target: float) -> int | None:
    """About how many observations bring the upper bound down to `target`.

    An estimate, not a guarantee: log(1 / alpha) over the mean growth of log capital at `target` under the best constant
    bet, if the population is like the sample. About half of the fresh samples of this size would do.

    Args:
        values: as in `upper_bound`.
        low: as in `upper_bound`.
        high: as in `upper_bound`.
        level: confidence.
        target: of the bound.

    Returns:
        A number of observations; None where their mean is not below the target.

    Raises:
        InputError: as `upper_bound`.
    """
    x = _scaled(values, low, high, level)
    goal = (target - low) / (high - low)
    if x.mean() >= goal:
        return None
    if goal >= 1:
        return 1
    gain = goal - x
    small, large = 0.0, MAX_FRACTION / (1 - goal)  # growth is concave in the bet
    for _ in range(_HALVINGS):
        bet = (small + large) / 2
        if np.mean(gain / (1 + bet * gain)) > 0:
            small = bet
        else:
            large = bet
    return math.ceil(-math.log(1 - level) / np.mean(np.log1p(large * gain)))


@dataclasses.dataclass(frozen=True, eq=False)
class ConfidenceSequence:
    """Bounds that hold after every observation at once; from `begin`. Its fields are numbers, a word and an array.

    The bets are constant fractions of the capital, which is shared out over F of them in equal parts (Cover's universal
    portfolio on a grid; Orabona & Jun 2021, arXiv 2110.14099): the order of the observations plays no part. Capital
    is kept for M candidate means and interpolated between them, never upwards.
    """

    low: float
    high: float
    level: float
    side: Side
    count: int
    total: float  # sum of the observations
    lower: float  # the tightest bounds so far
    upper: float
    log_capital: np.ndarray  # float64 [S, F, M], against the upper and then the lower side, those that `side` names


def begin(low: float, high: float, level: float = 0.95, side: Side = "both") -> ConfidenceSequence:
    """A sequence that has seen nothing: its interval is [low, high].

    Args:
        low: limit that no observation can pass.
        high: the same from above.
        level: confidence, over all intervals of the sequence together.
        side: "both", or the one bound that is wanted, which is tighter then; the other stays at its limit.

    Returns:
        The sequence.

    Raises:
        InputError: low is not below high, a level outside (0, 1), or another side.
    """
    _check(low, high, level)
    if side not in ("both", "upper", "lower"):
        raise InputError(f'side is {side!r}; give "both", "upper" or "lower"')
    shape = (2 if side == "both" else 1, len(_FRACTIONS), len(_PAYOFFS))
    return ConfidenceSequence(low, high, level, side, 0, 0.0, low, high, np.zeros(shape))


def update(sequence: ConfidenceSequence, values: ArrayLike) -> ConfidenceSequence:
    """The sequence after some more values; its bounds have not widened.

    Time grows with N * F * M. Values one by one give the same capital as all at once, and bounds at least as tight,
    because the tightest so far are kept.

    Args:
        sequence: the sequence before them.
        values: [N] or one number.

    Returns:
        The new sequence.

    Raises:
        InputError: values outside [low, high] or not finite.
    """
    low, high = sequence.low, sequence.high
    x = _unit(np.atleast_1d(np.asarray(values, np.float64)), low, high)
    capital = np.array(sequence.log_capital, np.float64)
    for side, seen in zip(capital, _sides(x, sequence.side), strict=True):
        for first in range(0, len(seen), _CHUNK):
            payoff = np.outer(1 - seen[first : first + _CHUNK], _PAYOFFS)
            for bet, fraction in enumerate(_FRACTIONS):
                side[bet] += np.log1p(fraction * (payoff - 1)).sum(axis=0)
    threshold = math.log(len(capital) / (1 - sequence.level))  # both sides share the error
    bounds = [_refuted(side, threshold) for side in capital]
    lower, upper = sequence.lower, sequence.upper
    if sequence.side != "lower":
        upper = min(upper, low + (high - low) * bounds[0])
    if sequence.side != "upper":
        lower = max(lower, high - (high - low) * bounds[-1])
    return dataclasses.replace(
        sequence,
        count=sequence.count + len(x),
        total=sequence.total + float(low * len(x) + (high - low) * x.sum()),
        lower=lower,
        upper=upper,
        log_capital=capital,
    )


def interval(sequence: ConfidenceSequence) -> tuple[float, float]:
    """The bounds: with probability `level` the mean is inside all the intervals of this sequence, from first to last.

    It holds where the mean stays the same, whatever was seen before. If lower passes upper, the mean has changed.

    Args:
        sequence: from `update`.

    Returns:
        The lower and the upper bound.
    """
    return sequence.lower, sequence.upper


def _sides(x: np.ndarray, side: Side) -> list[np.ndarray]:
    """The observations as each side sees them: a lower bound is an upper bound of 1 - x."""
    return {"both": [x, 1 - x], "upper": [x], "lower": [1 - x]}[side]


def _refuted(log_capital: np.ndarray, threshold: float) -> float:
    """The least m in [0, 1] whose capital, averaged over bets, is exp(threshold) or more; log_capital [F, M].

    A bet's log capital is concave in 1 / (1 - m), so linear interpolation does not exceed it.
    """

    def reached(capital: np.ndarray) -> np.ndarray:  # [F, ...]
        return np.logaddexp.reduce(capital, axis=0) - math.log(len(capital)) >= threshold

    at_candidates = reached(log_capital)
    if not at_candidates[-1]:
        return 1.0
    last = int(np.argmax(at_candidates))
    if last == 0:
        return 0.0
    fair, refuted = 0.0, 1.0  # between two candidates
    for _ in range(_HALVINGS):
        middle = (fair + refuted) / 2
        if reached(log_capital[:, last - 1] * (1 - middle) + log_capital[:, last] * middle):
            refuted = middle
        else:
            fair = middle
    return float(1 - 1 / (_PAYOFFS[last - 1] * (1 - refuted) + _PAYOFFS[last] * refuted))


def _log_capital(x: np.ndarray, bets: np.ndarray, m: float) -> float:
    """The largest log capital on the way; no bet takes more than MAX_FRACTION."""
    bets = np.minimum(bets, MAX_FRACTION / (1 - m))
    return float(np.log1p(bets * (m - x)).cumsum().max())


def _bets(x: np.ndarray, level: float) -> np.ndarray:
    """float64 [N]: each from the observations before it, tuned to N (the plug-in bets of Waudby-Smith & Ramdas).

    sqrt(2 log(1 / alpha) / (N variance)); the mean starts as if 1/2 had been seen once, with variance 1/4.
    """
    seen = np.arange(1, len(x) + 1)
    mean = (0.5 + x.cumsum()) / (seen + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum()) / (seen + 1)
    return np.sqrt(-2 * math.log(1 - level) / (len(x) * np.r_[0.25, variance[:-1]]))


def _scaled(values: ArrayLike, low: float, high: float, level: float) -> np.ndarray:
    """float64 [N] in [0, 1]: a sample of two or more."""
    _check(low, high, level)
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"values have shape {values.shape}; give one dimension of two or more observations")
    return _unit(values, low, high)


def _check(low: float, high: float, level: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"low is {low} and high {high}; give finite limits, low below high")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give a probability between 0 and 1, such as 0.95")


def _unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    outside = ~((values >= low) & (values <= high))
    if outside.any():
        raise InputError(f"value {values[outside][0]} is outside [{low}, {high}]; clip the values or widen the limits")
    return np.clip((values - low) / (high - low), 0, 1)
