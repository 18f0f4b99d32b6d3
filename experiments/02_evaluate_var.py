"""Phase 2: evaluate the plain model or VAR on held-out documents, compare, certify, distil, study.

  --mode baseline                          the plain model
  --mode var --routing_stats S             a preset, a --var_config, or a policy found with --search_policy
  --compare A.json B.json                  two results side by side, with the published criteria
  --certify A.json B.json [C.json ...]     how much loss B, C, ... cost at most over A, with confidence; results of the
                                           calibrate split (--split calibrate), the surest first
  --mode distil --routing_stats S --var_config C --output DIR
                                           train the answers for a policy on the build split
  --mode study --routing_stats S --var_config C --output DIR
                                           VAR against simple alternatives at equal loss, the size of its table, what
                                           its error is made of, free generation, throughput by batch size

An evaluation writes a JSON result, and a Parquet file of per-document losses beside it. A study writes study.json,
.txt, .html and figures into a folder, and the losses of every point as it is scored. Studies and distillations go on
where they were when the same command is given again after a kill.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from analysis.collection.checkpoints import Checkpoints, note, resumed
from analysis.estimators.resampling import MIN_DOCUMENTS
from analysis.evaluation import certificate_report, comparison_report
from analysis.evaluation import report as evaluation_report
from analysis.evaluation.certificate import CLIP, TESTS, certify_results
from analysis.evaluation.comparison import read_result
from analysis.evaluation.quality import batch_clock, score, var_runner
from analysis.policies.distillation import DistilConfig, distil
from analysis.policies.scored_points import Subject
from analysis.policies.search import Search, search
from analysis.reports.files import write_report
from analysis.reports.provenance import provenance, write_json
from analysis.reports.report import summary as overview
from analysis.reports.report import text
from analysis.studies.study import PARTS, Finding, Part, study
from experiments.arguments import asked_config, load, load_encoded, parser, read_answers, run
from experiments.hosts import add_hosts, join
from models import Model
from profiling import throughput_section
from profiling.throughput import by_batch, measure
from varjax import VARConfig, VARModel, answersfile, checksums, statsfile
from varjax.config import PRESETS
from varjax.files import remove
from varjax.model import build_for
from varjax.step import summary


def main() -> None:
    arguments = parser(__doc__, "results/phase2")
    arguments.add_argument("--mode", choices=["baseline", "var", "distil", "study"], help="what to do")
    arguments.add_argument("--routing_stats", type=Path, help="routing_stats.parquet of phase 1")
    arguments.add_argument("--answers", type=Path, help="answers to use, such as distilled ones; none: those beside it")
    arguments.add_argument("--preset", choices=sorted(PRESETS), default="balanced", help="thresholds")
    arguments.add_argument("--var_config", type=Path, help="a VARConfig as JSON; overrides --preset")
    arguments.add_argument(
        "--search_policy",
        action="store_true",
        help="find the layers' tolerances under a loss budget on the tune split first, in the place of the preset's or "
        "the config's policies, without a cached tier; written as *.var_config.json",
    )
    arguments.add_argument("--tune_samples", type=int, default=120, help="documents for --search_policy")
    arguments.add_argument("--budget", type=float, help="of --search_policy, relative loss; none: 0.9 of the config's")
    arguments.add_argument("--split", default="test", help="documents to score; 'all' for every one")
    arguments.add_argument("--stride", type=int, default=None, help="tokens between windows; none: max_length")
    arguments.add_argument("--no_throughput", action="store_true", help="leave the timing out")
    arguments.add_argument("--repeats", type=int, default=15, help="timed repeats of each side")
    arguments.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two results to compare")
    arguments.add_argument("--certify", type=Path, nargs="+", metavar="A", help="a baseline result and some of VAR")
    arguments.add_argument("--clip", type=float, default=CLIP, help="of a document's loss increase, nats per token")
    arguments.add_argument("--level", type=float, default=0.95, help="confidence of the certificate")
    arguments.add_argument("--testing", choices=sorted(TESTS), default="fixed_sequence", help="of several results")
    steps = DistilConfig()
    arguments.add_argument("--steps", type=int, default=steps.steps, help="of distillation")
    arguments.add_argument("--learning_rate", type=float, default=steps.learning_rate, help="of distillation")
    arguments.add_argument(
        "--distil_min_count", type=int, default=steps.min_count, help="occurrences that an answer needs to be trained"
    )
    add_hosts(arguments)
    args = arguments.parse_args()
    if args.num_processes > 1 and not args.coordinator:
        arguments.error("--num_processes needs --coordinator here: the processes run one evaluation together")
    join(args)
    of_var = ("routing_stats", "answers", "var_config", "search_policy")
    for name in of_var if args.mode == "baseline" else ():
        if getattr(args, name):
            arguments.error(f"--mode baseline is the plain model; --{name} is for the other modes")
    if args.compare:
        base, other = args.compare
        compare(base, other, args.output)
    elif args.certify:
        if len(args.certify) < 2:
            arguments.error("--certify needs a baseline result and at least one of VAR")
        certify(args)
    elif args.mode == "var" and not (args.routing_stats or args.var_config):
        arguments.error("--mode var needs --routing_stats (from 01_routing_analysis.py) or --var_config")
    elif args.mode in FOLDERS and not (args.routing_stats and (args.var_config or args.search_policy)):
        arguments.error(f"--mode {args.mode} needs --routing_stats, and --var_config or --search_policy")
    elif args.mode in FOLDERS and args.output.suffix:
        arguments.error(f"--mode {args.mode} writes a folder: give --output a name without {args.output.suffix}")
    elif args.mode in FOLDERS:
        FOLDERS[args.mode](args)
    elif args.mode:
        evaluate(args)
    else:
        arguments.error("say what to do: --mode baseline|var|distil|study, --compare A B or --certify A B ...")


def compare(base: Path, other: Path, output: Path) -> None:
    sides = read_result(base), read_result(other)
    said, fields = comparison_report.report(*sides)
    path = _file(output, "comparison")
    figures = {comparison_report.NAME: comparison_report.figure(*sides)}
    write_report(said, path.parent, path.stem, figures=figures, beside=fields | {"provenance": provenance()})
    print(f"{text(said)}\nwritten to {path}")


def certify(args: argparse.Namespace) -> None:
    base, *others = args.certify
    settings = {"clip": args.clip, "level": args.level, "testing": args.testing, "seed": args.seed}
    candidates = {str(path): read_result(path) for path in others}
    certificate = certify_results(read_result(base), candidates, **settings)
    said = certificate_report.report(certificate)
    path = _file(args.output, "certificate")
    beside = {"certificate": certificate, "provenance": provenance(seed=args.seed)}
    figures = {certificate_report.NAME: certificate_report.figure(certificate)}
    write_report(said, path.parent, path.stem, figures=figures, beside=beside)
    print(f"{text(said)}\nwritten to {path}")


def evaluate(args: argparse.Namespace) -> None:
    output = _file(args.output, args.mode)
    model, documents, origin = load(args, args.split)
    config, found = choose_config(args, model)
    var_model = VARModel(model, config, clock=batch_clock())
    reading = {"batch_size": args.batch_size, "max_length": args.max_length}
    scores, state = score(var_runner(var_model), var_model.init(), documents, stride=args.stride, **reading)

    name = output.stem
    table = output.parent / f"{name}.documents.parquet"
    scores.save(table)
    result: dict[str, Any] = {
        "mode": args.mode,
        **scores.summary(),
        "documents_file": table.name,
        "documents_sha256": checksums.digest_of_file(table),
        "experts_per_token": float(model.config.top_k),
    }
    if state is not None:
        shares = summary(state.counters, model.config.top_k)
        result |= {key: shares[key] for key in ("tiers", "hit_rate", "false_hits", "experts_per_token", "layers")}
        config.save(output.with_suffix(".var_config.json"))
    if not args.no_throughput:
        result["throughput"] = measure(var_model, documents, repeats=args.repeats, **reading)
    if found is not None:
        result["policy_search"] = dataclasses.asdict(found) | {"config": None}
    result["provenance"] = provenance(seed=args.seed, **origin, config=config, config_sha256=config.digest())
    facts = [("model", f"{model.name} ({args.dtype})"), ("data", f"{args.dataset}, split {args.split}")]
    if args.mode == "var":
        given = str(args.var_config or f"preset {args.preset}")
        facts.append(("policy", "found under a loss budget" if found else given))
    drawn = evaluation_report.draw(name, result, found, config.max_quality_degradation, args.tune_samples)
    said = evaluation_report.report(name, result, scores, facts)
    write_report(said, output.parent, name, figures=drawn, beside=result)

    print(f"{args.mode}: perplexity {scores.perplexity:.3f} per token, {scores.bits_per_byte:.4f} bits per byte")
    if state is not None:
        print(var_model.summary(state))
    if args.mode == "var" and args.split not in ("calibrate", "test"):
        print(f"if tables or the policy were made from this dataset, its split {args.split!r} flatters VAR")
    print(f"written to {output}")


def distil_answers(args: argparse.Namespace) -> None:
    model, documents, origin = load(args, "build")
    config, _ = choose_config(args, model)
    stats, answers = read_answers(model, config)
    reading = (args.batch_size, args.max_length)
    settings = DistilConfig(args.steps, *reading, args.learning_rate, args.distil_min_count, args.seed)
    work = args.output / "distil_checkpoints"
    run = {"model": origin["model"], "data": origin["data"], "config": config.digest(), "settings": vars(settings)}
    if resumed(work / "run.json", run) is None:
        note(work / "run.json", run, {})
    with Checkpoints(work / "steps") as saved:
        done = distil(model, stats, answers, documents, config, settings, checkpoints=saved)
    made = provenance(seed=args.seed, **origin, config=json.loads(config.to_json()), settings=vars(settings))
    path = args.output / "distilled.residuals.safetensors"
    assert config.routing_stats is not None  # they were read
    about = {"model": model.name, "fingerprint": model.fingerprint, "provenance": made}
    answersfile.write(path, done.answers, about | {"statistics": statsfile.identity(config.routing_stats)})
    dataclasses.replace(config, residuals=str(path)).save(args.output / "var_config.json")
    write_json(args.output / "distillation.json", {"divergence": done.divergence, "provenance": made})
    remove(work)
    if len(done.divergence) >= 2 * AVERAGED:
        first, last = done.divergence[:AVERAGED].mean(), done.divergence[-AVERAGED:].mean()
        print(f"divergence from the full model: {first:.5f} nats per token at first, {last:.5f} at last (build split)")
    print(f"written to {args.output}")


def study_policy(args: argparse.Namespace) -> None:
    model, documents, origin = load(args, args.split)
    config, _ = choose_config(args, model)
    stats, answers = read_answers(model, config)
    subject = Subject(
        model,
        stats,
        answers,
        config,
        documents,
        batch_size=args.batch_size,
        max_length=args.max_length,
        stride=args.stride,
        folder=args.output / "losses",
        seed=args.seed,
    )
    facts = (
        ("model", f"{model.name} ({args.dtype})"),
        ("data", f"{args.dataset}, split {args.split}"),
        ("policy", str(args.var_config or "found on the tune split")),
    )
    made = provenance(seed=args.seed, **origin, config=config, config_sha256=config.digest())
    timed: tuple[Part, ...] = () if args.no_throughput else (partial(throughput_of, repeats=args.repeats),)
    said = study(subject, args.output, facts=facts, provenance=made, parts=PARTS + timed)
    config.save(args.output / "var_config.json")
    print("\n".join(overview(said)))
    print(f"written to {args.output}")


def throughput_of(subject: Subject, repeats: int) -> Finding:
    """How much faster, and where must the gain vanish?"""
    table = build_for(subject.model, subject.stats, subject.config, subject.answers)
    var_model = VARModel(subject.model, subject.config, table=table)
    found = by_batch(var_model, subject.documents, max_length=subject.max_length, repeats=repeats, seed=subject.seed)
    drawn = {throughput_section.NAME: throughput_section.figure(found)}
    return Finding("throughput", (throughput_section.section(found),), drawn, found)


def choose_config(args: argparse.Namespace, model: Model) -> tuple[VARConfig, Search | None]:
    """The config that the arguments ask for, and the search that found it, if one did."""
    if args.mode == "baseline":
        return VARConfig(enable_var=False), None
    config = asked_config(args, **PRESETS[args.preset])
    if not args.search_policy:
        return config, None
    stats, answers = read_answers(model, config)
    tuning, _ = load_encoded(model, args, "tune", args.tune_samples)
    if len(tuning) < MIN_DOCUMENTS:
        print(f"only {len(tuning)} tune documents: on others the policy may lose far more than its budget")
    reading: dict[str, Any] = {"batch_size": args.batch_size, "max_length": args.max_length}
    found = search(model, stats, answers, tuning, config, budget=args.budget, **reading)
    return found.config, found


def _file(output: Path, name: str) -> Path:
    """`output`, or a JSON file of that name in it where it is a folder."""
    return output if output.suffix == ".json" else output / f"{name}.json"


FOLDERS = {"distil": distil_answers, "study": study_policy}
AVERAGED = 10  # steps, at first and at last, over which a divergence is averaged

if __name__ == "__main__":
    run(main)
