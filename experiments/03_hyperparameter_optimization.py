"""Phase 3: search for the fastest configuration within a quality limit, and validate it.

  --routing_stats S --method bayesian --n_calls 50 --output DIR
                                   search on the tune split; S and the answers next to it come from phase 1
  --validate DIR/best_configs.json --output DIR
                                   certify the best few on the calibrate split, choose the fastest there, and judge that
                                   one on several parts of the test split, next to the presets (also takes a VARConfig)

A search writes these files into DIR: study.db (an Optuna study; view it with `optuna-dashboard
sqlite:///DIR/study.db`), tuning.json, .txt, .html and figures, best_config.json, which 02_evaluate_var.py accepts as
--var_config, and best_configs.json for --validate. Rerun the same command to resume an interrupted search. To add
workers, use --workers on one machine, or run the same command on several machines with one --storage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.command import path_argument, program, run
from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.losses import add_caching_arguments
from analysis.evaluate.points import Subject
from analysis.inputs import find_statistics
from analysis.report.files import write_report
from analysis.report.output import DIRECTORY, Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, summary
from analysis.steps import finished_steps
from analysis.text import card
from analysis.text.encoding import Drawn
from experiments.arguments import (
    add_options,
    add_table,
    arguments_of,
    asked_config,
    load,
    make_subject,
    open_corpus,
    parser,
)
from profiling.calls import PHASES
from tuning.objective import Objective
from tuning.points import Point, best, read_chosen, write_chosen
from tuning.report import report
from tuning.space import CACHED_TIER, reasons, search_space
from tuning.study import METHODS, StudyError, check_method, fill, open_study, points, without_password, work
from tuning.validation import REPEATS, Validation, section, validate
from varjax.config import PRESETS, VARConfig
from varjax.errors import InputError
from varjax.progress import progress_bar
from varjax.tablefiles import TableFiles, saved_files


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    options = parser(__doc__, "results/phase3")
    options.set_defaults(num_samples=200)
    add_table(options, "default settings; parameters that are not searched keep these values")
    options.add_argument(
        "--method", choices=METHODS, default="tpe", help="how trials are chosen; bayesian needs torch (varjax[gp])"
    )
    options.add_argument("--parameters", nargs="+", metavar="NAME", help="parameters to search (default: all)")
    options.add_argument(
        "--range",
        nargs="+",
        default=[],
        dest="ranges",
        metavar="NAME=LOW:HIGH",
        help="ranges that replace the default ones",
    )
    options.add_argument(
        "--speed",
        choices=["measured", "model"],
        default="measured",
        help="measure speed in paired runs, or predict it from the active experts, which makes a search exactly "
        "repeatable",
    )
    options.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="phases to time")
    options.add_argument(
        "--validate", type=path_argument, metavar="FILE", help="best_configs.json or a VARConfig to validate"
    )
    add_options(
        options,
        ("n_calls", int, 50, "number of trials, including those of earlier runs"),
        ("grid_points", int, 3, "number of values per parameter in a grid search"),
        ("repeats", int, 7, "number of timed rounds per trial"),
        ("limit", float, MAX_DEGRADATION, "largest acceptable relative increase in perplexity"),
        ("confidence", float, 0.95, "confidence level of the upper limit and the certificate"),
        ("storage", str, None, "database URL, for workers on several machines (default: OUTPUT/study.db)"),
        ("study_name", str, "varjax", "name of the study in the storage"),
        ("workers", int, 1, "number of worker processes on this machine"),
        ("validate_repeats", int, REPEATS, "number of parts of the test split, each timed separately"),
        ("validate_samples", int, None, "maximum number of documents per split to validate on (default: all)"),
    )
    add_caching_arguments(options)
    args = options.parse_args(arguments)
    if args.workers < 1:
        options.error(f"--workers {args.workers}: expected at least 1")
    output = Output.of(args.output, "validation" if args.validate else "tuning", DIRECTORY)
    # Searches that share a --storage are workers of one search.
    part = f"{platform.node()}-{os.getpid()}" if args.storage and not args.validate else ""
    with output.locked(part):
        if args.validate:
            _validate(args, output)
        else:
            _search(args, output)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What every worker of a search makes for itself from the arguments."""

    objective: Objective
    unsearched: dict[str, str]  # parameters that cannot change anything on these documents, and why
    files: TableFiles
    about: dict[str, Any]  # everything that decides what a trial finds
    origin: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace, progress: bool = True) -> _Setting:
        subject, files, origin = _subject(args, "tune", args.num_samples, progress)
        orders = subject.answers.useful_orders
        span = subject.caching.span(subject.documents, subject.max_length, subject.stride)
        experts, names = subject.stats.num_experts, args.parameters
        space, unsearched = search_space(orders, experts, ranges=args.ranges, names=names, span=span)
        if CACHED_TIER in unsearched:  # it would only take time
            subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, cache_size=0))
        judged = {name: getattr(args, name) for name in ("speed", "repeats", "confidence", "limit")}
        judged["phases"] = tuple(args.phases)
        about = judged | {
            "subject": subject.digest,
            "config": subject.config.digest(subject.table_sha256),
            "space": space,
        }
        about |= {"method": args.method, "seed": args.seed}
        return cls(Objective(subject, space, **judged), unsearched, files, about, origin)


