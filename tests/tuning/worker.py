"""A worker of a shared search in a process of its own, `python -m tests.tuning.worker URL METHOD`.

Each trial takes a while, so that the process can be killed in the middle of one.
"""

import sys
import time

import optuna

from analysis.resampling import Estimate
from tuning import study
from tuning.points import PREDICTED, Outcome, Point
from tuning.space import Parameter, Space, suggest
from varjax.config import VARConfig

SPACE: Space = (
    Parameter("frequency_threshold", "int", 10, 200, log=True),
    Parameter("entropy_threshold", "float", 0.1, 1.5),
    Parameter("cached_tier", "bool"),
)
ABOUT = {"model": "tiny"}
LIMIT = 0.01


def attempt(trial: optuna.Trial) -> Point:
    values = suggest(SPACE, trial)
    speedup = 1 + values["entropy_threshold"] / 10 - 0.1 * values["cached_tier"]
    loss = values["entropy_threshold"] / 100
    outcome = Outcome(loss, loss, 1, False, 1.0, 0.0, {PREDICTED: Estimate(speedup, speedup, speedup)}, speedup)
    config = VARConfig(frequency_threshold=values["frequency_threshold"], entropy_threshold=values["entropy_threshold"])
    return Point(trial.number, values, config, outcome)


def slowly(trial: optuna.Trial) -> Point:
    print("begun", flush=True)
    found = attempt(trial)
    time.sleep(0.4)
    return found


if __name__ == "__main__":
    _, url, method = sys.argv
    study.HEARTBEAT, study.GRACE = 1, 3
    opened = study.open_study(url, "s", method, ABOUT)
    study.work(opened, method, 0, slowly, LIMIT, lambda: print("done", flush=True))
