"""Predict how long a call takes from its costs and eight numbers of the machine, which are fitted to measured calls.

    model = fit(points, config, ceilings)
    seconds = predict(model, config, Workload(batch=8, length=1, cached=512), mix)

Letters: N tokens of a call, K slots per token, E experts, L layers, R rows of a block of the expert engine.

A call is the sum of its components (`profiling.costs`, as written). Each takes max(FLOPs / rate, bytes / bandwidth),
plus a price per call, per layer, per block of the experts and per call with a plan:

- A product of R rows runs at `product * R / (R + half_rows)`: its weights are packed for every product, however few
  rows share them. A product of one row packs nothing and is limited by reading its weights, at `weights`.
- The experts run in blocks, whose rows are computed whether they are used or not. The number of blocks follows from the
  rows per expert of the mix (`_expert_blocks`).
- Everything else moves its bytes at `stream`: attention's scores, which are stored between their two products, and the
  outputs of the slots, as often as the engine reads and writes them.

No number may be better than the machine's measured ceiling allows. They are fitted to the logarithm of time, so that a
short call counts as much as a long one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq, least_squares
from scipy.stats import nbinom, poisson

from models.config import MoEConfig
from models.experts_blocks import block_sizes, cut
from profiling.ceilings import Ceilings
from profiling.costs import FLOAT32, Cost, Mix, Workload, component_costs
from profiling.points import Point
from varjax.errors import InputError

_NOISE = 1.25  # how far an effective rate may exceed the interval of a ceiling
_MOVES = 3  # of every slot's output: read, and added to its token's row (read, written)
_PULL = 0.05  # of a parameter toward its start, per e-fold; a point's residual is its error in e-folds


@dataclasses.dataclass(frozen=True)
class PerformanceModel:
    """The numbers of one machine."""

    product: float  # FLOP/s of a matrix product with many rows
    half_rows: float  # rows at which a product reaches half of that
    weights: float  # bytes/s at which products read their arrays
    stream: float  # bytes/s of everything that is not a product
    call: float  # s per call
    layer: float  # s per layer: its small kernels
    block: float  # s per block of an expert: loop, switch, rows gathered and written back
    plan: float  # s per call that plans and commits


PARAMETERS = tuple(field.name for field in dataclasses.fields(PerformanceModel))


def fit(points: Sequence[Point], config: MoEConfig, ceilings: Ceilings) -> PerformanceModel:
    """Fit the model to the logarithm of the times of points by least squares.

    A number that the points say nothing about stays at its start, which the ceilings suggest.

    Args:
        points: measured calls, at least as many as numbers.
        config: the model that was called.
        ceilings: of the machine.

    Returns:
        The fitted numbers.

    Raises:
        InputError: too few points.
    """
    if len(points) < len(PARAMETERS):
        raise InputError(f"{len(points)} points cannot settle {len(PARAMETERS)} numbers; give more of different kinds")
    first = np.log(dataclasses.astuple(_start(ceilings)))
    measured = np.log([point.seconds for point in points])

    def residuals(x: np.ndarray) -> np.ndarray:
        model = PerformanceModel(*np.exp(x))
        times = [predict(model, config, point.workload, point.mix) for point in points]
        return np.concatenate([np.log(times) - measured, _PULL * (x - first)])

    product = _NOISE * max(one.high for one in ceilings.figures if one.kind == "product")
    bandwidth = _NOISE * max(one.high for one in ceilings.figures if one.kind in ("copy", "read"))
    # In the order of PARAMETERS: rates under the ceilings and their noise, overheads under a tenth of a second.
    upper = np.log([product, 4096.0, bandwidth, bandwidth, 0.1, 0.1, 0.1, 0.1])
    found = least_squares(residuals, first, bounds=(np.minimum(first, upper) - 9, upper))
    return PerformanceModel(*np.exp(found.x).tolist())


def predict(model: PerformanceModel, config: MoEConfig, workload: Workload, mix: Mix) -> float:
    """The time of one call.

    Args:
        model: of the machine.
        config: the model that is called.
        workload: the shapes of the call.
        mix: what runs in it.

    Returns:
        Seconds.
    """
    return sum(seconds_by_part(model, config, workload, mix).values())


def seconds_by_part(model: PerformanceModel, config: MoEConfig, workload: Workload, mix: Mix) -> dict[str, float]:
    """The time of each component of a call.

    Args:
        model, config, workload, mix: as in `predict`.

    Returns:
        Seconds by component of `profiling.costs`, and "overhead": what calls and layers cost whatever they compute.
    """
    costs = component_costs(config, workload, mix, as_written=True)
    rows = {"projections": workload.tokens, "gate": workload.tokens, "head": workload.logit_rows}
    parts = {name: cost.bytes / model.stream for name, cost in costs.items()}
    parts |= {name: _product(model, costs[name], number) for name, number in rows.items()}
    parts["scores"] = max(costs["scores"].flops / model.product, parts["scores"])
    slots = config.num_layers * workload.tokens * config.top_k
    parts["dispatch"] = (costs["dispatch"].bytes + _MOVES * slots * config.hidden_size * FLOAT32) / model.stream
    weights = 3 * config.hidden_size * config.intermediate_size
    parts["experts"] = 0.0
    for size, number in _expert_blocks(config, workload, mix):
        moved = workload.itemsize * (weights + size * config.hidden_size) + FLOAT32 * size * config.hidden_size
        one = model.block + _product(model, Cost(2.0 * size * weights, moved), size)
        parts["experts"] += config.num_layers * number * one
    if mix.planned:
        parts["plan"] += model.plan / 2
        parts["commit"] += model.plan / 2
    return parts | {"overhead": model.call + config.num_layers * model.layer}


def _expert_blocks(config: MoEConfig, workload: Workload, mix: Mix) -> list[tuple[int, float]]:
    """How many blocks the engine "blocks" computes for the experts of one layer.

    An expert that is used has at least one row; the number of further rows is Poisson or, where the load is spread
    beyond chance, negative binomial.
    """
    if not mix.experts:
        return []
    if workload.tokens == 1:
        return [(1, mix.experts)]
    sizes = block_sizes(workload.tokens * config.top_k, config.num_experts)
    mean = max(workload.tokens * mix.experts / mix.distinct - 1, 1e-9)
    extra = np.arange(int(mean * (1 + 6 * mix.spread) + 8 * np.sqrt(mean) + 12))
    if mix.spread:
        shape = 1 / mix.spread**2
        chance = nbinom.pmf(extra, shape, shape / (shape + mean))
    else:
        chance = poisson.pmf(extra, mean)
    numbers = cut(1 + extra, sizes)
    return [(size, mix.distinct * float(number @ chance)) for size, number in zip(sizes, numbers, strict=True)]


def speedup(model: PerformanceModel, config: MoEConfig, workload: Workload, experts: float, orders: int = 1) -> float:
    """The predicted time of the plain call over that of VAR, with experts drawn evenly and independently.

    Args:
        model, config, workload: as in `predict`.
        experts: per token and layer under VAR; an answer replaces each of the others.
        orders: context orders that VAR looks up.

    Returns:
        The ratio.
    """
    mixes = Mix.plain(config, workload.tokens), Mix.even(config, workload.tokens, experts, orders)
    plain, var = (predict(model, config, workload, mix) for mix in mixes)
    return plain / var


def break_even(model: PerformanceModel, config: MoEConfig, workload: Workload, orders: int = 1) -> float | None:
    """The number of experts per token and layer below which a call under VAR is faster than the plain one.

    Tokens of one text favor the same experts, so a real batch reads fewer than is assumed here.

    Args:
        model, config, workload, orders: as in `speedup`.

    Returns:
        The number; K if VAR is always faster, None if it is slower even when it runs no expert.
    """

    def gain(experts: float) -> float:
        return speedup(model, config, workload, experts, orders) - 1

    if gain(0.0) <= 0:
        return None
    # Blocks come in whole numbers, so time may step back a little: the first crossing, below which VAR always wins.
    grid = np.linspace(0, float(config.top_k), 41).tolist()
    first = next((experts for experts in grid if gain(experts) <= 0), None)
    return float(config.top_k) if first is None else float(brentq(gain, max(first - grid[1], 0.0), first))


def _product(model: PerformanceModel, cost: Cost, rows: float) -> float:
    share = 1.0 if rows == 1 else rows / (rows + model.half_rows)
    return max(cost.flops / (model.product * share), cost.bytes / model.weights)


def _start(ceilings: Ceilings) -> PerformanceModel:
    """What a program of many parts may reach; a layer has about 20 small kernels, plan and commit about 50."""
    half_rows = ceilings.product / ceilings.best("product", name="decode") * 8
    return PerformanceModel(
        product=ceilings.product / 1.5,
        half_rows=max(half_rows, 1.0),
        weights=ceilings.cache / 1.5,
        stream=ceilings.cache / 3,
        call=ceilings.call,
        layer=20 * ceilings.kernel,
        block=5 * ceilings.kernel,
        plan=50 * ceilings.kernel,
    )
