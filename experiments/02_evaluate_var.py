"""Phase 2: evaluate VAR or the plain model on held-out documents, compare, certify, train answers, or run a study.

  --mode baseline                          evaluate the plain model
  --mode var --routing_stats S             evaluate a preset, a --var_config or a policy found by --search_policy
  --compare A.json B.json                  compare two results by the published criteria
  --certify A.json B.json [C.json ...]     bound the loss of B, C, ... relative to A at a confidence level; needs
                                           results on the calibrate split (--split calibrate), those most likely
                                           to pass first
  --mode distill --routing_stats S --var_config C --output DIR
                                           train the answers for a policy, and the maps of affine answers, on the
                                           build split
  --mode study --routing_stats S --var_config C --output DIR
                                           study VAR against simple alternatives at equal loss, the size of its
                                           table, the sources of its error, free generation and throughput by batch
                                           size, or only some of these (--questions)

An evaluation writes NAME.json if --output is NAME.json, or MODE.json if --output is a directory, with a Parquet file of
per-document losses next to it. A comparison or certificate writes a report as NAME.json, NAME.txt and NAME.html; if
--output is a directory, NAME is `comparison` or `certificate`. A study writes study.json, .txt, .html and figures into
a directory, along with the losses of every point as it is scored. Rerun the same command to resume a study or a
distillation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from analysis.checkpoints import Checkpoints, note, resumed
from analysis.command import path_argument, program
from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate import certificate, comparison
from analysis.evaluate import report as evaluation
from analysis.evaluate.certificate import CLIP, TESTS, certify_results
from analysis.evaluate.comparison import read_result
from analysis.evaluate.distillation import DistillConfig, distill
from analysis.evaluate.losses import Caching, Scores, add_caching_arguments, score, var_runner
from analysis.evaluate.nearness import nearness
from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import Search, search
from analysis.inputs import CONFIGS, find_config, find_statistics, listed
from analysis.questions import generation_drift
from analysis.questions.question import Question
from analysis.questions.registry import STUDY_QUESTIONS
from analysis.questions.study import study
from analysis.report.files import write_report
from analysis.report.output import DIRECTORY, REPORT, Output
from analysis.report.provenance import provenance, write_json
from analysis.report.report import summary as overview
from analysis.report.report import text
from analysis.resampling import MIN_DOCUMENTS
from analysis.steps import Steps, finished_steps
from analysis.text import card
from analysis.text.encoding import Encoded
from experiments.arguments import (
    add_hosts,
    add_options,
    add_table,
    arguments_of,
    asked_config,
    join,
    load,
    make_subject,
    open_corpus,
    parser,
)
from models import Model
from profiling.timing import Throughput, by_batch, by_batch_section, measure
from varjax import VARConfig, VARModel, answersfile, checksums, statsfile
from varjax.config import PRESETS
from varjax.errors import InputError
from varjax.files import remove
from varjax.model import load_table
from varjax.step import summary
from varjax.tablefiles import TableFiles


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    distilling, names = DistillConfig(), [*(question.name for question in STUDY_QUESTIONS), "throughput"]
    options = parser(__doc__, "results/phase2")
    options.add_argument("--mode", choices=["baseline", "var", "distill", "study"], help="what to do (see above)")
    add_table(options, "the --preset")
    options.add_argument(
        "--preset", choices=sorted(PRESETS), default="balanced", help="thresholds to use if there is no --var_config"
    )
    options.add_argument(
        "--search_policy",
        action="store_true",
        help="first search the tune split for tolerances of the layers under a loss budget. They replace the policies "
        "of the preset or config, turn the cached tier off, and are written to *.var_config.json",
    )
    options.add_argument("--no_throughput", action="store_true", help="skip the measurement of throughput")
    options.add_argument(
        "--nearness",
        action="store_true",
        help="also measure the divergence from the plain model, and how often both would write the same token",
    )
    options.add_argument("--compare", type=path_argument, nargs=2, metavar=("A", "B"), help="two results to compare")
    options.add_argument(
        "--certify", type=path_argument, nargs="+", metavar="A", help="a baseline result and the results to certify"
    )
    options.add_argument(
        "--testing",
        choices=sorted(TESTS),
        default="fixed_sequence",
        help="procedure for testing several results together",
    )
    options.add_argument(
        "--questions",
        nargs="+",
        choices=names,
        metavar="Q",
        help=f"parts of a study to run: {', '.join(names)} (default: all)",
    )
    add_options(
        options,
        ("tune_samples", int, 120, "number of documents for --search_policy"),
        (
            "budget",
            float,
            None,
            "relative increase in perplexity that --search_policy may use (default: 0.9 times --limit)",
        ),
        ("limit", float, MAX_DEGRADATION, "largest acceptable relative increase in perplexity, also for --certify"),
        ("split", str, "test", "split to score; 'all' for every document"),
        ("stride", int, None, "tokens between the starts of consecutive windows (default: max_length)"),
        ("repeats", int, 15, "number of timed rounds"),
        ("clip", float, CLIP, "value at which a certificate clips each document's loss increase, in nats per token"),
        ("level", float, 0.95, "confidence level of the certificate"),
        ("steps", int, distilling.steps, "number of distillation steps"),
        (
            "learning_rate",
            float,
            distilling.learning_rate,
            "peak learning rate of distillation, relative to the answers and to the maps",
        ),
        (
            "distill_min_count",
            int,
            distilling.min_count,
            "minimum number of occurrences of a key whose answers are distilled",
        ),
        ("prompts", int, 64, "number of texts that a study lets the model continue"),
        ("prompt_tokens", int, 32, "tokens of each text that are given as the prompt"),
        ("new_tokens", int, 64, "tokens to generate for each text"),
    )
    add_caching_arguments(options)
    add_hosts(options)
    args = options.parse_args(arguments)
    if args.num_processes > 1 and not args.coordinator:
        options.error("--num_processes needs --coordinator here: the processes run one evaluation together")
    join(args)
    of_var = ("routing_stats", "answers", "var_config", "search_policy")
    for name in of_var if args.mode == "baseline" else ():
        if getattr(args, name):
            options.error(f"--mode baseline is the plain model; --{name} is for the other modes")
    if args.certify and len(args.certify) < 2:
        options.error("--certify needs a baseline result and at least one of VAR")
    if args.questions and args.mode != "study":
        options.error("--questions is for --mode study")
    if args.questions == ["throughput"] and args.no_throughput:
        options.error("--questions throughput and --no_throughput contradict each other")
    for name in ("prompts", "prompt_tokens", "new_tokens"):
        if getattr(args, name) < 1:
            options.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.limit <= 0:
        options.error(f"--limit {args.limit}: expected more than 0, such as 0.01 for 1 %")
    if not (args.compare or args.certify or args.mode):
        options.error("say what to do: --mode baseline|var|distill|study, --compare A B or --certify A B ...")
    if args.compare:
        name, work = "comparison", _compare
    elif args.certify:
        name, work = "certificate", _certify
    else:
        name, work = args.mode, FOLDERS.get(args.mode, _evaluate)
    output = Output.of(args.output, name, DIRECTORY if name in FOLDERS else REPORT)
    with output.locked():
        work(args, output)


def _compare(args: argparse.Namespace, output: Output) -> None:
    base, other = args.compare
    sides = read_result(base), read_result(other)
    said, fields = comparison.report(*sides)
    write_report(said, output, extra=fields | {"provenance": provenance()})
    print(f"{text(said)}\nwritten to {output.main('.json')}")


def _certify(args: argparse.Namespace, output: Output) -> None:
    base, *others = args.certify
    settings = {name: getattr(args, name) for name in ("clip", "level", "testing", "seed")}
    settings["limit"] = math.log1p(args.limit)
    plain, candidates = read_result(base), {str(path): read_result(path) for path in others}
    found = certify_results(plain, candidates, **settings)
    make = partial(certificate.report, found, card.facts(plain.fields["provenance"].get("card")))
    said = write_report(make, output, extra={"certificate": found, "provenance": provenance(seed=args.seed)})
    print(f"{text(said)}\nwritten to {output.main('.json')}")


def _evaluate(args: argparse.Namespace, output: Output) -> None:
    if args.mode == "var" and args.var_config is None:
        args.routing_stats = find_statistics(args.routing_stats)
    model, documents, origin = load(args, args.split, args.num_samples)
    config, files = _config(args)
    with finished_steps(output, _run(args, origin, config, files)) as steps:
        _evaluate_on(args, output, steps, model, documents, origin, config, files)


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A pass over the documents."""

    scores: Scores
    shares: dict[str, Any] | None  # of the tiers and experts; None: VAR is switched off
    words: str  # the same for people


