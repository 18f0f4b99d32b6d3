"""A performance model of this machine: fitted to some calls, tested on others, and what it predicts.

    python -m profiling.performance_model [--repeats 15] [--output results/performance.json]

    model = fit(points, config, ceilings)
    seconds = predict(model, config, Workload(batch=8, length=1, cached=512), mix)

Letters: N tokens of a call, K slots per token, E experts, L layers, R rows of a block of the expert engine.

The time of a call is the sum over its components, with their costs as the code performs them (`profiling.costs`). Each
takes max(FLOPs / rate, bytes / bandwidth), plus a fixed cost per call, per layer, per block of the experts and per call
with a plan:

- A product of R rows runs at `product * R / (R + half_rows)`: its weights are packed for every product, however few
  rows share them. A product of one row packs nothing and is limited by reading its weights, at `weights`.
- The experts run in blocks, whose rows are computed whether they are used or not. The number of blocks follows from the
  rows per expert of the mix (`_expert_blocks`).
- Everything else moves its bytes at `stream`: attention's scores, which are stored between their two products, and the
  outputs of the slots, as often as the engine reads and writes them.

No parameter may be better than the machine's measured ceiling allows. The parameters are fitted to the logarithm of
time, so that a short call counts as much as a long one.

The time of a call is not a power of its number of tokens: overheads dominate small calls, and attention grows with the
square of the length. The measured exponent is therefore compared with the exponent of the predicted times of the same
unseen calls.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq, least_squares
from scipy.stats import linregress, nbinom, poisson

from analysis.command import HelpFormatter, name_argument, path_argument, program
from analysis.criteria import MAX_PREDICTION_ERROR
from analysis.report.figures import MARKERS, panels
from analysis.report.output import Output
from analysis.report.provenance import provenance, write_json
from analysis.report.report import Column, Report, ReportFigure, Section, Table, text
from analysis.resampling import median_estimate
from models import Model, load_model
from models.config import MoEConfig
from models.experts_blocks import block_sizes, cut
from profiling import ceilings as ceilings_module
from profiling.ceilings import Ceilings
from profiling.costs import FLOAT32, Cost, Mix, Workload, component_costs, map_products
from profiling.points import Point, Task, measure, tasks
from profiling.published import HARDWARE
from varjax.errors import InputError

_PUBLISHED = "h200"  # drawn next to what was measured
_NO_GAIN = 1.05  # a speed-up below this counts as none
FEWEST = 3  # sizes of calls that an exponent is fitted to
_OFF = 0.15  # by how much an exponent may exceed the expected one
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


@dataclasses.dataclass(frozen=True)
class PointError:
    """A prediction and its measurement."""

    point: Point
    predicted: float  # s

    @property
    def relative(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.point.seconds - 1


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors of a set of points."""

    each: tuple[PointError, ...]
    median: float  # of the absolute relative errors
    low: float  # of its 95% bootstrap interval over points
    high: float
    worst: PointError

    @property
    def passed(self) -> bool:
        """Whether the median meets the published criterion."""
        return self.median < MAX_PREDICTION_ERROR


@dataclasses.dataclass(frozen=True)
class Study:
    """A model of one machine, and how far it was off."""

    config: MoEConfig
    ceilings: Ceilings
    model: PerformanceModel
    calibrated: Errors
    unseen: Errors


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How the time of one phase, plain or under one policy, grows with the tokens of a call."""

    phase: str
    policy: str
    tokens: tuple[int, ...]  # of a call
    measured: tuple[float, ...]  # s
    predicted: tuple[float, ...]  # s
    exponent: float
    error: float  # standard error of the exponent
    expected: float

    @property
    def consistent(self) -> bool:
        """Whether time grows no faster than expected, within a tolerance."""
        return self.exponent - self.expected < _OFF


@program
def main(arguments: Sequence[str] | None) -> None:
    """Calibrate and test the performance model alone, print the result, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="reference", type=name_argument, help="directory, hub id or 'reference'")
    parser.add_argument("--repeats", type=int, default=15, help="number of timed rounds")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the texts and for the order within rounds")
    parser.add_argument("--output", type=path_argument, help="JSON file to write, or a directory for it")
    args = parser.parse_args(arguments)
    if args.output is None:
        _measure_and_print(args, None)
        return
    output = Output.of(args.output, "performance", (".json",))
    with output.locked():
        _measure_and_print(args, output.main(".json"))


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
    return sum(_seconds_by_part(model, config, workload, mix).values())


