"""Phase 3: search for the configuration that is fastest within a limit on quality, and put it to the test.

  --routing_stats S --method bayesian --n_calls 50 --output DIR
                                   search on the tune split; S and the answers next to it are phase 1's
  --validate DIR/best_configs.json --output DIR
                                   certify the best few on the calibrate split, choose the fastest there, and judge that
                                   one on several parts of the test split, next to the presets (a VARConfig does, too)

A search writes into DIR, anew after an interruption too: study.db (of Optuna; `optuna-dashboard sqlite:///DIR/study.db`
shows it), tuning.json, .txt, .html and figures, best_config.json, which 02_evaluate_var.py takes as --var_config, and
best_configs.json for --validate. The same command goes on where it was interrupted. More workers may join a search:
--workers on one machine, or the same command on several with one --storage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.command import path_argument, program, run
from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.losses import Caching, add_caching_arguments
from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import Ladder
from analysis.inputs import STATISTICS, find_statistics, listed
from analysis.report.files import write_report
from analysis.report.output import DIRECTORY, Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, summary
from analysis.text import card
from analysis.text.encoding import Drawn
from experiments.arguments import asked_config, load, load_encoded, new_config, parser, read_answers
from profiling.calls import PHASES
from tuning import chosen
from tuning import report as search_report
from tuning.objective import Objective
from tuning.points import Point, best
from tuning.space import CACHED_TIER, Space, config_at, default_space, only, suggest, with_ranges, without_effect
from tuning.study import METHODS, StudyError, check_method, fill, open_study, points, sqlite_url, without_password, work
from tuning.validation import REPEATS, validate
from tuning.validation_section import section
from varjax.config import PRESETS
from varjax.errors import InputError
from varjax.progress import progress_bar
from varjax.tablefiles import TableFiles, saved_files


@program
def main(arguments: Sequence[str] | None) -> None:
    options = parser(__doc__, "results/phase3")
    options.set_defaults(num_samples=200)
    options.add_argument(
        "--routing_stats",
        type=path_argument,
        help="routing_stats.parquet of phase 1; without it, those of the configs that are given, or the first of "
        f"{listed(STATISTICS)} that exists",
    )
    options.add_argument(
        "--answers",
        type=path_argument,
        help="answers to use, such as distilled ones (default: those next to the statistics)",
    )
    options.add_argument(
        "--var_config", type=path_argument, help="a VARConfig as JSON: what is not searched stays as it is there"
    )
    options.add_argument("--method", choices=METHODS, default="tpe", help="bayesian needs torch (varjax[gp])")
    options.add_argument("--n_calls", type=int, default=50, help="trials in all, those of earlier runs included")
    options.add_argument("--grid_points", type=int, default=3, help="values of each parameter of a grid")
    options.add_argument("--parameters", nargs="+", metavar="NAME", help="search only these; none: all")
    options.add_argument(
        "--range", nargs="+", default=[], dest="ranges", metavar="NAME=LOW:HIGH", help="search elsewhere"
    )
    options.add_argument(
        "--speed",
        choices=["measured", "model"],
        default="measured",
        help="paired timing, or the prediction by active experts, which makes a search repeat exactly",
    )
    options.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="that count, if measured")
    options.add_argument("--repeats", type=int, default=7, help="timed rounds of a trial")
    options.add_argument("--limit", type=float, help="relative change of perplexity; none: the config's")
    options.add_argument("--confidence", type=float, default=0.95, help="of the upper limit, and of the certificate")
    options.add_argument("--storage", help="URL of a database for workers on several machines; none: OUTPUT/study.db")
    options.add_argument("--study_name", default="varjax", help="in the storage")
    options.add_argument("--workers", type=int, default=1, help="processes on this machine")
    options.add_argument(
        "--validate", type=path_argument, metavar="FILE", help="best_configs.json, or a VARConfig as JSON"
    )
    options.add_argument(
        "--validate_repeats", type=int, default=REPEATS, help="number of parts of the test split, each timed separately"
    )
    options.add_argument(
        "--validate_samples", type=int, default=None, help="documents of each split to validate on; none: all"
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
            put_to_the_test(args)
        else:
            search(args)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every worker of a search makes for itself from the arguments."""

    objective: Objective
    space: Space
    orders: tuple[int, ...]  # of the contexts that have answers
    unsearched: dict[str, str]  # parameters that can change nothing on these documents, and why
    files: TableFiles
    about: dict[str, Any]  # whatever decides what a trial finds
    origin: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace, progress: bool = True) -> Setting:
        subject, files, origin = make_subject(args, "tune", args.num_samples, progress)
        orders = tuple(order for order in subject.answers.ngram_orders if order > 0)
        space = with_ranges(default_space(orders, subject.stats.num_experts), args.ranges)
        space = only(space, args.parameters) if args.parameters else space
        seconds = subject.caching.span(subject.documents, subject.max_length, subject.stride)
        unsearched = without_effect(space, seconds)
        space = tuple(one for one in space if one.name not in unsearched)
        if not space:
            raise InputError(
                f"nothing is left to search: {said_of(unsearched)}; give --shared_cache, or other --parameters"
            )
        if CACHED_TIER in unsearched:  # it would only take time
            subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, cache_size=0))
        limit = MAX_DEGRADATION if args.limit is None else args.limit
        judged = {
            "speed": args.speed,
            "phases": tuple(args.phases),
            "repeats": args.repeats,
            "confidence": args.confidence,
            "limit": limit,
        }
        objective = Objective(subject, **judged)
        about = judged | {"subject": subject.digest, "config": subject.config.digest(files.digest()), "space": space}
        about |= {"method": args.method, "seed": args.seed}
        return cls(objective, space, orders, unsearched, files, about, origin)

    @cached_property
    def ladder(self) -> Ladder:
        return self.objective.ladder()

    def attempt(self, trial: Any) -> Point:
        values = suggest(self.space, trial)
        config = config_at(values, self.objective.subject.config, self.ladder, self.orders)
        return Point(trial.number, values, config.to_json(), self.objective.evaluate(config))


