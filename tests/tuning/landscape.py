"""The search methods on a landscape whose best point is known.

    python -m tests.tuning.landscape [--seeds 20] [--trials 60] [--methods random tpe bayesian]

Speed-up grows with the loss budget b and the entropy threshold e (both scaled to [0, 1]) with diminishing returns, as
it does where the cheapest experts go first; it falls with the distance of the context window from 4 ids:

    speed-up    = 1 + 0.4 sqrt(b) + 0.2 sqrt(e) - 0.0125 |w - 4|
    degradation = limit (b + e) / 0.75

The best feasible point is where the constraint binds and the gradients are parallel: b = 0.6, e = 0.15, w = 4.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
import optuna

from analysis.command import program
from analysis.resampling import Estimate
from tuning.points import PREDICTED, Outcome, Point, best
from tuning.space import Parameter, Space, Values, suggest
from tuning.study import METHODS, Method, check_method, fill, points, work
from varjax.config import VARConfig
from varjax.progress import progress_bar

LIMIT = 0.01
SPACE: Space = (
    Parameter("loss_budget", "float", 0.001, 0.03, log=True),
    Parameter("entropy_threshold", "float", 0.1, 1.5),
    Parameter("context_window_size", "int", 2, 8),
)
OPTIMUM = 1 + 0.4 * math.sqrt(0.6) + 0.2 * math.sqrt(0.15)
NEAR = 0.02  # a search has arrived within this share of the best speed-up


def landscape(values: Values) -> tuple[float, float]:
    """Speed-up and degradation at a point of `SPACE`."""
    b = math.log(values["loss_budget"] / 0.001) / math.log(30)
    e = (values["entropy_threshold"] - 0.1) / 1.4
    speedup = 1 + 0.4 * math.sqrt(b) + 0.2 * math.sqrt(e) - 0.0125 * abs(values["context_window_size"] - 4)
    return speedup, LIMIT * (b + e) / 0.75


def search(method: Method, trials: int, seed: int) -> list[Point]:
    """Every point that a search of so many trials tries."""
    directions = ["maximize", "minimize"] if method == "nsga2" else ["maximize"]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=directions)
    points_of_grid = math.floor(trials ** (1 / len(SPACE)) + 1e-9)
    fill(study, method, SPACE, trials, points_of_grid)

    def attempt(trial: optuna.Trial) -> Point:
        values = suggest(SPACE, trial)
        speedup, loss = landscape(values)
        outcome = Outcome(loss, loss, 1, False, 1.0, 0.0, {PREDICTED: Estimate(speedup, speedup, speedup)}, speedup)
        return Point(trial.number, values, VARConfig(context_window_size=values["context_window_size"]), outcome)

    work(study, method, seed, attempt, LIMIT)
    optuna.logging.set_verbosity(verbosity)
    return points(study)


def reached(method: Method, trials: int, seeds: Sequence[int], progress: bool = False) -> np.ndarray:
    """float64 [seeds]: the speed-up of the best feasible point that each search found; 0 where there was none."""
    found = []
    for seed in progress_bar(seeds, unit="search", desc=method, show=progress):
        ahead = best(search(method, trials, seed), LIMIT, 1)
        found.append(ahead[0].outcome.speedup if ahead else 0.0)
    return np.array(found)


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="searches per method (20)")
    parser.add_argument("--trials", type=int, default=60, help="of each search (60)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["random", "tpe", "bayesian"])
    args = parser.parse_args(arguments)
    for method in args.methods:
        check_method(method)
    print(f"best feasible speed-up: {OPTIMUM:.4f}")
    print(f"{'method':10}{'within 2 %':>12}{'median':>10}{'least':>10}")
    for method in args.methods:
        found = reached(method, args.trials, range(args.seeds), progress=True)
        near = int(np.sum(found >= (1 - NEAR) * OPTIMUM))
        print(f"{method:10}{near:>6} of {args.seeds:<3}{np.median(found):>9.4f}{found.min():>10.4f}", flush=True)


if __name__ == "__main__":
    main()