def _search(args: argparse.Namespace, output: Output) -> None:
    check_method(args.method)
    _name_files(args)
    setting = _Setting.of(args)
    objective, limit = setting.objective, args.limit
    if setting.unsearched:
        print(f"not searched: {reasons(setting.unsearched)}")
    study = open_study(_storage(args), args.study_name, args.method, setting.about)
    total = fill(study, args.method, objective.space, args.n_calls, args.grid_points)
    _ = objective.prices  # measured, or read back, before there are workers that would all measure it
    if args.workers > 1 and args.speed == "measured":
        print("several workers on one machine disturb each other's timing: give each a device, or take --speed model")
    bar = progress_bar(total=total, initial=len(points(study)), unit="trial", desc=args.method)

    def show() -> None:
        found = points(study)
        bar.n, ahead = len(found), best(found, limit, 1)
        reached = [f"best {one.outcome.speedup:.2f}x at {one.outcome.degradation:+.2%}" for one in ahead]
        bar.set_postfix_str(reached[0] if reached else "none feasible yet")

    show()
    try:
        if args.workers == 1:
            work(study, args.method, args.seed, objective.attempt, limit, show)
        else:
            _with_workers(args, show)
    except KeyboardInterrupt:
        print(f"interrupted after {len(points(study))} of {total} trials; rerun the same command to resume")
        raise
    finally:
        bar.close()
        found = points(study)
        if found:
            _conclude(args, output, setting, found)
    if not best(found, limit, 1):
        raise StudyError(
            f"none of {len(found)} trials is within {limit:+.2%}: the least bad are in "
            f"{args.output / 'least_bad_configs.json'}. Give a smaller --range loss_budget, more documents "
            "(--num_samples), or a higher --limit"
        )


