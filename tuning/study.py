"""A search as an Optuna study that any number of workers may share, and that goes on where it was left.

    study = open_study(storage, name, method, about)
    fill(study, method, space, n_calls, grid_points)
    work(study, method, seed, attempt, limit)

Work is handed out by tickets: trials that wait in the storage, with the point that they are to try (a grid) or without
one (the sampler draws it). A worker takes a ticket by setting its trial to running, which the storage lets one worker
do; so no point of a grid is tried twice, and there are as many trials as were asked for. `fill` writes the tickets
that are missing, also after a kill. A trial whose worker is gone shows no more heartbeat, and its point is tried anew.

Each trial has a sampler of its own, seeded by the study's seed and how many came before: with one worker a study that
was interrupted goes on as it would have. (Optuna's samplers read what is finished from the storage; the Gaussian
process is fitted anew every time.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import TrialState

from analysis.report.provenance import hash_json
from analysis.resampling import Estimate
from tuning.points import Outcome, Point
from tuning.space import Space, grid
from varjax.errors import InputError

Method = Literal["grid", "random", "tpe", "bayesian", "nsga2"]
METHODS: tuple[Method, ...] = ("grid", "random", "tpe", "bayesian", "nsga2")

HEARTBEAT, GRACE = 10, 60  # seconds: between signs of life of a running trial; without one until it counts as gone
# Attributes of a study and of its trials.
_ABOUT, _TICKET, _OUTCOME, _CONFIG = "about", "ticket", "outcome", "config"


# What a storage that cannot be opened raises; Optuna says with a RuntimeError that it is of another version, and a
# driver that is not installed is an ImportError.
_STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, RuntimeError)


class StudyError(InputError):
    """A study that cannot be opened or continued; says why, and what to do."""


def check_method(method: Method) -> None:
    """Raises StudyError where a method lacks its library: better now than in the middle of the search."""
    if method == "bayesian" and importlib.util.find_spec("torch") is None:
        raise StudyError(
            "--method bayesian fits a Gaussian process in torch, which is not installed: "
            'pip install "varjax[gp]" (its CPU build will do), or take --method tpe'
        )


def sqlite_url(path: Path) -> str:
    """The storage that is one file."""
    return f"sqlite:///{path}"


def without_password(storage: str) -> str:
    """The URL as it may be shown."""
    scheme, _, rest = storage.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.split(':')[0]}{at}{host}" if rest else storage


def open_study(
    storage: str,
    name: str,
    method: Method,
    about: Mapping[str, Any],
    *,
    heartbeat: int = HEARTBEAT,
    grace: int = GRACE,
) -> optuna.Study:
    """The study of that name, begun now or found in the storage.

    Args:
        storage: URL of a database as SQLAlchemy writes it, such as "sqlite:///study.db" or
            "postgresql://user@host/database".
        about: whatever decides what a trial finds, as JSON can hold it; a study goes on only with the same.
        heartbeat: seconds between two signs of life of a trial.
        grace: seconds without one after which it is tried anew.

    Raises:
        StudyError: the storage cannot be opened, or holds a study of this name about something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    one_file = storage.startswith("sqlite")
    engine: dict[str, Any] = {}
    if one_file:  # opened for each transaction, so nothing is left to be closed when the study is let go of
        engine = {"connect_args": {"timeout": 60, "isolation_level": None}, "poolclass": sqlalchemy.NullPool}
    directions = ["maximize", "minimize"] if method == "nsga2" else ["maximize"]  # the second: degradation
    try:
        _check_url(storage)
        with _quiet():
            database = optuna.storages.RDBStorage(
                storage,
                engine_kwargs=engine,
                heartbeat_interval=heartbeat,
                grace_period=grace,
                heartbeat_stale_trial_callback=_try_again,
            )
        if one_file:
            sqlalchemy.event.listen(database.engine, "begin", _begin_writing)
        study = optuna.create_study(storage=database, study_name=name, directions=directions, load_if_exists=True)
    except _STORAGE_ERRORS as error:
        raise StudyError(
            f"--storage {without_password(storage)}: {_reason(error)}. Give the URL of a database that can be reached, "
            "such as sqlite:///study.db or postgresql://user:password@host/database, and install its driver"
        ) from error
    digest = hash_json(about)
    known = study.user_attrs.get(_ABOUT)
    if known is None:
        study.set_user_attr(_ABOUT, digest)
    elif known != digest:
        raise StudyError(
            f"{storage} holds a study {name!r} with another model, data, space or settings; give the same ones, "
            "another --study_name, or another --output"
        )
    return study


