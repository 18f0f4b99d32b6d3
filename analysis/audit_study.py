"""Does the audit keep quiet where nothing is wrong, and how soon does it notice what is?

    python -m analysis.audit_study --routing_stats results/phase1/routing_stats.parquet --output results/audit.json

Calibrates on documents of the split `calibrate` and lets held-out documents of `test` come in, many times in random
order: once as they are, then with planted faults. Each document is run once per fault; the repeats only reorder what
was observed, so they share their documents. The cached tier is off, because what it has learned depends on the order.
Writes a JSON file, and beside it the report that is printed, as text and as a page with its figure.

Letters: N documents, M streams (`varjax.drift`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.audits import report as audit_report
from analysis.audits.auditing import calibrate_from, passages, streams_of, tally_documents, until_drift
from analysis.audits.faults import faults, random_texts
from analysis.command import name_argument, path_argument, program
from analysis.evaluate.quality import score, var_runner
from analysis.inputs import STATISTICS, find_statistics, listed, table_files
from analysis.report.files import write_output
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import provenance
from analysis.report.report import text
from analysis.text import card
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.encoding import Encoded
from models import Model, load_model
from varjax import LayerPolicy, VARConfig, VARModel, load_table
from varjax.drift import ALPHA, Calibration, Tally, observe
from varjax.errors import InputError
from varjax.progress import progress_bar
from varjax.step import summary
from varjax.tablefiles import TableFiles


class Situation(NamedTuple):
    """What runs, and on which documents."""

    var_model: VARModel
    documents: Sequence[Encoded]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one situation looked like."""

    tally: Tally  # of each document
    harm: float  # nats per token that VAR loses against the plain model
    experts_per_token: float  # that VAR ran per token and layer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One situation over all its repeats."""

    name: str
    documents: int  # of the situation
    harm: float | None  # nats per token
    error: float  # mean over documents, all layers together; so are the next two
    agreement: float
    open: float
    repeats: int
    noticed: int  # of the repeats; where nothing is wrong, false alarms
    median: float | None  # documents until drift was declared, over the repeats where it was
    longest: int | None
    first: Mapping[str, int]  # in how many repeats the first drift was in this signal


@program
def main(arguments: Sequence[str] | None) -> None:
    args = parser().parse_args(arguments)
    output = Output.of(args.output, "audit")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    args.routing_stats = find_statistics(args.routing_stats)
    model = load_model(args.model)
    checked = card.announced(model, args.dataset)
    config, files = chosen_config(args)
    var_model = VARModel(model, config, load_table(model, config, files.routing_stats, files.answers))
    reading = {"batch_size": args.batch_size, "max_length": args.max_length}

    print("calibration", file=sys.stderr)
    known = documents(model, args.dataset, "calibrate", args.num_samples)
    sums, _ = tally_documents(var_model, known, args.share, seed=args.seed, **reading)
    calibration = calibrate_from(observe(sums, streams_of(var_model)), var_model, args.share)
    saved = output.main(".calibration.json")
    calibration.save(saved)
    seen = {}
    for name, situation in situations(args, model, var_model).items():
        print(name, file=sys.stderr)
        seen[name] = look_at(situation, args.share, args.seed, **reading)

    outcomes = judge(seen, calibration, sums, var_model, args)
    top_k, same = model.config.top_k, seen["same domain"]
    pairs = model.config.num_layers * same.tally.tokens.sum()
    runs = {"var": same.experts_per_token, "audit": float(top_k * same.tally.audited.sum() / pairs)}
    said = audit_report.report(outcomes, calibration, runs, card.facts(checked))
    beside = {
        "outcomes": outcomes,
        "expert_runs_per_token_and_layer": runs,
        "false_alarm_probability": ALPHA,
        "calibration_file": saved.name,
        "provenance": provenance(
            seed=args.seed,
            model={"name": model.name, "fingerprint": model.fingerprint},
            card=checked,
            data={"dataset": args.dataset, "calibrate": len(known), "foreign": args.foreign},
            config=var_model.config,
            table=files,
            config_sha256=var_model.digest,
        ),
    }
    figures = {audit_report.NAME: audit_report.figure(outcomes)}
    write_output(said, output, figures=figures, beside=beside)
    print(text(said))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="reference", type=name_argument, help="directory, hub id, or 'reference'")
    made.add_argument(
        "--routing_stats",
        type=path_argument,
        help=f"routing_stats.parquet of phase 1; without it, the first of {listed(STATISTICS)} that exists",
    )
    made.add_argument(
        "--var_config", type=path_argument, help="a VARConfig as JSON; none: one expert and a residual row"
    )
    made.add_argument("--dataset", default="embedded", type=name_argument, help="what the statistics were collected on")
    made.add_argument(
        "--foreign", type=name_argument, nargs="*", default=[], help="texts of another kind, such as a .txt file"
    )
    made.add_argument("--num_samples", type=int, default=1000, help="documents to calibrate on, and to monitor")
    made.add_argument("--fault_samples", type=int, default=300, help="documents under each planted fault")
    made.add_argument("--share", type=float, default=0.05, help="of the planned tokens that is computed in full")
    made.add_argument("--repeats", type=int, default=200, help="orders in which the documents come in")
    made.add_argument("--batch_size", type=int, default=8, help="sequences per batch at max_length")
    made.add_argument("--max_length", type=int, default=256, help="tokens per window")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=path_argument, default=Path("results/audit.json"), help=OUTPUT_HELP)
    return made