def study(
    model: Model, wanted: Sequence[Task] | None = None, *, ceilings: Ceilings | None = None, **options: Any
) -> Study:
    """Measure ceilings and points, fit on the points that calibrate, and test on the others.

    Args:
        model: the plain model.
        wanted: the tasks; None: `points.tasks()`.
        ceilings: of this machine; None: they are measured.
        options: of `points.measure`, such as `repeats` and `seed`.

    Returns:
        The fitted model with its errors.
    """
    wanted = tasks() if wanted is None else wanted
    ceilings = ceilings_module.measure() if ceilings is None else ceilings
    points = list(zip(measure(model, wanted, **options), wanted, strict=True))
    known, unseen = ([point for point, task in points if task.calibrates is side] for side in (True, False))
    fitted = fit(known, model.config, ceilings)
    return Study(model.config, ceilings, fitted, *(_errors(fitted, model.config, each) for each in (known, unseen)))


def scaling(found: Study) -> list[Scaling]:
    """Fit exponents to the unseen calls of every phase and policy with enough sizes.

    Args:
        found: from `study`.

    Returns:
        The exponents by phase, those of the plain model first.
    """
    groups: dict[tuple[str, str], list[PointError]] = {}
    for one in found.unseen.each:
        phase, policy = one.point.name.split()[0], one.point.name.partition(", ")[2]
        groups.setdefault((phase, policy), []).append(one)
    fitted = []
    for (phase, policy), here in groups.items():
        here.sort(key=lambda one: one.point.workload.tokens)
        tokens = tuple(one.point.workload.tokens for one in here)
        if len(set(tokens)) >= FEWEST:
            measured, predicted = zip(*((one.point.seconds, one.predicted) for one in here), strict=True)
            line = linregress(np.log(tokens), np.log(measured))
            expected = float(linregress(np.log(tokens), np.log(predicted)).slope)
            exponent = float(line.slope), float(line.stderr), expected
            fitted.append(Scaling(phase, policy, tokens, measured, predicted, *exponent))
    fitted.sort(key=lambda one: (one.phase, one.policy != "plain"))
    return fitted