def _evaluate_on(
    args: argparse.Namespace,
    output: Output,
    steps: Steps,
    model: Model,
    documents: list[Encoded],
    origin: dict[str, Any],
    config: VARConfig,
    files: TableFiles | None,
) -> None:
    config, found = _searched(args, steps, model, config, files)
    caching = Caching.of(args)
    table = None if files is None else load_table(model, config, files.routing_stats, files.answers)
    var_model = VARModel(model, config, table)
    reading: dict[str, Any] = {"batch_size": args.batch_size, "max_length": args.max_length}

    def scored() -> _Scored:
        start = caching.init(var_model, args.batch_size)
        scores, state = score(var_runner(var_model, caching), start, documents, stride=args.stride, **reading)
        if state is None:
            return _Scored(scores, None, "")
        return _Scored(scores, summary(state.counters, model.config.top_k), var_model.summary(state))

    done = steps.do("scores", _Scored, scored)
    kept = output.main(".documents.parquet")
    done.scores.save(kept)
    result: dict[str, Any] = {
        "mode": args.mode,
        **done.scores.summary(),
        "documents_file": kept.name,
        "documents_sha256": checksums.digest_of_file(kept),
        "experts_per_token": float(model.config.top_k),
    }
    if done.shares is not None:
        shown = ("tiers", "hit_rate", "mispredictions", "experts_per_token", "layers")
        result |= {key: done.shares[key] for key in shown}
        result["cached_tier"] = {**vars(caching), "unit": "seconds"} if config.cache_size > 0 else None
        config.save(output.main(".var_config.json"), files)
    if args.nearness and var_model.table is not None:
        near = partial(nearness, model, [var_model], documents, caching, stride=args.stride, **reading)
        result["nearness"] = steps.do("nearness", dict[str, Any], lambda: near()[0].summary(seed=args.seed))
    if not args.no_throughput:
        timing = {"repeats": args.repeats, "seconds_per_token": caching.seconds_per_token}
        timed = partial(measure, var_model, documents, **timing, **reading)
        result["throughput"] = steps.do("throughput", dict[str, Any], timed)
    if found is not None:
        result["policy_search"] = dataclasses.asdict(found) | {"config": None}
    result["provenance"] = provenance(
        seed=args.seed, **origin, config=config, table=files, config_sha256=var_model.digest
    )
    facts = [("model", f"{model.name} ({model.dtype.name})"), ("data", f"{args.dataset}, split {args.split}")]
    if args.mode == "var":
        given = str(args.var_config or f"preset {args.preset}")
        facts.append(("policy", "found under a loss budget" if found else given))
    facts += [*caching.facts(config), *card.facts(origin["card"])]
    searched = {"found": found, "limit": args.limit, "tuned": args.tune_samples}
    said = write_report(partial(evaluation.report, result, done.scores, facts, **searched), output, extra=result)

    perplexity, bits = done.scores.perplexity, done.scores.bits_per_byte
    print(f"{args.mode}: perplexity {perplexity:.3f} per token, {bits:.4f} bits per byte")
    if done.words:
        print(done.words)
    print(*said.notes, sep="\n", end="\n" if said.notes else "")
    print(f"written to {output.main('.json')}")