def fill(study: optuna.Study, method: Method, space: Space, n_calls: int | None, grid_points: int) -> int:
    """Write the tickets that are missing; returns how many trials the study will have in the end.

    Args:
        n_calls: trials in all, those of earlier runs included; of a grid, the most that it may have.
        grid_points: values of each parameter of a grid.

    Raises:
        StudyError: the grid is larger than `n_calls`, or there is nothing to do.
    """
    if method == "grid":
        if grid_points < 1:
            raise StudyError(f"--grid_points {grid_points}: expected at least 1")
        wanted = grid(space, grid_points)
        if n_calls is not None and len(wanted) > n_calls:
            raise StudyError(
                f"{grid_points} values of each of {len(space)} parameters are {len(wanted)} trials, more than "
                f"--n_calls {n_calls}; search fewer --parameters, take fewer --grid_points, or raise --n_calls"
            )
    else:
        if n_calls is None or n_calls < 1:
            raise StudyError(f"--n_calls {n_calls}: expected at least 1")
        wanted = [{}] * n_calls
    alive = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if _TICKET in trial.user_attrs and trial.state is not TrialState.FAIL
    ]
    there = {_place(trial.user_attrs[_TICKET]) for trial in alive}
    missing = [one for one in wanted if _place(one) not in there] if method == "grid" else wanted[len(alive) :]
    for point in missing:
        study.enqueue_trial(point, user_attrs={_TICKET: point})
    return len(wanted)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Errors of the storage as one of ours."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise StudyError(
            f"the storage of the study failed ({_reason(error.__cause__ or error)}); correct that, for example free "
            "some space, and run the same command again: it goes on where it was"
        ) from error


@_storage_errors()
def work(
    study: optuna.Study,
    method: Method,
    seed: int,
    attempt: Callable[[optuna.Trial], Point],
    limit: float,
    on_point: Callable[[], None] = lambda: None,
) -> None:
    """Take tickets until there are none, and no other worker's trial is still running.

    Args:
        attempt: suggests the values of a trial and finds out what they are worth.
        limit: on the degradation; the constraint of all methods but "nsga2", which shows the whole front.
        on_point: called after every trial.

    Raises:
        StudyError: the storage cannot be read or written any more, such as on a full disk.
    """

    def objective(trial: optuna.Trial) -> float | tuple[float, float]:
        if _TICKET not in trial.user_attrs:
            raise optuna.TrialPruned("another worker took the last ticket")
        point = attempt(trial)
        trial.set_user_attr(_OUTCOME, dataclasses.asdict(point.outcome))
        trial.set_user_attr(_CONFIG, point.config)
        if method == "nsga2":
            return point.outcome.speedup, point.outcome.degradation
        trial.set_constraint("degradation", point.outcome.upper - limit)
        return point.outcome.speedup

    while True:
        trials = study.get_trials(deepcopy=False)
        states = [trial.state for trial in trials]
        if TrialState.WAITING in states:
            place = sum(state not in (TrialState.WAITING, TrialState.FAIL) for state in states)
            study.sampler = _sampler(method, _seed(seed, place), len(trials))
            study.optimize(objective, n_trials=1)
            on_point()
        elif TrialState.RUNNING in states:  # another worker's, or one whose worker is gone
            time.sleep(1)
            with _quiet():
                optuna.storages.fail_stale_trials(study)
        else:
            return


def points(study: optuna.Study) -> list[Point]:
    """Every trial that was finished, by number."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state is TrialState.COMPLETE:
            fields = dict(trial.user_attrs[_OUTCOME])
            speedups = {phase: Estimate(**one) for phase, one in fields.pop("speedups").items()}
            outcome = Outcome(**fields, speedups=speedups)
            found.append(Point(trial.number, dict(trial.params), trial.user_attrs[_CONFIG], outcome))
    return found


def _reason(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_url(storage: str) -> None:
    """Raises an error of SQLAlchemy if this is not a database URL; a bad port would be a plain ValueError."""
    try:
        sqlalchemy.make_url(storage)
    except ValueError as error:
        raise sqlalchemy.exc.ArgumentError(str(error)) from error


def _begin_writing(connection: sqlalchemy.Connection) -> None:
    """Lock the file before a transaction reads.

    SQLite knows no row locks, and Python's driver begins at the first write: two workers could both find a ticket
    waiting, and both take it.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _sampler(method: Method, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    with _quiet():
        if method == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_ei_candidates=100)
        if method == "bayesian":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if method == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(8, trials // 6)))
        return optuna.samplers.RandomSampler(seed=seed)  # a grid's tickets leave nothing to draw


def _seed(seed: int, place: int) -> int:
    """Of the sampler that draws the study's trial at this place."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that something may change in a later version: the tests would tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _place(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _try_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """A new ticket for the point of a trial whose worker is gone."""
    ticket = trial.user_attrs.get(_TICKET)
    if ticket is not None:
        study.enqueue_trial(trial.params or ticket, user_attrs={_TICKET: ticket})