def search(args: argparse.Namespace) -> None:
    check_method(args.method)
    name_statistics(args)
    setting = Setting.of(args)
    limit = setting.objective.limit
    if setting.unsearched:
        print(f"not searched: {said_of(setting.unsearched)}")
    study = open_study(storage_of(args), args.study_name, args.method, setting.about)
    total = fill(study, args.method, setting.space, args.n_calls, args.grid_points)
    _ = setting.ladder  # measured, or read back, before there are workers that would all measure it
    if args.workers > 1 and args.speed == "measured":
        print("several workers on one machine disturb each other's timing: give each a device, or take --speed model")
    bar = progress_bar(total=total, initial=len(points(study)), unit="trial", desc=args.method)

    def show() -> None:
        found = points(study)
        bar.n = len(found)
        bar.set_postfix_str(said(found, limit))

    show()
    try:
        if args.workers == 1:
            work(study, args.method, args.seed, setting.attempt, limit, show)
        else:
            with_workers(args, show)
    except KeyboardInterrupt:
        print(f"interrupted after {len(points(study))} of {total} trials; the same command goes on from there")
        raise
    finally:
        bar.close()
        found = points(study)
        if found:
            conclude(args, setting, found)
    if not best(found, limit, 1):
        raise StudyError(
            f"none of {len(found)} trials is within {limit:+.2%}: the least bad are in "
            f"{args.output / 'least_bad_configs.json'}. Give a smaller --range loss_budget, more documents "
            "(--num_samples), or a higher --limit"
        )


