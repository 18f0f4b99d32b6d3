"""Timing that can be believed: warm-up, finished work, interleaved repeats, paired ratios.

Machines drift, so two things are compared only within one run, round by round: each round times every callable once, in
an order that is drawn anew, and a ratio is taken inside the round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from analysis.resampling import Estimate, median_estimate
from varjax.errors import InputError


def compare(
    callables: Mapping[str, Callable[[], Any]], repeats: int = 15, warmup: int = 2, seed: int = 0
) -> dict[str, np.ndarray]:
    """Seconds of each callable in each round, name -> float64 [repeats].

    Args:
        callables: each returns what it computed, so that it can be waited for.
        repeats: rounds that count.
        warmup: rounds before, which also compile.
        seed: of the order within the rounds.
    """
    if repeats < 1:
        raise InputError(f"repeats={repeats}: expected at least 1")
    rng = np.random.default_rng(seed)
    names = list(callables)
    seconds = {name: np.empty(repeats) for name in names}
    for index in range(-warmup, repeats):
        for position in rng.permutation(len(names)):
            name = names[position]
            start = time.perf_counter()
            jax.block_until_ready(callables[name]())
            if index >= 0:
                seconds[name][index] = time.perf_counter() - start
    return seconds


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray, samples: int = 2000, seed: int = 0) -> Estimate:
    """Median over rounds of numerator / denominator, float64 [repeats] each, with a bootstrap over rounds."""
    return median_estimate(numerator / denominator, samples, seed)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of one ratio or more."""
    found = list(ratios)
    return math.prod(found) ** (1 / len(found))
