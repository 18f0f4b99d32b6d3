"""How long a call takes, from its costs and a few numbers of the machine: fitted to some points, tested on others.

    python -m profiling.performance_model [--repeats 15] [--output results/performance.json]

    model = fit(points, config, ceilings)
    seconds = predict(model, config, Workload(batch=8, length=1, cached=512), mix)

Letters: N tokens of a call, K slots per token, E experts, L layers, R rows of a block of the expert engine.

A call is the sum of its components (`profiling.costs`, as written). Each takes max(FLOPs / rate, bytes / bandwidth),
and on top come a price per call, per layer, per block of the experts and per call with a plan:

- A product of R rows runs at `product * R / (R + half_rows)`: its weights are packed for every product, however few
  rows share them. A product of one row packs nothing and is bound by reading its weights, at `weights`.
- The experts run in blocks, and a block's rows are computed whether they are used or not. How many blocks there are
  follows from the rows per expert that the mix gives (`expert_blocks`).
- Everything else moves its bytes at `stream`: attention's scores, which stand in memory between their two products, and
  the slots' outputs, as often as the engine reads and writes them.

Eight numbers, each with a meaning, each at least zero, none better than the machine's measured ceiling allows. They are
fitted to the logarithm of time, so that a short call counts as much as a long one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import nbinom, poisson

from analysis.command import name_argument, path_argument, program
from analysis.report.output import Output
from analysis.report.provenance import provenance, write_json
from analysis.resampling import median_estimate
from models import Model, load_model
from models.config import MoEConfig
from models.experts_blocks import block_sizes, cut
from profiling.ceilings import Ceilings
from profiling.ceilings import measure as measure_ceilings
from profiling.costs import Cost, component_costs
from profiling.points import Point, Task, measure, tasks
from profiling.workload import FLOAT32, Mix, Workload
from varjax.errors import InputError

TARGET = 0.10  # median relative error on unseen points
NOISE = 1.25  # how far an effective rate may lie above a ceiling's interval
MOVES = 3  # of every slot's output: read, and added to its token's row (read, written)
PULL = 0.05  # of a parameter toward its start, per e-fold; a point's residual is its error in e-folds


@dataclasses.dataclass(frozen=True)
class PerformanceModel:
    """The numbers of one machine."""

    product: float  # FLOP/s of a matrix product with many rows
    half_rows: float  # rows at which a product reaches half of that
    weights: float  # bytes/s at which products take their arrays
    stream: float  # bytes/s of everything that is no product
    call: float  # s per call
    layer: float  # s per layer: its small kernels
    block: float  # s per block of an expert: loop, switch, rows gathered and put back
    plan: float  # s per call that plans and commits


PARAMETERS = tuple(field.name for field in dataclasses.fields(PerformanceModel))


@dataclasses.dataclass(frozen=True)
class PointError:
    """A prediction beside its measurement."""

    point: Point
    predicted: float  # s

    @property
    def relative(self) -> float:
        return self.predicted / self.point.seconds - 1


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors of a set of points."""

    each: tuple[PointError, ...]
    median: float  # of the absolute relative errors
    low: float  # of its 95 % bootstrap interval over points
    high: float
    worst: PointError

    @property
    def passed(self) -> bool:
        return self.median < TARGET


@dataclasses.dataclass(frozen=True)
class Study:
    """A model of one machine, what it was held against, and how far it was off."""

    config: MoEConfig
    ceilings: Ceilings
    model: PerformanceModel
    calibrated: Errors
    unseen: Errors


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="reference", type=name_argument, help="directory, hub id or 'reference' (the default)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds (15)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of the order within rounds (0)")
    parser.add_argument("--output", type=path_argument, help="JSON file to write, or a directory for it")
    args = parser.parse_args(arguments)

    if args.output is None:
        measure_and_print(args)
        return
    output = Output.of(args.output, "performance", (".json",))
    with output.locked():
        write_json(output.main(".json"), measure_and_print(args))


def measure_and_print(args: argparse.Namespace) -> dict[str, Any]:
    """The study, printed; returns what is saved of it."""
    model = load_model(args.model)
    found = study(model, repeats=args.repeats, seed=args.seed)
    print("\n".join([str(found.ceilings), "", "The performance model", *described(found.model), ""]))
    for name, one in (("calibrated", found.calibrated), ("unseen", found.unseen)):
        print(
            f"{name}: {len(one.each)} points, median error {one.median:.1%} [{one.low:.1%}, {one.high:.1%}], "
            f"worst {one.worst.relative:+.1%} at {one.worst.point.name}"
        )
        for each in one.each:
            half = (each.point.high - each.point.low) / 2 / each.point.seconds
            print(
                f"  {each.point.name:48}{each.point.seconds * 1e3:>9.3f} ms ±{half:>4.0%}"
                f"{each.predicted * 1e3:>10.3f} ms{each.relative:>+8.1%}"
            )
    print(f"{'PASS' if found.unseen.passed else 'FAIL'}: median error on unseen points under {TARGET:.0%}")
    return {"provenance": provenance(seed=args.seed, model=model.fingerprint), "study": found}


def study(
    model: Model, wanted: Sequence[Task] | None = None, *, ceilings: Ceilings | None = None, **options: Any
) -> Study:
    """Measures ceilings and points, fits on those that calibrate, and is held against the others.

    Args:
        wanted: None: `points.tasks()`.
        ceilings: of this machine; None: they are measured.
        options: of `points.measure`, such as `repeats` and `seed`.
    """
    wanted = tasks() if wanted is None else wanted
    ceilings = measure_ceilings() if ceilings is None else ceilings
    points = measure(model, wanted, **options)
    known = [point for point, task in zip(points, wanted, strict=True) if task.calibrates]
    unseen = [point for point, task in zip(points, wanted, strict=True) if not task.calibrates]
    fitted = fit(known, model.config, ceilings)
    return Study(
        model.config, ceilings, fitted, errors(fitted, model.config, known), errors(fitted, model.config, unseen)
    )