def section(found: Study, experts: float = 1.0) -> Section:
    """Report the ceilings and the performance model; the criterion is the median error on unseen points.

    Args:
        found: from `study`.
        experts: per token and layer under VAR, for the predicted speed-up.

    Returns:
        The section with its tables and figures.
    """
    unseen = found.unseen
    gains = list(_gains(found, experts))
    none = [f"{phase} at batch {batch}" for phase, batch, _, gain in gains if gain < _NO_GAIN]
    where = "in " + ", ".join(none) if none else "nowhere here"
    numbers = tuple(dataclasses.asdict(found.model).items())
    figures = (
        *(Column("kind"), Column("shape or size"), Column("dtype")),
        *(Column("median", ".4g"), Column("low", ".4g"), Column("high", ".4g")),
    )
    gained = (Column("phase"), Column("batch"), Column("break-even", ".2f"), Column(f"speed-up at {experts:g}", ".2f"))
    points = (
        *(Column("call"), Column("experts", ".2f"), Column("distinct", ".2f"), Column("measured [ms]", ".3f")),
        *(Column("low", ".3f"), Column("high", ".3f"), Column("predicted [ms]", ".3f"), Column("error", "+.1%")),
    )

    def rows(of: Errors) -> tuple[tuple[Any, ...], ...]:
        return tuple(
            (
                *(one.point.name, one.point.mix.experts, one.point.mix.distinct),
                *(1e3 * value for value in (one.point.seconds, one.point.low, one.point.high, one.predicted)),
                one.relative,
            )
            for one in of.each
        )

    return Section(
        "performance_model",
        "Ceilings and performance model",
        "PASS" if unseen.passed else "FAIL",
        f"median error on unseen points < {MAX_PREDICTION_ERROR:.0%}: {unseen.median:.1%} [{unseen.low:.1%}, "
        f"{unseen.high:.1%}] over {len(unseen.each)} points",
        (
            f"{len(numbers)} numbers are fitted to {len(found.calibrated.each)} points (median error there: "
            f"{found.calibrated.median:.1%}). Worst unseen point: {unseen.worst.point.name}, "
            f"{unseen.worst.relative:+.1%}.",
            f"At {experts:g} experts, a gain of less than {_NO_GAIN - 1:.0%} is predicted {where}. Fewer experts than "
            "the break-even are a gain, for tokens that draw their experts evenly and independently.",
        ),
        (
            Table("Ceilings, measured", figures, tuple(dataclasses.astuple(one) for one in found.ceilings.figures)),
            Table("The model's numbers", (Column("name"), Column("value", ".4g")), numbers),
            Table("Break-even in experts per token and layer", gained, tuple(gains)),
            Table("Unseen points", points, rows(unseen)),
            Table("Points that calibrated", points, rows(found.calibrated)),
        ),
        (
            ReportFigure(
                "performance_model",
                "Predicted against measured time",
                "Each marker is one kind of call: the model was calibrated on the hollow ones and has not seen the "
                "filled ones. On the solid line, prediction and measurement are equal; the dotted lines are "
                f"{MAX_PREDICTION_ERROR:.0%} off.",
                "Both axes are logarithmic, so an error of a fifth looks small. The points come from one machine and "
                "one checkpoint.",
                partial(_figure, found),
            ),
            ReportFigure(
                "roofline",
                "Components at their arithmetic intensity",
                "Each marker is a component of a plain call. Horizontal: its operations per byte that it must move; "
                "vertical: its predicted rate. Black lines are this machine's measured ceilings: matrix products, and "
                "the bandwidths of memory (solid) and cache (dashed). Gray: published bfloat16 ceilings of an "
                "accelerator.",
                "The rates are predicted, not timed one by one. Bytes are counted once, whichever cache they come "
                "from. A component far below its ceiling may just have small shapes.",
                partial(_roofline, found),
            ),
        ),
        headline=f"{unseen.median:.1%} median error of predicted times",
    )


def _seconds_by_part(model: PerformanceModel, config: MoEConfig, workload: Workload, mix: Mix) -> dict[str, float]:
    """Seconds by component of `profiling.costs`, and "overhead": the fixed cost of calls and layers."""
    costs = component_costs(config, workload, mix, as_written=True)
    rows = {"projections": workload.tokens, "gate": workload.tokens, "head": workload.logit_rows}
    parts = {name: cost.bytes / model.stream for name, cost in costs.items()}
    parts |= {name: _product(model, costs[name], number) for name, number in rows.items()}
    parts["scores"] = max(costs["scores"].flops / model.product, parts["scores"])
    slots = config.num_layers * workload.tokens * config.top_k
    parts["dispatch"] = (costs["dispatch"].bytes + _MOVES * slots * config.hidden_size * FLOAT32) / model.stream
    moving = map_products(config, workload, mix, as_written=True)
    parts["answers"] += _product(model, moving, workload.tokens) - moving.bytes / model.stream
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


def _speedup(model: PerformanceModel, config: MoEConfig, workload: Workload, experts: float, orders: int = 1) -> float:
    """The predicted time of the plain call over the time under VAR, with experts drawn evenly and independently."""
    mixes = Mix.plain(config, workload.tokens), Mix.even(config, workload.tokens, experts, orders)
    plain, var = (predict(model, config, workload, mix) for mix in mixes)
    return plain / var


