"""From how few experts per token on does VAR pay for its own overhead, and how much is there to gain?

Predicted by a `PerformanceModel`, so it holds for the machine that this was calibrated on. Tokens are taken to draw
their experts evenly and independently; those of one text favor the same ones, so a real batch reads fewer.

Letters: N tokens of a call, K experts per token of the plain model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import brentq

from models.config import MoEConfig
from profiling.performance_model import PerformanceModel, predict
from profiling.workload import Mix, Workload


def break_even(
    model: PerformanceModel, config: MoEConfig, workload: Workload, *, orders: int = 1, answered: bool = True
) -> float | None:
    """Experts per token and layer under which a call with VAR is quicker than the plain one; K if it always is.

    Args:
        orders: context orders that VAR looks up.
        answered: answers stand in for the experts that do not run.

    Returns:
        None if not even running no expert at all pays for the overhead.
    """
    plain = predict(model, config, workload, Mix.plain(config, workload.tokens))

    def surplus(experts: float) -> float:
        return predict(model, config, workload, even_mix(config, workload, experts, orders, answered)) - plain

    most = float(config.top_k)
    if surplus(0.0) >= 0:
        return None
    # Blocks come in whole numbers, so time may step back a little: the first crossing, under which VAR always wins.
    grid = np.linspace(0, most, 41)
    losing = [k for k in grid.tolist() if surplus(k) >= 0]
    if not losing:
        return most
    first = losing[0]
    return float(brentq(surplus, max(first - float(grid[1]), 0.0), first))


def speedup(
    model: PerformanceModel,
    config: MoEConfig,
    workload: Workload,
    experts: float,
    *,
    orders: int = 1,
    answered: bool = True,
) -> float:
    """Predicted time of the plain call over that of VAR at `experts` per token and layer."""
    plain = predict(model, config, workload, Mix.plain(config, workload.tokens))
    return plain / predict(model, config, workload, even_mix(config, workload, experts, orders, answered))


def even_mix(config: MoEConfig, workload: Workload, experts: float, orders: int, answered: bool) -> Mix:
    """VAR at `experts` per token and layer, drawn evenly and independently."""
    mix = Mix.even(config, workload.tokens, experts, orders=orders)
    return mix if answered else dataclasses.replace(mix, answers=0.0)