def _distill(args: argparse.Namespace, output: Output) -> None:
    _find_policy(args)
    model, documents, origin = load(args, "build", args.num_samples)
    config, files = _config(args)
    assert files is not None  # the plain model is another mode
    with finished_steps(output, _run(args, origin, config, files)) as steps:
        config, _ = _searched(args, steps, model, config, files)
        _distill_for(args, output, model, documents, origin, config, files)


def _distill_for(
    args: argparse.Namespace,
    output: Output,
    model: Model,
    documents: list[Encoded],
    origin: dict[str, Any],
    config: VARConfig,
    files: TableFiles,
) -> None:
    subject = make_subject(args, model, config, files, documents)
    reading = (args.batch_size, args.max_length)
    settings = DistillConfig(args.steps, *reading, args.learning_rate, args.distill_min_count, args.seed)
    work = output.other("distil_checkpoints")
    run = {
        "model": origin["model"],
        "data": origin["data"],
        "config": config.digest(files.digest()),
        "settings": vars(settings),
    }
    if resumed(work / "run.json", run) is None:
        note(work / "run.json", run, {})
    saved = Checkpoints(work / "steps")
    done = distill(model, subject.stats, subject.answers, documents, config, settings, checkpoints=saved)
    origin |= {
        "config": json.loads(config.to_json()),
        "table": dataclasses.asdict(files),
        "config_sha256": run["config"],
    }
    made = provenance(seed=args.seed, **origin, settings=vars(settings))
    path = output.other("distilled.answers.safetensors")
    about = {"model": model.name, "fingerprint": model.fingerprint, "provenance": made}
    answersfile.write(path, done.answers, about | {"statistics": statsfile.identity(files.routing_stats)})
    config.save(output.other("var_config.json"), dataclasses.replace(files, answers=str(path)))
    write_json(output.other("distillation.json"), {"divergence": done.divergence, "provenance": made})
    remove(work)
    if len(done.divergence) >= 2 * AVERAGED:
        first, last = done.divergence[:AVERAGED].mean(), done.divergence[-AVERAGED:].mean()
        change = f"{first:.5f} nats per token at the beginning, {last:.5f} at the end"
        print(f"divergence from the full model: {change} (build split)")
    print(f"written to {args.output}")