def chosen_config(args: argparse.Namespace) -> tuple[VARConfig, TableFiles]:
    """--var_config, or a policy under which nearly every key answers; no cached tier. And the table's files."""
    files = table_files(args.routing_stats, var_config=args.var_config)
    if args.var_config:
        return dataclasses.replace(VARConfig.load(args.var_config), cache_size=0), files
    policy = LayerPolicy(experts_kept=1, use_answers=True, ngram_orders=(1, 2))
    return VARConfig(frequency_threshold=5, entropy_threshold=3.0, cache_size=0, default=policy), files


def documents(model: Model, dataset: str, split: str | None, limit: int) -> list[Encoded]:
    return list(EncodedCorpus(dataset, split, limit, model.tokenizer, model.config))


def situations(args: argparse.Namespace, model: Model, var_model: VARModel) -> dict[str, Situation]:
    """Nothing wrong first, then every fault of the model, then other texts."""
    held_out = documents(model, args.dataset, "test", args.num_samples)
    some = held_out[: args.fault_samples]
    found = {"same domain": Situation(var_model, held_out)}
    found |= {name: Situation(faulty, some) for name, faulty in faults(var_model, args.seed).items()}
    found["random token ids"] = Situation(var_model, random_texts(some, model.config.vocab_size, args.seed))
    for path in args.foreign:
        texts = list(passages(documents(model, path, None, args.fault_samples), args.max_length))
        if not texts:
            raise InputError(
                f"--foreign {path}: no document has {args.max_length} tokens; give longer ones or less --max_length"
            )
        found[Path(path).stem] = Situation(var_model, texts[: args.fault_samples])
    return found


def look_at(situation: Situation, share: float, seed: int, **reading: Any) -> Seen:
    """Run the documents under audit, and with and without VAR."""
    var_model, texts = situation
    tally, _ = tally_documents(var_model, texts, share, seed=seed, **reading)
    off = var_model.disabled()
    plain, _ = score(var_runner(off), off.init(), texts, **reading)
    under_var, state = score(var_runner(var_model), var_model.init(), texts, **reading)
    experts = summary(state.counters, var_model.model.config.top_k)["experts_per_token"]
    return Seen(tally, under_var.nll_per_token - plain.nll_per_token, experts)


def judge(
    seen: Mapping[str, Seen], calibration: Calibration, known: Tally, var_model: VARModel, args: argparse.Namespace
) -> list[Outcome]:
    """Every situation in `args.repeats` random orders; nothing wrong also with a calibration drawn anew each time.

    Args:
        known: the tallies of the calibration documents.
    """
    rng = np.random.default_rng(args.seed)
    observed = {name: observe(found.tally, calibration.streams) for name, found in seen.items()}
    same, wrong = observed["same domain"], observed["answers shuffled"]
    pool, size, before = np.concatenate([observe(known, calibration.streams), same]), len(known.tokens), len(same) // 2

    def anew() -> tuple[Calibration, np.ndarray]:
        drawn = rng.permutation(pool)
        return calibrate_from(drawn[:size], var_model, calibration.share), drawn[size:]

    def midway() -> tuple[Calibration, np.ndarray]:
        return calibration, np.concatenate([rng.permutation(same)[:before], rng.permutation(wrong)])

    outcomes = []
    for name, values in observed.items():
        draw = partial(_in_any_order, calibration, values, rng)
        outcomes.append(repeat(name, values, seen[name].harm, draw, args.repeats))
    outcomes.insert(1, repeat(audit_report.ANEW, pool, None, anew, args.repeats))
    late = repeat(
        f"answers shuffled after {before}", wrong, seen["answers shuffled"].harm, midway, args.repeats, before
    )
    return [*outcomes, late]


def _in_any_order(
    calibration: Calibration, values: np.ndarray, rng: np.random.Generator
) -> tuple[Calibration, np.ndarray]:
    return calibration, rng.permutation(values)


def repeat(
    name: str,
    values: np.ndarray,
    harm: float | None,
    draw: Callable[[], tuple[Calibration, np.ndarray]],
    repeats: int,
    before: int = 0,
) -> Outcome:
    """What the audit says, again and again.

    Args:
        values: float64 [N, M], all documents of the situation.
        draw: a calibration, and the documents that come in.
        before: how many of these are without the fault.
    """
    until, first = [], Counter[str]()
    for _ in progress_bar(range(repeats), desc=name, unit="run"):
        monitor = until_drift(*draw())
        if monitor.drifts and monitor.texts > before:
            until.append(monitor.texts - before)
            first.update({found.stream.signal for found in monitor.drifts})
    error, agreement, open_ = np.nanmean(values[:, :3], axis=0)  # the streams over all layers stand first
    return Outcome(
        name=name,
        documents=len(values),
        harm=harm,
        error=float(error),
        agreement=float(agreement),
        open=float(open_),
        repeats=repeats,
        noticed=len(until),
        median=float(np.median(until)) if until else None,
        longest=max(until, default=None),
        first=dict(first),
    )


if __name__ == "__main__":
    main()