def with_workers(args: argparse.Namespace, show: Callable[[], None]) -> None:
    """Processes that share the study; raises StudyError if one of them fails."""
    processes = [multiprocessing.get_context("spawn").Process(target=join, args=(args,)) for _ in range(args.workers)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(1)
        show()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise StudyError(f"{len(failed)} of {args.workers} workers ended in an error, see above; run again to go on")


def join(args: argparse.Namespace) -> None:
    """One worker: the model, the documents and the study once more, then ticket by ticket."""

    def begin() -> None:
        setting = Setting.of(args, progress=False)
        study = open_study(storage_of(args), args.study_name, args.method, setting.about)
        work(study, args.method, args.seed, setting.attempt, setting.objective.limit)

    run(begin)


def conclude(args: argparse.Namespace, setting: Setting, found: list[Point]) -> None:
    """Write what the search found so far."""
    limit = setting.objective.limit
    made = provenance(seed=args.seed, **setting.origin, about=setting.about, storage=without_password(storage_of(args)))
    facts = (
        ("model", f"{setting.objective.subject.model.name} ({args.dtype})"),
        ("data", f"{args.dataset}, split tune, {len(setting.objective.subject.documents):,} documents"),
        ("search", f"{args.method}, {len(found):,} trials, seed {args.seed}"),
        ("cached tier", setting.objective.subject.caching.words),
        *((("not searched", said_of(setting.unsearched)),) if setting.unsearched else ()),
        *card.facts(setting.origin["card"]),
    )
    examined = search_report.examine(found, setting.space, limit, seed=args.seed)
    said_in_full = search_report.report(examined, facts)
    save_report(
        said_in_full, args.output, "tuning", search_report.draw(examined), {"points": found, "provenance": made}
    )
    chosen.write(args.output, found, limit, made, setting.files)


def put_to_the_test(args: argparse.Namespace) -> None:
    candidates, saved = chosen.read(args.validate)
    name_statistics(args, saved)
    calibrate, files, origin = make_subject(args, "calibrate", args.validate_samples)
    args.num_samples = args.validate_samples
    documents, data = load_encoded(calibrate.model, args, "test", args.num_samples)
    test = dataclasses.replace(calibrate, documents=documents)
    presets = {f"preset {name}": new_config(files, **fields) for name, fields in PRESETS.items()}
    limit = MAX_DEGRADATION if args.limit is None else args.limit
    found = validate(
        calibrate,
        test,
        candidates,
        presets,
        repeats=args.validate_repeats,
        level=args.confidence,
        limit=limit,
        drawn=Drawn.of(origin["data"]),
    )
    facts = (
        ("model", f"{calibrate.model.name} ({args.dtype})"),
        ("data", f"{args.dataset}: calibrate {len(calibrate.documents):,} documents, test {len(documents):,}"),
        ("configurations", str(args.validate)),
        ("cached tier", calibrate.caching.words),
        *card.facts(origin["card"]),
    )
    notes = ("Intervals are 95 %, each for itself, over whole documents (speed-ups: over rounds).",)
    said_in_full = Report("Validation of searched configurations", facts, notes, (section(found),))
    made = provenance(seed=args.seed, **origin, test_data=data)
    beside = {"validation": found, "configs": {name: json.loads(c.to_json()) for name, c in candidates.items()}}
    save_report(said_in_full, args.output, "validation", {}, beside | {"provenance": made})


def name_statistics(args: argparse.Namespace, saved: TableFiles | None = None) -> None:
    """If the arguments name no statistics, take those of the saved configs, and the answers with them; else find some.

    Args:
        saved: the files that the candidates of a validation were saved with.

    Raises:
        InputError: the configs name different files, or there are none.
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


def make_subject(
    args: argparse.Namespace, split: str, limit: int | None, progress: bool = True
) -> tuple[Subject, TableFiles, dict[str, Any]]:
    """What is searched or validated on at most `limit` documents of a split, its files, and what is noted of both."""
    args = argparse.Namespace(**vars(args) | {"num_samples": limit})
    model, documents, origin = load(args, split)
    config, files = asked_config(args)
    stats, answers = read_answers(model, files)
    reading: dict[str, Any] = {"batch_size": args.batch_size, "max_length": args.max_length, "seed": args.seed}
    folder = args.output / "losses"
    reading |= {"folder": folder, "progress": progress, "caching": Caching.of(args)}
    reading["table_sha256"] = files.digest()
    return Subject(model, stats, answers, config, documents, **reading), files, origin


def save_report(said_in_full: Report, folder: Path, name: str, figures: Any, beside: dict[str, Any]) -> None:
    write_report(said_in_full, folder, name, figures=figures, beside=beside)
    print("\n".join(summary(said_in_full)))
    print(f"written to {folder}")


def said_of(unsearched: Mapping[str, str]) -> str:
    """What is not searched, and why, for people."""
    return "; ".join(
        f"{', '.join(name for name in unsearched if unsearched[name] == why)}: {why}"
        for why in dict.fromkeys(unsearched.values())
    )


def said(found: list[Point], limit: float) -> str:
    """The best so far, for the progress bar."""
    ahead = best(found, limit, 1)
    if not ahead:
        return "none feasible yet"
    return f"best {ahead[0].outcome.speedup:.2f}x at {ahead[0].outcome.degradation:+.2%}"


def storage_of(args: argparse.Namespace) -> str:
    return args.storage or sqlite_url(args.output / "study.db")


if __name__ == "__main__":
    main()