def _study(args: argparse.Namespace, output: Output) -> None:
    _find_policy(args)
    model, documents, origin = load(args, args.split, args.num_samples)
    config, files = _config(args)
    assert files is not None  # the plain model is another mode
    with finished_steps(output, _run(args, origin, config, files)) as steps:
        config, _ = _searched(args, steps, model, config, files)
        _study_of(args, output, steps, model, documents, origin, config, files)


def _study_of(
    args: argparse.Namespace,
    output: Output,
    steps: Steps,
    model: Model,
    documents: list[Encoded],
    origin: dict[str, Any],
    config: VARConfig,
    files: TableFiles,
) -> None:
    kept = {"stride": args.stride, "folder": output.other("losses")}
    subject = make_subject(args, model, config, files, documents, **kept)
    facts = [
        ("model", f"{model.name} ({model.dtype.name})"),
        ("data", f"{args.dataset}, split {args.split}"),
        ("policy", str(args.var_config or "found on the tune split")),
        ("cached tier, where one is", subject.caching.words),
        *card.facts(origin["card"]),
    ]
    made = provenance(seed=args.seed, **origin, config=config, table=files, config_sha256=config.digest(files.digest()))
    sizes = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens")}
    timed = Question(
        "throughput",
        "How much faster, and where must the gain vanish?",
        partial(_throughput, args.repeats),
        kind=list[Throughput],
        present=lambda found: [by_batch_section(found)],
    )
    known = {question.name: question for question in (*STUDY_QUESTIONS, generation_drift.question(**sizes), timed)}
    asked = [known[name] for name in args.questions or known if not (args.no_throughput and name == timed.name)]
    facts += [("note", warning) for warning in evaluation.flattered({"mode": args.mode, "provenance": made})]
    config.save(output.other("var_config.json"), files)
    said = study(subject, asked, output, steps, facts=facts, provenance=made)
    print("\n".join(overview(said)))
    print(f"written to {args.output}")


def _throughput(repeats: int, subject: Subject) -> list[Throughput]:
    var_model = VARModel(subject.model, subject.config, subject.build(keep_shapes=False))
    reading: dict[str, Any] = {"max_length": subject.max_length, "seed": subject.seed}
    pace = subject.caching.seconds_per_token
    return by_batch(var_model, subject.documents, repeats=repeats, seconds_per_token=pace, **reading)


def _config(args: argparse.Namespace) -> tuple[VARConfig, TableFiles | None]:
    """Make or load the config that is evaluated or that a search starts from, and its table's files."""
    if args.mode == "baseline":
        return VARConfig(enable_var=False), None
    return asked_config(args, **PRESETS[args.preset])


def _run(
    args: argparse.Namespace, origin: Mapping[str, Any], config: VARConfig, files: TableFiles | None
) -> dict[str, Any]:
    """Everything that decides what the steps of a command find."""
    table = None if files is None else files.digest()
    return {"arguments": arguments_of(args), **origin, "config": config.digest(), "table": table}


def _searched(
    args: argparse.Namespace, steps: Steps, model: Model, config: VARConfig, files: TableFiles | None
) -> tuple[VARConfig, Search | None]:
    """The config that a search finds if one is asked for, and the search."""
    if files is None or not args.search_policy:
        return config, None
    tuning = list(open_corpus(model, args, "tune", args.tune_samples))
    if len(tuning) < MIN_DOCUMENTS:
        print(f"only {len(tuning)} tune documents: on other documents the policy may lose far more than its budget")
    budget = 0.9 * args.limit if args.budget is None else args.budget
    subject = make_subject(args, model, config, files, tuning)
    found = steps.do("search", Search, lambda: search(subject, budget=budget))
    return found.config, found


def _find_policy(args: argparse.Namespace) -> None:
    """Complete the arguments with a policy and statistics from the documented places, unless they name some."""
    if not args.search_policy:
        args.var_config = find_config(args.var_config)
        if args.var_config is None:
            raise InputError(
                f"--mode {args.mode} needs a policy: give --var_config or --search_policy (there is none of "
                f"{listed(CONFIGS)})"
            )
    if args.var_config is None:
        args.routing_stats = find_statistics(args.routing_stats)


FOLDERS = {"distill": _distill, "study": _study}
AVERAGED = 10  # first and last steps over which a divergence is averaged

if __name__ == "__main__":
    main()
