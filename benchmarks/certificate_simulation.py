"""Does the certificate's bound hold? Simulates calibrations from populations whose mean is known.

    python -m benchmarks.certificate_simulation --repeats 2000

Coverage: how often the true clipped mean is above the bound, and how far above the sample's mean the bound is, compared
with the textbook one-sided t-interval. Family-wise error: how often any of nine configurations slightly worse than the
limit is certified together with three good ones.
"""

# Letters: N documents, K configurations.

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import special

from analysis.command import HelpFormatter, program
from analysis.evaluate.certificate import CLIP, LIMIT, TESTS
from analysis.resampling import allowed
from varjax.bounds import p_value, upper_bound

LEVEL = 0.95
SIZES = (50, 200, 1000)
METHODS = ("betting", "bernstein", "t-interval")

GOOD = (0.0, 0.002, 0.004)  # nats per token, true mean increases
BAD = (1.01 * LIMIT,) * 9

Quantile = Callable[[np.ndarray], np.ndarray]  # probabilities to nats per token

POPULATIONS: Mapping[str, Quantile] = {
    "normal": lambda u: 0.005 + 0.02 * special.ndtri(u),
    "heavy-tailed": lambda u: 0.005 + 0.01 * special.stdtrit(2, u),  # Student's t with 2 degrees: no variance
    "skewed": lambda u: 0.008 * np.exp(1.2 * special.ndtri(u)) - 0.01,
    "constant": lambda u: np.full(u.shape, 0.004),
    "rare disaster": lambda u: np.where(u > 0.99, CLIP, 0.0),  # one document in a hundred
}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The bounds of one population and sample size, by method."""

    failures: dict[str, float]  # share of calibrations whose bound is below the true mean
    widths: dict[str, float]  # bound minus the sample's mean, nats per token, mean over calibrations


@dataclasses.dataclass(frozen=True)
class FamilyWise:
    """The errors at one sample size, by procedure."""

    errors: dict[str, float]  # share of calibrations that certify any bad configuration
    found: dict[str, float]  # good configurations that are certified, mean number


@program
def main(arguments: Sequence[str] | None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    options.add_argument("--repeats", type=int, default=2000, help="number of simulated calibrations per row")
    options.add_argument("--seed", type=int, default=0, help="random seed")
    args = options.parse_args(arguments)
    rng = np.random.default_rng(args.seed)

    print(
        f"{args.repeats:,} calibrations a line at {LEVEL:.0%}, clip {CLIP} nats per token; at most "
        f"{allowed(args.repeats, 1 - LEVEL):.2%} may fail (5% and three standard errors)\n"
    )
    print(f"{'':22}{'failures':^33}{'width, 0.001 nats per token':^33}")
    print(f"{'population':16}{'N':>6}" + "".join(f"{name:>11}" for name in METHODS * 2))
    for name, quantile in POPULATIONS.items():
        for size in SIZES:
            result = coverage(quantile, size, args.repeats, rng)
            failures = "".join(f"{result.failures[method]:>11.2%}" for method in METHODS)
            widths = "".join(f"{1000 * result.widths[method]:>11.2f}" for method in METHODS)
            print(f"{name:16}{size:>6}{failures}{widths}", flush=True)

    print(
        f"\nAny of {len(BAD)} bad configurations certified (mean 1% above the limit), and how many of {len(GOOD)} good"
    )
    print(f"{'procedure':22}" + "".join(f"{f'N = {size}':>20}" for size in SIZES))
    results = [family_wise(size, args.repeats, rng) for size in SIZES]
    for name in results[0].errors:
        print(f"{name:22}" + "".join(f"{one.errors[name]:>12.2%}{one.found[name]:>8.2f}" for one in results))


def coverage(quantile: Quantile, size: int, repeats: int, rng: np.random.Generator) -> Coverage:
    """Compute the bounds of many samples.

    Args:
        quantile: of the population.
        size: documents of a sample.
        repeats: samples.
        rng: draws them.

    Returns:
        How often the bounds fail, and their widths.
    """
    truth = _clipped_mean(quantile)
    x = np.clip(quantile(rng.random((repeats, size))), -CLIP, CLIP)
    means = x.mean(axis=1)
    bounds = {
        "betting": np.array([upper_bound(row, -CLIP, CLIP, LEVEL) for row in x]),
        "bernstein": np.minimum(_bernstein(x), CLIP),
        "t-interval": means + _student(size) * x.std(axis=1, ddof=1) / math.sqrt(size),
    }
    below = {name: bound < truth - 1e-12 for name, bound in bounds.items()}  # equal but for rounding is no failure
    return Coverage(
        failures={name: float(failed.mean()) for name, failed in below.items()},
        widths={name: float((bound - means).mean()) for name, bound in bounds.items()},
    )


def _bernstein(x: np.ndarray) -> np.ndarray:
    """Empirical Bernstein bounds of the rows of x (Maurer & Pontil 2009, theorem 4)."""
    number, confidence = x.shape[1], math.log(2 / (1 - LEVEL))
    spread = np.sqrt(2 * x.var(axis=1, ddof=1) * confidence / number)
    return x.mean(axis=1) + spread + 2 * CLIP * 7 * confidence / (3 * (number - 1))


def family_wise(
    size: int, repeats: int, rng: np.random.Generator, good: Sequence[float] = GOOD, bad: Sequence[float] = BAD
) -> FamilyWise:
    """Count what the procedures certify, where losses are skewed and correlated between configurations.

    The fixed sequence is in the order of the means of as many other documents. Two wrong procedures for comparison:
    every mean below the limit, and every betting bound below it, uncorrected.

    Args:
        size: documents of a sample.
        repeats: samples.
        rng: draws them.
        good: true mean increases of the good configurations, nats per token.
        bad: of the bad ones.

    Returns:
        The errors and the findings.
    """
    means = np.array([*good, *bad])
    certified: dict[str, list[set[int]]] = {}
    for _ in range(repeats):
        tuning, x = _correlated(means, size, rng), _correlated(means, size, rng)
        order = np.argsort(tuning.mean(axis=1), kind="stable")
        p = np.array([p_value(x[k], LIMIT, -CLIP, CLIP, LEVEL) for k in order])
        found: dict[str, set[int]] = {name: set(order[corrected(p) <= 1 - LEVEL]) for name, corrected in TESTS.items()}
        found["each bound alone"] = set(order[p <= 1 - LEVEL])
        found["mean below the limit"] = set(np.flatnonzero(x.mean(axis=1) <= LIMIT))
        for name, names in found.items():
            certified.setdefault(name, []).append(names)
    is_bad = set(range(len(good), len(means)))
    return FamilyWise(
        errors={name: float(np.mean([bool(one & is_bad) for one in sets])) for name, sets in certified.items()},
        found={name: float(np.mean([len(one - is_bad) for one in sets])) for name, sets in certified.items()},
    )


def _clipped_mean(quantile: Quantile, points: int = 1_000_000) -> float:
    """The population's mean of the clipped loss, by the midpoint rule."""
    return float(np.clip(quantile((np.arange(points) + 0.5) / points), -CLIP, CLIP).mean())


def _correlated(means: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [K, N] within [-CLIP, CLIP] with exactly these means; half of the variance is shared."""
    cap = 7.0
    normal = (rng.standard_normal(size) + rng.standard_normal((len(means), size))) / math.sqrt(2)
    center = math.exp(0.5) * special.ndtr(math.log(cap) - 1) + cap * special.ndtr(-math.log(cap))
    return means[:, None] + 0.02 * (np.minimum(np.exp(normal), cap) - center)


def _student(size: int) -> float:
    return float(special.stdtrit(size - 1, LEVEL))


if __name__ == "__main__":
    main()