def _break_even(model: PerformanceModel, config: MoEConfig, workload: Workload, orders: int = 1) -> float | None:
    """Experts per token and layer below which VAR is faster; K if it always is, None if it never is."""

    def gain(experts: float) -> float:
        return _speedup(model, config, workload, experts, orders) - 1

    if gain(0.0) <= 0:
        return None
    # Blocks come in whole numbers, so time may step back a little: the first crossing, below which VAR always wins.
    grid = np.linspace(0, float(config.top_k), 41).tolist()
    first = next((experts for experts in grid if gain(experts) <= 0), None)
    return float(config.top_k) if first is None else float(brentq(gain, max(first - grid[1], 0.0), first))


def _errors(model: PerformanceModel, config: MoEConfig, points: Sequence[Point]) -> Errors:
    """Compare predictions with measurements."""
    if not points:
        raise InputError("there are no points, so no errors either")
    each = tuple(PointError(point, predict(model, config, point.workload, point.mix)) for point in points)
    absolute = np.array([abs(one.relative) for one in each])
    median = median_estimate(absolute)
    return Errors(each, median.value, median.low, median.high, each[int(absolute.argmax())])


def scaling_section(found: Sequence[Scaling]) -> Section:
    """Report how time grows; the criterion is that it grows no faster than the performance model expects.

    Args:
        found: from `scaling`.

    Returns:
        The section.
    """
    title = "How does time grow with the tokens?"
    if not found:
        return Section("scaling", title, "not measured", f"no kind of call was timed at {FEWEST} sizes")
    off = max(found, key=lambda one: one.exponent - one.expected)
    rows = tuple(
        (
            *(f"{one.phase}, {one.policy}", len(one.tokens), min(one.tokens), max(one.tokens)),
            *(one.exponent, one.error, one.expected),
            *(1e6 * one.measured[end] / one.tokens[end] for end in (0, -1)),
        )
        for one in found
    )
    columns = (
        *(Column("calls"), Column("kinds"), Column("fewest tokens", ",d"), Column("most", ",d")),
        *(Column("exponent", ".2f"), Column("standard error", ".2f"), Column("expected", ".2f")),
        *(Column("µs a token, smallest", ",.1f"), Column("largest", ",.1f")),
    )
    return Section(
        "scaling",
        title,
        "PASS" if all(one.consistent for one in found) else "FAIL",
        f"exponent of time over tokens at most {_OFF} above the expected one: the largest difference is {off.phase}, "
        f"{off.policy}, {off.exponent:.2f} against {off.expected:.2f}",
        ("The expected exponent is fitted to the predicted times of the same calls, all of them unseen.",),
        (Table("Exponents", columns, rows),),
        (
            ReportFigure(
                "scaling",
                "Time of a call by its tokens",
                "Each marker is one kind of call, as measured; the lines are the predictions for the same calls. Along "
                "the dotted line, time is proportional to the number of tokens; where a line is flatter, the cost per "
                "token falls.",
                "Calls that differ in batch size and calls that differ in length are drawn together; attention makes "
                "long ones more expensive.",
                partial(_scaling_figure, found),
            ),
        ),
    )


def _measure_and_print(args: argparse.Namespace, path: Path | None) -> None:
    model = load_model(args.model)
    found = study(model, repeats=args.repeats, seed=args.seed)
    if path is not None:
        write_json(path, {"provenance": provenance(seed=args.seed, model=model.fingerprint), "study": found})
    facts = (("model", model.name), ("device", found.ceilings.device))
    print(text(Report("Performance model", facts, (), (section(found),))))


def _gains(found: Study, experts: float) -> Iterator[tuple[str, int, float | None, float]]:
    """Phase, batch, break-even and predicted speed-up."""
    for phase, batch in product(("decode", "prefill"), (1, 2, 4, 8, 16, 32)):
        call = _decode(found, batch) if phase == "decode" else Workload(batch, 128, itemsize=_itemsize(found))
        at = _break_even(found.model, found.config, call)
        yield phase, batch, at, _speedup(found.model, found.config, call, experts)


def _decode(found: Study, batch: int) -> Workload:
    return Workload(batch, 1, cached=128, last_logits_only=True, itemsize=_itemsize(found))


def _itemsize(found: Study) -> int:
    return found.unseen.worst.point.workload.itemsize


