"""Phase 5: measure where the time of a call goes, fit a model that predicts it, and find what limits the speed.

  --var_config C --output DIR           C is a policy from phase 2 or 3; without it, one is looked for in results/
  --quick                               measure fewer rounds and fewer kinds of calls

Writes systems.json, .txt, .html and figures into DIR (if --output is a file such as NAME.json: NAME.json and NAME.*).
With --trace, the profiler traces are kept in DIR/traces; view them with `tensorboard --logdir DIR/traces` (pip install
'varjax[tensorboard]').

It answers four questions: what each component of a call costs, as counted here and as reported by XLA; where the time
goes, according to a profiler trace; whether a performance model fitted to some calls predicts others; and what keeps
VAR from being faster. The criteria are a median prediction error under 10%, no bottleneck of high severity, and a time
that grows with the number of tokens as predicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from analysis.command import path_argument, program
from analysis.inputs import CONFIGS, find_config, listed
from analysis.report.files import write_report
from analysis.report.output import Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, summary
from analysis.steps import Steps, finished_steps
from analysis.text import card
from experiments.arguments import arguments_of, asked_config, load, parser
from models import Model
from profiling import bottlenecks, components, performance_model, points, xla
from profiling.timing import drawn_texts
from varjax import VARConfig, VARModel, load_table
from varjax.errors import InputError
from varjax.tablefiles import TableFiles

DECODED = 64  # tokens of the text that decoding goes through, half of them beforehand
NOTES = (
    "All times are from one run on one machine, which the report's JSON names. Compare ratios, not milliseconds.",
    "FAIL is a finding about this model, policy and machine, not an error of the run.",
)


@program
def main(arguments: Sequence[str] | None) -> None:
    options = parser(__doc__, "results/phase5")
    options.set_defaults(num_samples=200)
    options.add_argument(
        "--var_config",
        type=path_argument,
        help="VARConfig as a JSON file; without it, the balanced preset if --routing_stats is given, otherwise the "
        f"first of {listed(CONFIGS)} that exists, otherwise the plain model",
    )
    options.add_argument("--plain", action="store_true", help="analyze the plain model even if a config is found")
    add = options.add_argument
    add("--routing_stats", type=path_argument, help="statistics to use instead of those that the config names")
    add("--answers", type=path_argument, help="answers to use instead of those that the config names")
    add("--split", default="test", help="split of the dataset whose documents are run")
    add("--quick", action="store_true", help="measure fewer rounds and fewer kinds of calls")
    add("--trace", action="store_true", help="keep the profiler traces")
    args = options.parse_args(arguments)
    if args.plain and (args.var_config or args.routing_stats or args.answers):
        options.error("--plain analyzes the plain model; --var_config, --routing_stats and --answers are for VAR")
    # Times are told apart by the names of scopes, which a program cached from another version may lack.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    output = Output.of(args.output, "systems")
    with output.locked():
        _analyze(args, output)


def _analyze(args: argparse.Namespace, output: Output) -> None:
    config, files = _chosen_config(args)
    model, documents, origin = load(args, args.split, args.num_samples)
    table = None if files is None else load_table(model, config, files.routing_stats, files.answers)
    var_model = VARModel(model, config, table)
    texts = {
        "prefill": drawn_texts(documents, args.batch_size, args.max_length, args.seed),
        "decode": drawn_texts(documents, 1, DECODED, args.seed),
    }
    with finished_steps(output, {"arguments": arguments_of(args), **origin, "config": var_model.digest}) as steps:
        found = _measure(args, output, steps, model, var_model, texts)
        made = provenance(seed=args.seed, **origin, config=config, table=files, config_sha256=var_model.digest)
        worst, named = bottlenecks.examine(found.evidence)
        measured = vars(found) | {"bottlenecks": [dataclasses.asdict(one) for one in named]}
        experts = found.evidence[0].experts[1]
        policy = args.var_config or ("preset balanced" if config.enable_var else "none, the plain model")
        facts = (
            ("model", f"{model.name} ({model.dtype.name})"),
            ("policy", f"{policy}: {experts:.2f} of {model.config.top_k} experts per token"),
            ("calls", ", ".join(f"{name} {ids.shape[0]} x {ids.shape[1]}" for name, ids in texts.items())),
            ("device", found.performance.ceilings.device),
            *card.facts(origin["card"]),
        )

        def report() -> Report:
            sections = (
                worst,
                components.section(found.components),
                xla.costs_section(found.costs),
                performance_model.section(found.performance, experts=experts),
                performance_model.scaling_section(found.scaling),
                xla.memory_section(found.memory),
            )
            return Report("Systems analysis", facts, NOTES, sections)

        said = write_report(report, output, extra={"results": measured, "provenance": made})
    print("\n".join(summary(said)))
    print(f"written to {args.output}")


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Everything that was measured, by the names of the result file."""

    components: list[components.Breakdown]
    costs: list[xla.CallCosts]
    performance: performance_model.Study
    scaling: list[performance_model.Scaling]
    memory: list[xla.Peak]
    evidence: list[bottlenecks.Evidence]


def _measure(
    args: argparse.Namespace,
    output: Output,
    steps: Steps,
    model: Model,
    var_model: VARModel,
    texts: Mapping[str, np.ndarray],
) -> _Measured:
    def traced() -> list[components.Breakdown]:
        with tempfile.TemporaryDirectory() as deleted:
            folder = output.other("traces") if args.trace else Path(deleted)
            return components.measure_sides(var_model, texts, folder=folder, turns=4 if args.quick else 15)

    def gathered() -> list[bottlenecks.Evidence]:
        rounds = 5 if args.quick else 11
        known: dict[str, Any] = {"ceilings": study.ceilings, "scalings": scales, "rounds": rounds}
        return bottlenecks.gather(var_model, texts, breakdowns, seed=args.seed, **known)

    _step(1, "components: profiler traces")
    breakdowns = steps.do("components", list[components.Breakdown], traced)
    _step(2, "costs")
    costs = steps.do("costs", list[xla.CallCosts], partial(xla.costs, var_model, texts))
    batch, length = texts["prefill"].shape
    sizes = [] if args.quick else [(1, length), (batch, length // 2), (batch, length), (2 * batch, length)]
    peaks = steps.do("memory", list[xla.Peak], partial(xla.memory, var_model, sizes))
    _step(3, "performance model: calibration and unseen calls")
    timing = {"repeats": 5 if args.quick else 15, "seed": args.seed}
    calls = partial(performance_model.study, model, points.tasks(args.quick), **timing)
    study = steps.do("performance model", performance_model.Study, calls)
    scales = performance_model.scaling(study)
    _step(4, "bottlenecks")
    evidence = steps.do("bottlenecks", list[bottlenecks.Evidence], gathered)
    return _Measured(breakdowns, costs, study, scales, peaks, evidence)


def _chosen_config(args: argparse.Namespace) -> tuple[VARConfig, TableFiles | None]:
    """The policy that is named or in a documented place, with its table's files; or VAR switched off."""
    if args.plain:
        return VARConfig(enable_var=False), None
    if args.routing_stats is None:
        args.var_config = find_config(args.var_config)
    if args.var_config is None and args.routing_stats is None:
        if args.answers is not None:
            raise InputError("--answers needs the config or the statistics that they belong to; name them too")
        print(f"no config is named, and none of {listed(CONFIGS)} exists: this is the plain model")
        return VARConfig(enable_var=False), None
    return asked_config(args)


def _step(number: int, what: str) -> None:
    print(f"[{number}/4] {what}", flush=True)


if __name__ == "__main__":
    main()