def fit(points: Sequence[Point], config: MoEConfig, ceilings: Ceilings) -> PerformanceModel:
    """The model that comes nearest to the logarithm of the points' times, by least squares.

    A number that the points say nothing of stays where it starts, at what the ceilings suggest.

    Raises:
        InputError: fewer points than numbers.
    """
    if len(points) < len(PARAMETERS):
        raise InputError(f"{len(points)} points cannot settle {len(PARAMETERS)} numbers; give more of different kinds")
    start, most = _start(ceilings), _most(ceilings)
    first = np.log([getattr(start, name) for name in PARAMETERS])
    measured = np.log([point.seconds for point in points])

    def residuals(x: np.ndarray) -> np.ndarray:
        model = PerformanceModel(*np.exp(x))
        times = [predict(model, config, point.workload, point.mix) for point in points]
        return np.concatenate([np.log(times) - measured, PULL * (x - first)])

    upper = np.log([getattr(most, name) for name in PARAMETERS])
    found = least_squares(residuals, first, bounds=(np.minimum(first, upper) - 9, upper))
    return PerformanceModel(*np.exp(found.x).tolist())


def predict(model: PerformanceModel, config: MoEConfig, workload: Workload, mix: Mix) -> float:
    """Seconds of one call."""
    return sum(seconds_by_part(model, config, workload, mix).values())


def seconds_by_part(model: PerformanceModel, config: MoEConfig, workload: Workload, mix: Mix) -> dict[str, float]:
    """Seconds of each component of `profiling.costs`, and "overhead": what calls and layers cost whatever they do."""
    costs = component_costs(config, workload, mix, as_written=True)
    rows = {"projections": workload.tokens, "gate": workload.tokens}
    rows["head"] = workload.batch if workload.last_logits_only else workload.tokens
    parts = {}
    for name, cost in costs.items():
        if name in rows:
            parts[name] = _product(model, cost, rows[name])
        elif name == "scores":
            parts[name] = max(cost.flops / model.product, cost.bytes / model.stream)
        elif name == "experts":
            parts[name] = _experts(model, config, workload, mix)
        elif name == "dispatch":
            slots = config.num_layers * workload.tokens * config.top_k
            parts[name] = (cost.bytes + MOVES * slots * config.hidden_size * FLOAT32) / model.stream
        else:
            parts[name] = cost.bytes / model.stream
    if mix.planned:
        parts["plan"] += model.plan / 2
        parts["commit"] += model.plan / 2
    parts["overhead"] = model.call + config.num_layers * model.layer
    return parts


def errors(model: PerformanceModel, config: MoEConfig, points: Sequence[Point]) -> Errors:
    """How far the model is off at each point. Raises InputError if there is none."""
    if not points:
        raise InputError("there are no points, so no errors either")
    each = tuple(PointError(point, predict(model, config, point.workload, point.mix)) for point in points)
    absolute = np.array([abs(one.relative) for one in each])
    median = median_estimate(absolute)
    return Errors(each, median.value, median.low, median.high, each[int(absolute.argmax())])


def expert_blocks(config: MoEConfig, workload: Workload, mix: Mix) -> list[tuple[int, float]]:
    """Of one layer: (rows of a block, how many such blocks), on average, in the engine "blocks".

    An expert that is hit has one row at least; how many more it has is a Poisson number, or where the mix says that the
    load is spread beyond chance, a negative binomial one.
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


def described(model: PerformanceModel) -> list[str]:
    """The numbers for people."""
    units = {"product": (1e-9, "GFLOP/s"), "half_rows": (1, "rows")}
    units |= {"weights": (1e-9, "GB/s"), "stream": (1e-9, "GB/s")}
    lines = []
    for name, value in dataclasses.asdict(model).items():
        scale, unit = units.get(name, (1e6, "µs"))
        lines.append(f"  {name:12}{value * scale:>10,.1f} {unit}")
    return lines


def _product(model: PerformanceModel, cost: Cost, rows: float) -> float:
    share = 1.0 if rows == 1 else rows / (rows + model.half_rows)
    return max(cost.flops / (model.product * share), cost.bytes / model.weights)


def _experts(model: PerformanceModel, config: MoEConfig, workload: Workload, mix: Mix) -> float:
    weights = 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for rows, number in expert_blocks(config, workload, mix):
        moved = workload.itemsize * (weights + rows * config.hidden_size) + FLOAT32 * rows * config.hidden_size
        total += number * (model.block + _product(model, Cost(2.0 * rows * weights, moved), rows))
    return config.num_layers * total


def _start(ceilings: Ceilings) -> PerformanceModel:
    """What a program of many parts may hope for; a layer has some twenty small kernels, plan and commit some fifty."""
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


def _most(ceilings: Ceilings) -> PerformanceModel:
    """What no number may exceed: ceilings with their noise; a tenth of a second for any overhead."""
    product = NOISE * max(one.high for one in ceilings.figures if one.kind == "product")
    bandwidth = NOISE * max(one.high for one in ceilings.figures if one.kind in ("copy", "read"))
    return PerformanceModel(product, 4096.0, bandwidth, bandwidth, 0.1, 0.1, 0.1, 0.1)


if __name__ == "__main__":
    main()
