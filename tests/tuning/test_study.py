"""Searches that are shared, killed and resumed, and the methods on a landscape whose best point is known."""

import importlib.util
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from analysis import command
from tests.tuning import landscape
from tests.tuning.worker import ABOUT, SPACE, attempt
from tuning.points import Point, best
from tuning.space import grid, suggest
from tuning.study import StudyError, check_method, fill, open_study, points, work

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def start(url):
    """`start(method)`: another worker on the study, in a process of its own."""

    def run(method: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, "-m", "tests.tuning.worker", url, method], cwd=ROOT, **pipes)

    return run


def searched(url: str, method: str, trials: int, seed: int = 0) -> list[Point]:
    study = open_study(url, "s", method, ABOUT)
    fill(study, method, SPACE, trials, 3)
    work(study, method, seed, attempt, 0.01)
    return points(study)


def test_a_grid_visits_each_point_once_and_nothing_else(url):
    found = [point.values for point in searched(url, "grid", 18)]
    assert len(found) == 18 and all(found.count(one) == 1 for one in grid(SPACE, 3))
    assert searched(url, "grid", 18) == searched(url, "grid", 18)  # nothing is left to do


def test_two_workers_share_a_grid_without_trying_a_point_twice(url, start):
    study = open_study(url, "s", "grid", ABOUT)
    assert fill(study, "grid", SPACE, None, 3) == 18
    workers = [start("grid"), start("grid")]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert min(output.count("done") for output in outputs) > 0  # both had their share
    tried = [point.values for point in points(study)]
    assert len(tried) == 18 and all(tried.count(one) == 1 for one in grid(SPACE, 3))


def test_a_ticket_is_taken_once_though_two_workers_reach_for_it_at_the_same_moment(url, monkeypatch):
    one, other = (open_study(url, "s", "random", ABOUT) for _ in range(2))
    fill(one, "random", SPACE, 1, 3)
    (trial,) = one.get_trials(deepcopy=False)
    taken, reaching = [], threading.Thread(target=lambda: taken.append(take(other)))

    def take(study):
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)

    def between(*_):
        """The first worker has read that the ticket waits, and has not written yet."""
        if not reaching.ident:
            reaching.start()
            reaching.join(0.3)  # it either takes the ticket by then, or waits for the file

    monkeypatch.setattr(one._storage._backend, "check_trial_is_updatable", between)
    taken.append(take(one))
    reaching.join()
    assert sorted(taken) == [False, True]


def test_a_search_killed_in_a_trial_loses_and_repeats_none_that_was_finished(url, start):
    study = open_study(url, "s", "grid", ABOUT)
    fill(study, "grid", SPACE, None, 2)  # 8 points
    worker = start("grid")
    for line in (*["begun\n", "done\n"] * 3, "begun\n"):
        assert worker.stdout.readline() == line
    time.sleep(0.2)  # in the middle of the fourth trial
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    before = points(study)
    assert 3 <= len(before) < 8
    again = start("grid")  # which finds the lost trial without heartbeat, and waits until it is sure
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    after = points(study)
    assert [point for point in after if point.number <= before[-1].number] == before
    tried = [point.values for point in after]
    assert len(tried) == 8 and all(tried.count(one) == 1 for one in grid(SPACE, 2))


def test_a_trial_whose_worker_died_before_its_first_heartbeat_is_tried_again(url, monkeypatch):
    monkeypatch.setattr("tuning.study.GRACE", 1)
    lost = open_study(url, "s", "random", ABOUT)
    fill(lost, "random", SPACE, 2, 3)
    first = lost.get_trials(deepcopy=False)[0]
    assert lost._storage.set_trial_state_values(first._trial_id, TrialState.RUNNING)  # takes a ticket and does no more
    lost._storage.create_new_trial(lost._study_id)  # of a worker that found no ticket left
    assert len(searched(url, "random", 2)) == 2
    assert lost.get_trials(deepcopy=False)[0].state is TrialState.FAIL


@pytest.mark.parametrize("method", ["random", "tpe", "nsga2"])
def test_a_resumed_search_is_an_unbroken_one(tmp_path, method):
    whole = searched(f"sqlite:///{tmp_path}/whole.db", method, 12, seed=3)
    tries = 0

    def once(trial):
        nonlocal tries
        tries += 1
        if tries == 6:
            raise KeyboardInterrupt
        return attempt(trial)

    interrupted = f"sqlite:///{tmp_path}/interrupted.db"
    study = open_study(interrupted, "s", method, ABOUT)
    fill(study, method, SPACE, 12, 3)
    with pytest.raises(KeyboardInterrupt):
        work(study, method, 3, once, 0.01)
    assert len(points(study)) == 5
    resumed = searched(interrupted, method, 12, seed=3)
    assert [point.values for point in resumed] == [point.values for point in whole]
    assert len({str(point.values) for point in whole}) > 8


def test_other_seeds_search_elsewhere(tmp_path):
    one, other = (searched(f"sqlite:///{tmp_path}/{seed}.db", "tpe", 3, seed) for seed in (0, 1))
    assert [point.values for point in one] != [point.values for point in other]


