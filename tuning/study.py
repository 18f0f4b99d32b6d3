"""A search as an Optuna study that several workers may share and that resumes after a kill.

    study = open_study(storage, name, method, about)
    fill(study, method, space, n_calls, grid_points)
    work(study, method, seed, attempt, limit)

Work is handed out as tickets: trials that wait in the storage, with the point that they try (a grid) or without one
(the sampler draws it). A worker takes a ticket by setting its trial to running, which the storage allows one worker
only. So no point of a grid is tried twice (Optuna's own grid sampler may try one twice when workers share it), and
there are exactly as many trials as were asked for. Optuna gives a trial whose worker sends no more heartbeat a new
ticket; that needs its relational storage, because a journal file has no heartbeat.

Each trial has its own sampler, seeded by the study's seed and the number of trials before, so with one worker an
interrupted study continues exactly as it would have without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import TrialState

from analysis.report.provenance import hash_json
from analysis.resampling import Estimate
from tuning.points import Outcome, Point
from tuning.space import Space, grid
from varjax.config import VARConfig
from varjax.errors import InputError

Method = Literal["grid", "random", "tpe", "bayesian", "nsga2"]
METHODS: tuple[Method, ...] = ("grid", "random", "tpe", "bayesian", "nsga2")

HEARTBEAT = 10  # seconds between signs of life of a running trial
GRACE = 60  # seconds without a sign of life after which a trial gets a new ticket
_ABOUT, _TICKET, _OUTCOME, _CONFIG = "about", "ticket", "outcome", "config"  # attributes of the study and its trials

# What a storage that cannot be opened raises: a RuntimeError of Optuna means another version of its tables, an
# ImportError a missing driver, a ValueError a bad port in the URL.
_STORAGE_ERRORS = (
    *(sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError),
    *(ImportError, OSError, RuntimeError, ValueError),
)


class _Storage(optuna.storages.RDBStorage):
    """A database in which every running trial has a heartbeat.

    Optuna sends the first one after a worker has taken a trial, and never gives up a trial without any: a worker killed
    in between would leave its trial running for good, and all others waiting for it.
    """

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state is TrialState.RUNNING:
            self.record_heartbeat(trial_id)
        return super().set_trial_state_values(trial_id, state, values)


class StudyError(InputError):
    """A study that cannot be opened or continued; the message says why and what to do."""


def check_method(method: Method) -> None:
    """Check that the library that a method needs is installed, before a search spends time.

    Args:
        method: how points are chosen.

    Raises:
        StudyError: torch is missing.
    """
    if method == "bayesian" and importlib.util.find_spec("torch") is None:
        raise StudyError(
            "--method bayesian fits a Gaussian process in torch, which is not installed: "
            'pip install "varjax[gp]" (its CPU build will do), or take --method tpe'
        )


def without_password(storage: str) -> str:
    """Make the URL of a storage safe to show.

    Args:
        storage: the URL of a database.

    Returns:
        The URL without its password.
    """
    scheme, _, rest = storage.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.split(':')[0]}{at}{host}" if rest else storage


def open_study(storage: str, name: str, method: Method, about: Mapping[str, Any]) -> optuna.Study:
    """Open a study, or create it if the storage does not have it.

    Args:
        storage: the URL of a database as SQLAlchemy writes it, such as "sqlite:///study.db" or
            "postgresql://user@host/database".
        name: of the study in the storage.
        method: how points are chosen.
        about: everything that decides what a trial finds, as JSON can hold it.

    Returns:
        The study.

    Raises:
        StudyError: the storage cannot be opened, or holds a study of this name about something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    one_file = storage.startswith("sqlite")
    engine: dict[str, Any] = {}
    if one_file:  # opened for each transaction, so nothing is left to be closed
        engine = {"connect_args": {"timeout": 60, "isolation_level": None}, "poolclass": sqlalchemy.NullPool}
    directions = ["maximize", "minimize"] if method == "nsga2" else ["maximize"]  # the second is degradation
    try:
        with _quiet():
            database = _Storage(
                storage,
                engine_kwargs=engine,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
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
            f"{without_password(storage)} holds a study {name!r} with another model, data, space or settings; give the "
            "same ones, another --study_name, or another --output"
        )
    return study