def _figure(found: Study) -> Figure:
    """Predicted against measured time."""
    drawn, (axis,) = panels(1, width=5.2, height=4.2)
    kinds = (("calibrated", found.calibrated, "1"), ("unseen", found.unseen, "0.2"))
    for (name, of, face), (phase, marker) in product(kinds, (("prefill", "o"), ("decode", "s"))):
        here = [one for one in of.each if (one.point.workload.length == 1) == (phase == "decode")]
        seconds, low, high = (
            np.array([(one.point.seconds, one.point.low, one.point.high) for one in here]).reshape(-1, 3).T
        )
        axis.errorbar(
            seconds,
            [one.predicted for one in here],
            xerr=[seconds - low, high - seconds],
            linestyle="",
            marker=marker,
            color="0.2",
            markerfacecolor=face,
            markersize=5,
            elinewidth=0.6,
            label=f"{phase}, {name}",
        )
    every = [one.point.seconds for of in (found.calibrated, found.unseen) for one in of.each]
    ends = np.array([min(every) / 1.5, max(every) * 1.5])
    for factor, line in ((1.0, "-"), (1 - MAX_PREDICTION_ERROR, ":"), (1 + MAX_PREDICTION_ERROR, ":")):
        axis.plot(ends, factor * ends, line, color="0.5", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="measured [s]", ylabel="predicted [s]")
    axis.legend(fontsize="small")
    drawn.tight_layout()
    return drawn


def _roofline(found: Study) -> Figure:
    """Components of a decoding step and of a prefill under the ceilings."""
    drawn, axes = panels(2, width=4.6, sharey=True)
    published = HARDWARE[_PUBLISHED]
    roofs = (
        (found.ceilings.product, found.ceilings.memory, {"color": "0"}),
        (found.ceilings.product, found.ceilings.cache, {"color": "0", "linestyle": "--"}),
        (published.flops, published.bandwidth, {"color": "0.7"}),
    )
    intensity = np.logspace(-2, 4, 200)
    calls = {"decode, batch 1": _decode(found, 1), "prefill, 8 x 256": Workload(8, 256, itemsize=_itemsize(found))}
    for axis, (title, workload) in zip(axes, calls.items(), strict=True):
        mix = Mix.plain(found.config, workload.tokens)
        costs = component_costs(found.config, workload, mix)
        seconds = _seconds_by_part(found.model, found.config, workload, mix)
        for flops, bandwidth, look in roofs:
            axis.plot(intensity, np.minimum(flops, intensity * bandwidth), linewidth=1, **look)
        shown = [name for name, cost in costs.items() if cost.flops and cost.bytes and seconds[name]]
        for index, name in enumerate(shown):
            at = costs[name].flops / costs[name].bytes, costs[name].flops / seconds[name]
            look = {"linestyle": "", "color": str(0.15 + 0.5 * index / len(shown)), "label": name}
            axis.plot(*at, marker=MARKERS[index % len(MARKERS)], **look)
        axis.set(title=title, xscale="log", yscale="log")
    axes[0].set(ylabel="FLOP/s")
    axes[-1].legend(fontsize="x-small", loc="lower right")
    drawn.supxlabel("FLOPs per byte")
    drawn.tight_layout()
    return drawn


def _scaling_figure(found: Sequence[Scaling]) -> Figure:
    phases = list(dict.fromkeys(one.phase for one in found))
    drawn, axes = panels(len(phases))
    for axis, phase in zip(axes, phases, strict=True):
        for index, one in enumerate(one for one in found if one.phase == phase):
            gray = str(0.6 * index / max(len(found) - 1, 1))
            axis.plot(one.tokens, np.multiply(1e3, one.measured), MARKERS[index], color=gray, label=one.policy)
            axis.plot(one.tokens, np.multiply(1e3, one.predicted), color=gray, linewidth=0.8)
            if index == 0:
                proportional = one.measured[0] / one.tokens[0] * np.array(one.tokens)
                axis.plot(one.tokens, 1e3 * proportional, ":", color="0.5")
        axis.set(xscale="log", yscale="log", xlabel="tokens of a call", title=phase)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("time of a call [ms]")
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    main()