def test_more_calls_go_on_where_the_search_was_left(url):
    few = searched(url, "tpe", 4)
    more = searched(url, "tpe", 7)
    assert more[:4] == few and len(more) == 7


def test_what_was_found_is_read_back_as_it_was(url):
    (point,) = searched(url, "random", 1)
    assert point.outcome == attempt(optuna.trial.FixedTrial(dict(point.values))).outcome
    assert point.config == attempt(optuna.trial.FixedTrial(dict(point.values))).config


def test_a_study_about_something_else_is_refused(url):
    searched(url, "random", 1)
    with pytest.raises(StudyError, match="another model, data, space or settings; give the same ones"):
        open_study(url, "s", "random", {"model": "another"})


@pytest.mark.parametrize(
    "storage",
    [
        "no-url",
        "postgresql://host:port/database",
        "sqlite:////no/such/folder/study.db",
        "mysql+nodriver://host/database",
        "postgresql://",
    ],
)
def test_a_storage_that_cannot_be_opened_is_said_with_the_mend(storage):
    with pytest.raises(StudyError, match=r"^--storage .*Give the URL of a database"):
        open_study(storage, "s", "random", ABOUT)


@pytest.mark.parametrize("raised", [ValueError, RuntimeError])
def test_a_fault_in_a_trial_ends_the_search_with_its_traceback(url, raised):
    def broken(trial: optuna.Trial) -> Point:
        suggest(SPACE, trial)
        raise raised("operands could not be broadcast together")

    study = open_study(url, "s", "random", ABOUT)
    fill(study, "random", SPACE, 2, 3)
    with pytest.raises(raised, match="broadcast"):
        command.run(lambda: work(study, "random", 0, broken, 0.01))
    assert points(study) == []  # no trial has become a result


def test_a_fault_while_a_storage_is_opened_is_not_a_storage_that_cannot_be_opened(url, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(optuna, "create_study", broken)
    with pytest.raises(TypeError, match="unexpected keyword"):
        open_study(url, "s", "random", ABOUT)


def test_a_grid_larger_than_the_calls_is_refused_before_any_trial(url):
    study = open_study(url, "s", "grid", ABOUT)
    with pytest.raises(StudyError, match="3 values of each of 3 parameters are 18 trials, more than --n_calls 17"):
        fill(study, "grid", SPACE, 17, 3)
    assert study.get_trials() == []
    with pytest.raises(StudyError, match="--n_calls 0: expected at least 1"):
        fill(study, "random", SPACE, 0, 3)
    with pytest.raises(StudyError, match="--grid_points 0: expected at least 1"):
        fill(study, "grid", SPACE, None, 0)


def test_bayesian_search_without_torch_is_refused_with_the_extra_named(monkeypatch):
    check_method("bayesian")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"varjax\[gp\]"):
        check_method("bayesian")
    check_method("tpe")  # needs none


def test_the_front_of_two_objectives_is_searched_without_a_limit(url):
    found = searched(url, "nsga2", 12)
    assert len(found) == 12 and max(point.outcome.degradation for point in found) > 0.01


def test_the_landscapes_best_point_is_where_it_is_said_to_be():
    b, e, w = np.meshgrid(np.linspace(0, 1, 301), np.linspace(0, 1, 301), np.arange(2, 9), indexing="ij")
    speed, loss = np.vectorize(
        lambda b, e, w: landscape.landscape(
            {"loss_budget": 0.001 * 30**b, "entropy_threshold": 0.1 + 1.4 * e, "context_window_size": w}
        )
    )(b[::3, ::3], e[::3, ::3], w[::3, ::3])
    reached = speed[loss <= landscape.LIMIT + 1e-12].max()
    assert reached <= landscape.OPTIMUM + 1e-9 and reached == pytest.approx(landscape.OPTIMUM, rel=2e-3)


@pytest.mark.parametrize(("method", "trials", "seeds"), [("tpe", 40, 3), ("bayesian", 20, 1)])
def test_a_model_of_the_landscape_finds_its_best_point(method, trials, seeds):
    """More of both: `python -m tests.tuning.landscape`."""
    if method == "bayesian":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)  # threads that wait for busy cores take minutes
    found = landscape.reached(method, trials, range(seeds))
    assert np.all(found >= (1 - landscape.NEAR) * landscape.OPTIMUM)
    assert np.median(found) > np.median(landscape.reached("random", trials, range(seeds)))


def test_the_best_of_a_search_keeps_the_limit():
    chosen = best(landscape.search("random", 40, 0), landscape.LIMIT, 3)
    assert len(chosen) == 3 and all(point.outcome.upper <= landscape.LIMIT for point in chosen)


def test_a_storage_that_fails_during_the_search_is_one_error():
    def full(**_: object) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))

    broken = SimpleNamespace(get_trials=full)
    with pytest.raises(StudyError, match=r"study failed \(.*disk is full\); .* run the same command"):
        work(broken, "tpe", 0, lambda trial: None, 0.01)