def fill(study: optuna.Study, method: Method, space: Space, n_calls: int | None, grid_points: int) -> int:
    """Write the tickets that are missing.

    Args:
        study: of `open_study`.
        method: how points are chosen.
        space: the parameters.
        n_calls: number of trials including those of earlier runs; of a grid, the most that it may have.
        grid_points: values of each parameter of a grid.

    Returns:
        How many trials the study will have in the end.

    Raises:
        StudyError: the grid is larger than `n_calls`, or there is nothing to do.
    """
    option, number = ("grid_points", grid_points) if method == "grid" else ("n_calls", n_calls)
    if number is None or number < 1:
        raise StudyError(f"--{option} {number}: expected at least 1")
    wanted = grid(space, number) if method == "grid" else [{}] * number
    if n_calls is not None and len(wanted) > n_calls:
        raise StudyError(
            f"{grid_points} values of each of {len(space)} parameters are {len(wanted)} trials, more than "
            f"--n_calls {n_calls}; search fewer --parameters, take fewer --grid_points, or raise --n_calls"
        )
    there = [
        trial.user_attrs[_TICKET]
        for trial in study.get_trials(deepcopy=False)
        if _TICKET in trial.user_attrs and trial.state is not TrialState.FAIL
    ]
    missing = [one for one in wanted if one not in there] if method == "grid" else wanted[len(there) :]
    for point in missing:
        study.enqueue_trial(point, user_attrs={_TICKET: point})
    return len(wanted)


def work(
    study: optuna.Study,
    method: Method,
    seed: int,
    attempt: Callable[[optuna.Trial], Point],
    limit: float,
    on_point: Callable[[], None] = lambda: None,
) -> None:
    """Take tickets until none are left and no other worker's trial is still running.

    Args:
        study: of `open_study`.
        method: how points are chosen.
        seed: of the samplers.
        attempt: lets a trial choose its values and evaluates them.
        limit: on the degradation; the constraint of all methods but "nsga2", which shows the whole front.
        on_point: called after every trial.

    Raises:
        StudyError: the storage can no longer be read or written, for example because the disk is full.
    """

    def objective(trial: optuna.Trial) -> float | tuple[float, float]:
        if _TICKET not in trial.user_attrs:
            raise optuna.TrialPruned("another worker took the last ticket")
        point = attempt(trial)
        trial.set_user_attr(_OUTCOME, dataclasses.asdict(point.outcome))
        trial.set_user_attr(_CONFIG, json.loads(point.config.to_json()))
        if method == "nsga2":
            return point.outcome.speedup, point.outcome.degradation
        trial.set_constraint("degradation", point.outcome.upper - limit)
        return point.outcome.speedup

    try:
        while trials := study.get_trials(deepcopy=False):
            states = [trial.state for trial in trials]
            if TrialState.WAITING in states:
                place = sum(state not in (TrialState.WAITING, TrialState.FAIL) for state in states)
                study.sampler = _sampler(method, [seed, place], len(states))
                study.optimize(objective, n_trials=1)
                on_point()
            elif any(one.state is TrialState.RUNNING and _TICKET in one.user_attrs for one in trials):
                # Another worker's, or one whose worker is gone; without a ticket it has no work to wait for.
                time.sleep(1)
                with _quiet():
                    optuna.storages.fail_stale_trials(study)
            else:
                return
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise StudyError(
            f"the storage of the study failed ({_reason(error.__cause__ or error)}); correct that, for example free "
            "some space, and run the same command again: it resumes the search"
        ) from error


def points(study: optuna.Study) -> list[Point]:
    """Read the finished trials.

    Args:
        study: of `open_study`.

    Returns:
        Their points, by number.
    """
    found = []
    for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        fields = dict(trial.user_attrs[_OUTCOME])
        fields["speedups"] = {phase: Estimate(**one) for phase, one in fields["speedups"].items()}
        config = VARConfig.from_json(json.dumps(trial.user_attrs[_CONFIG]))
        found.append(Point(trial.number, dict(trial.params), config, Outcome(**fields)))
    return found


def _reason(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _begin_writing(connection: sqlalchemy.Connection) -> None:
    """Lock the file before a transaction reads.

    SQLite has no row locks, and Python's driver begins at the first write: two workers could both find a ticket
    waiting, and both take it.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _sampler(method: Method, seeds: list[int], trials: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial; a study of many `trials` gets a larger population."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    with _quiet():
        if method == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_ei_candidates=100)
        if method == "bayesian":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if method == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(8, trials // 6)))
        return optuna.samplers.RandomSampler(seed=seed)  # a grid's tickets leave nothing to draw


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide Optuna's warnings that something may change in a later version; the tests would show it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