def _with_workers(args: argparse.Namespace, show: Callable[[], None]) -> None:
    """Start processes that share the study and wait for them."""
    processes = [multiprocessing.get_context("spawn").Process(target=_join, args=(args,)) for _ in range(args.workers)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(1)
        show()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise StudyError(f"{len(failed)} of {args.workers} workers ended in an error, see above; rerun to resume")


def _join(args: argparse.Namespace) -> None:
    """Run one worker, which loads model, documents and study for itself."""

    def begin() -> None:
        setting = _Setting.of(args, progress=False)
        study = open_study(_storage(args), args.study_name, args.method, setting.about)
        work(study, args.method, args.seed, setting.objective.attempt, args.limit)

    run(begin)


def _conclude(args: argparse.Namespace, output: Output, setting: _Setting, found: list[Point]) -> None:
    """Write what the search has found so far."""
    subject = setting.objective.subject
    origin = setting.origin | {"table": setting.files, "storage": without_password(_storage(args))}
    made = provenance(seed=args.seed, **origin, about=setting.about)
    facts = (
        ("model", f"{subject.model.name} ({subject.model.dtype.name})"),
        ("data", f"{args.dataset}, split tune, {len(subject.documents):,} documents"),
        ("search", f"{args.method}, {len(found):,} trials, seed {args.seed}"),
        ("cached tier", subject.caching.words),
        *((("not searched", reasons(setting.unsearched)),) if setting.unsearched else ()),
        *card.facts(setting.origin["card"]),
    )
    trials = [vars(one) | {"config": _fields(one.config)} for one in found]
    write_chosen(args.output, found, args.limit, setting.files, made)
    said = partial(report, found, setting.objective.space, args.limit, facts, seed=args.seed)
    _write(said, output, {"points": trials, "provenance": made})


def _validate(args: argparse.Namespace, output: Output) -> None:
    candidates, saved = read_chosen(args.validate)
    _name_files(args, saved)
    calibrate, files, origin = _subject(args, "calibrate", args.validate_samples)
    corpus = open_corpus(calibrate.model, args, "test", args.validate_samples)
    documents = list(corpus)
    table = (files.routing_stats, files.answers)
    configs = {name: _fields(config) for name, config in candidates.items()}
    run = {"arguments": arguments_of(args), "subject": calibrate.digest, "test_data": corpus.about, "configs": configs}
    with finished_steps(output, run) as steps:
        found = steps.do(
            "validation",
            Validation,
            lambda: validate(
                calibrate,
                dataclasses.replace(calibrate, documents=documents),
                candidates,
                {f"preset {name}": VARConfig.from_routing_stats(*table, **fields) for name, fields in PRESETS.items()},
                repeats=args.validate_repeats,
                level=args.confidence,
                limit=args.limit,
                drawn=Drawn.of(origin["data"]),
            ),
        )
        facts = (
            ("model", f"{calibrate.model.name} ({calibrate.model.dtype.name})"),
            ("data", f"{args.dataset}: calibrate {len(calibrate.documents):,} documents, test {len(documents):,}"),
            ("configurations", str(args.validate)),
            ("cached tier", calibrate.caching.words),
            *card.facts(origin["card"]),
        )
        notes = ("Intervals are 95%, each on its own, over whole documents (speed-ups: over rounds).",)
        made = provenance(seed=args.seed, **origin, table=files, test_data=corpus.about)
        extra = {"validation": found, "configs": configs}
        title = "Validation of searched configurations"
        _write(lambda: Report(title, facts, notes, (section(found),)), output, extra | {"provenance": made})


def _name_files(args: argparse.Namespace, saved: TableFiles | None = None) -> None:
    """Complete the arguments with the files that the configs were saved with, else with statistics that are found.

    `saved` are the files of the candidates of a validation. Raises InputError if the configs name different files.
    """
    if args.routing_stats is not None:
        return
    named = {saved, None if args.var_config is None else saved_files(args.var_config)} - {None}
    if len(named) > 1:
        files = ", ".join(sorted(one.routing_stats for one in named if one))
        raise InputError(f"the configs name different statistics or answers ({files}); give --routing_stats")
    found = next(iter(named), None)
    args.routing_stats = find_statistics(None if found is None else Path(found.routing_stats))
    if args.answers is None and found is not None and found.answers is not None:
        if not Path(found.answers).is_file():
            raise InputError(
                f"{found.answers}: the configs name these answers, but there is no such file; give --answers"
            )
        args.answers = Path(found.answers)


def _subject(
    args: argparse.Namespace, split: str, limit: int | None, progress: bool = True
) -> tuple[Subject, TableFiles, dict[str, Any]]:
    """What is searched or validated, on at most `limit` documents of a split; its files; what a result states."""
    model, documents, origin = load(args, split, limit)
    config, files = asked_config(args)
    kept = {"folder": args.output / "losses", "progress": progress}
    return make_subject(args, model, config, files, documents, **kept), files, origin


def _write(make: Callable[[], Report], output: Output, extra: dict[str, Any]) -> None:
    said = write_report(make, output, extra=extra)
    print("\n".join(summary(said)))
    print(f"written to {output.folder}")


def _fields(config: VARConfig) -> dict[str, Any]:
    return json.loads(config.to_json())


def _storage(args: argparse.Namespace) -> str:
    return args.storage or f"sqlite:///{args.output / 'study.db'}"


if __name__ == "__main__":
    main()
