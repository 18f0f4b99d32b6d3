"""Does the audit stay quiet where nothing is wrong, and how soon does it notice a fault?

    python -m analysis.audit_study --routing_stats results/phase1/routing_stats.parquet --output results/audit.json

Calibrates the audit on documents of the `calibrate` split, then lets held-out documents of the `test` split arrive in
many random orders: first as they are, then with planted faults. Each document is run once per fault; the repeats only
reorder what was observed, so they share their documents. The cached tier is off, because what it has learned depends on
the order. Writes a JSON file, and next to it the printed report as text and as an HTML page with its figure.
"""

# Letters: N documents, M streams (`varjax.drift`).

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from analysis.command import HelpFormatter, add_dtype, name_argument, path_argument, program
from analysis.evaluate.auditing import calibrate_from, streams_of, tally_documents
from analysis.evaluate.losses import score, var_runner
from analysis.inputs import STATISTICS, find_statistics, listed, table_files
from analysis.questions.alternatives import shuffled_answers
from analysis.report.figures import subplots
from analysis.report.files import write_report
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import provenance
from analysis.report.report import Column, Report, ReportFigure, Section, Table, text
from analysis.resampling import allowed
from analysis.steps import finished_steps
from analysis.text import card
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.encoding import Encoded
from models import Model, load_model
from varjax import LayerPolicy, VARConfig, VARModel, drift, load_table
from varjax.drift import ALPHA, Calibration, Monitor, Tally, observe
from varjax.errors import InputError
from varjax.progress import progress_bar
from varjax.routing import Routing
from varjax.step import summary
from varjax.table import RouteTable

NOISE = (0.1, 0.3, 1.0)  # of the planted checkpoints, as a share of each tensor's standard deviation
_SAME, _SHUFFLED = "same domain", "answers shuffled"
_RECALIBRATED = f"{_SAME}, recalibrated"  # the situation that the promise is about: calibration and run are both random


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


@dataclasses.dataclass(frozen=True)
class _Found:
    """Everything that was measured."""

    outcomes: list[Outcome]
    calibration: Calibration
    runs: dict[str, float]  # expert runs per token and layer, of VAR and of the audit in addition


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="reference", type=name_argument, help="directory, hub id, or 'reference'")
    parser.add_argument(
        "--routing_stats",
        type=path_argument,
        help=f"routing_stats.parquet from phase 1 (default: the first of {listed(STATISTICS)} that exists)",
    )
    parser.add_argument(
        "--var_config",
        type=path_argument,
        help="VARConfig as a JSON file; without it, one expert runs (none, where the model runs one) and answers are "
        "used",
    )
    parser.add_argument(
        "--dataset",
        default="embedded",
        type=name_argument,
        help="dataset that the statistics come from; its calibrate and test splits are read",
    )
    parser.add_argument(
        "--foreign", type=name_argument, nargs="*", default=[], help="texts of another kind, such as a .txt file"
    )
    parser.add_argument(
        "--num_samples", type=int, default=1000, help="number of documents to calibrate on, and to monitor"
    )
    parser.add_argument(
        "--fault_samples", type=int, default=300, help="number of documents to monitor under each planted fault"
    )
    add_dtype(parser)
    parser.add_argument("--share", type=float, default=0.05, help="share of the planned tokens to compute in full")
    parser.add_argument("--repeats", type=int, default=200, help="number of random orders of the documents")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch at max_length")
    parser.add_argument("--max_length", type=int, default=256, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--output", type=path_argument, default=Path("results/audit.json"), help=OUTPUT_HELP)
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "audit")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    files = table_files(find_statistics(args.routing_stats), var_config=args.var_config)
    model = load_model(args.model, args.dtype)
    checked = card.announced(model, args.dataset)
    config = _config(args, model.config.top_k)
    var_model = VARModel(model, config, load_table(model, config, files.routing_stats, files.answers))
    reading = {"batch_size": args.batch_size, "max_length": args.max_length}

    known = _documents(model, args.dataset, "calibrate", args.num_samples)

    def studied() -> _Found:
        print("calibration", file=sys.stderr)
        sums, _ = tally_documents(var_model, known, args.share, seed=args.seed, **reading)
        calibration = calibrate_from(observe(sums, streams_of(var_model)), var_model, args.share)
        seen = {}
        for name, situation in _situations(args, model, var_model).items():
            print(name, file=sys.stderr)
            seen[name] = _look_at(*situation, args.share, args.seed, **reading)
        outcomes = _judge(seen, calibration, sums, var_model, args)
        same = seen[_SAME]
        pairs = model.config.num_layers * same.tally.tokens.sum()
        runs = {"var": same.experts_per_token, "audit": float(model.config.top_k * same.tally.audited.sum() / pairs)}
        return _Found(outcomes, calibration, runs)

    made_from = {"fingerprint": model.fingerprint, "config_sha256": var_model.digest, "texts": [d.id for d in known]}
    arguments = {name: str(value) for name, value in vars(args).items()}
    with finished_steps(output, {"arguments": arguments, **made_from}) as steps:
        found = steps.do("situations", _Found, studied)
        saved = output.main(".calibration.json")
        found.calibration.save(saved)
        known_facts = (("calibration", f"{found.calibration.texts:,} documents"), *card.facts(checked))
        extra = {
            "outcomes": found.outcomes,
            "expert_runs_per_token_and_layer": found.runs,
            "false_alarm_probability": ALPHA,
            "calibration_file": saved.name,
            "provenance": provenance(
                seed=args.seed,
                model={"name": model.name, "fingerprint": model.fingerprint},
                card=checked,
                data={"dataset": args.dataset, "calibrate": len(known), "foreign": args.foreign},
                config=config,
                table=files,
                config_sha256=var_model.digest,
            ),
        }
        said = write_report(
            lambda: Report("Study of the audit", known_facts, (), (_section(*vars(found).values()),)),
            output,
            extra=extra,
        )
    print(text(said))


def _config(args: argparse.Namespace, top_k: int) -> VARConfig:
    """--var_config, or a policy under which nearly every key answers; no cached tier."""
    if args.var_config:
        return dataclasses.replace(VARConfig.load(args.var_config), cache_size=0)
    policy = LayerPolicy(experts_kept=min(1, top_k - 1), use_answers=True, ngram_orders=(1, 2))
    return VARConfig(frequency_threshold=5, entropy_threshold=3.0, cache_size=0, default=policy)


def _documents(model: Model, dataset: str, split: str | None, limit: int) -> list[Encoded]:
    return list(EncodedCorpus(dataset, split, limit, model.tokenizer, model.config))


def _situations(
    args: argparse.Namespace, model: Model, var_model: VARModel
) -> dict[str, tuple[VARModel, list[Encoded]]]:
    """Nothing wrong first, then faults of the model that neither fingerprint nor config shows, then other texts."""
    held_out = _documents(model, args.dataset, "test", args.num_samples)
    some, config, table = held_out[: args.fault_samples], var_model.config, var_model.table
    if table is None:
        raise InputError("VAR is switched off (enable_var=False): nothing can go wrong with it")
    rng = np.random.default_rng(args.seed)
    faulty = {
        _SHUFFLED: VARModel(model, config, table=shuffled_answers(table, rng)),
    }
    if model.config.num_experts > 1:  # one has no other number
        faulty["experts renumbered"] = VARModel(model, config, table=_renumbered(table, rng))
    for scale in NOISE:
        other = _perturbed(model, scale, jax.random.key(args.seed))
        faulty[f"weights + {scale:.0%} noise"] = VARModel(other, config, table=table)
    found = {_SAME: (var_model, held_out)}
    found |= {name: (wrong, some) for name, wrong in faulty.items()}
    found["random token ids"] = (var_model, _random_texts(some, model.config.vocab_size, args.seed))
    for path in args.foreign:
        texts = list(_passages(_documents(model, path, None, args.fault_samples), args.max_length))
        if not texts:
            raise InputError(
                f"--foreign {path}: no document has {args.max_length} tokens; give longer ones or less --max_length"
            )
        found[Path(path).stem] = (var_model, texts[: args.fault_samples])
    return found


def _renumbered(table: RouteTable, rng: np.random.Generator) -> RouteTable:
    """The table of the same model with its experts in another order, in which every id moves."""
    ids = rng.permutation(table.num_experts)
    moved = np.empty(table.num_experts + 1, np.int32)
    moved[ids], moved[-1] = np.roll(ids, 1), table.num_experts  # the last entry means "no expert"
    return dataclasses.replace(table, routing=Routing(jnp.asarray(moved)[table.routing.experts], table.routing.weights))


def _perturbed(model: Any, scale: float, key: jax.Array) -> Any:
    """The model with noise on every tensor, `scale` times the tensor's standard deviation; its fingerprint stays."""
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + scale * jnp.std(leaf) * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(model, params=jax.tree.unflatten(structure, noisy))


def _random_texts(documents: Sequence[Encoded], vocab_size: int, seed: int) -> list[Encoded]:
    """As many texts of the same lengths, every id drawn evenly from the vocabulary."""
    rng = np.random.default_rng(seed)
    return [dataclasses.replace(d, ids=rng.integers(0, vocab_size, len(d.ids)).astype(np.int32)) for d in documents]


def _passages(documents: Sequence[Encoded], length: int) -> Iterator[Encoded]:
    """The documents cut into texts of `length` ids, for corpora whose documents are few and long; a rest is left out.

    Passages of one document depend on each other.
    """
    for document in documents:
        for start in range(0, len(document.ids) - length + 1, length):
            yield dataclasses.replace(document, ids=document.ids[start : start + length])


def _look_at(var_model: VARModel, texts: Sequence[Encoded], share: float, seed: int, **reading: Any) -> Seen:
    """Run the documents under audit, and with and without VAR."""
    tally, _ = tally_documents(var_model, texts, share, seed=seed, **reading)
    off = var_model.disabled()
    plain, _ = score(var_runner(off), off.init(), texts, **reading)
    under_var, state = score(var_runner(var_model), var_model.init(), texts, **reading)
    experts = summary(state.counters, var_model.model.config.top_k)["experts_per_token"]
    return Seen(tally, under_var.nll_per_token - plain.nll_per_token, experts)


def _judge(
    seen: Mapping[str, Seen], calibration: Calibration, known: Tally, var_model: VARModel, args: argparse.Namespace
) -> list[Outcome]:
    """Every situation in `args.repeats` random orders; nothing wrong also with a new calibration each time.

    `known` are the tallies of the calibration documents.
    """
    rng = np.random.default_rng(args.seed)
    observed = {name: observe(found.tally, calibration.streams) for name, found in seen.items()}
    same, wrong = observed[_SAME], observed[_SHUFFLED]
    pool, size, before = np.concatenate([observe(known, calibration.streams), same]), len(known.tokens), len(same) // 2

    def in_any_order(values: np.ndarray) -> tuple[Calibration, np.ndarray]:
        return calibration, rng.permutation(values)

    def recalibrated() -> tuple[Calibration, np.ndarray]:
        drawn = rng.permutation(pool)
        return calibrate_from(drawn[:size], var_model, calibration.share), drawn[size:]

    def midway() -> tuple[Calibration, np.ndarray]:
        return calibration, np.concatenate([rng.permutation(same)[:before], rng.permutation(wrong)])

    outcomes = [
        _repeat(name, values, seen[name].harm, partial(in_any_order, values), args.repeats)
        for name, values in observed.items()
    ]
    outcomes.insert(1, _repeat(_RECALIBRATED, pool, None, recalibrated, args.repeats))
    late = _repeat(f"{_SHUFFLED} after {before}", wrong, seen[_SHUFFLED].harm, midway, args.repeats, before)
    return [*outcomes, late]


def _repeat(
    name: str,
    values: np.ndarray,
    harm: float | None,
    draw: Callable[[], tuple[Calibration, np.ndarray]],
    repeats: int,
    before: int = 0,
) -> Outcome:
    """What the audit says, over and over.

    Args:
        values: float64 [N, M], all documents of the situation.
        draw: gives a calibration, and the documents that arrive.
        before: how many of these are without the fault.
    """
    until, first = [], Counter[str]()
    for _ in progress_bar(range(repeats), desc=name, unit="run"):
        monitor = _until_drift(*draw())
        if monitor.drifts and monitor.texts > before:
            until.append(monitor.texts - before)
            first.update({found.stream.signal for found in monitor.drifts})
    error, agreement, open_ = np.nanmean(values[:, :3], axis=0)  # the first streams are over all layers
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


def _until_drift(calibration: Calibration, observed: np.ndarray) -> Monitor:
    """The monitor at its first drift, or after all documents: float64 [N, M] in the order in which they arrive."""
    monitor = drift.begin(calibration)
    for start in range(0, len(observed), drift.LOOK):
        monitor = drift.watch(monitor, observed[start : start + drift.LOOK])
        if monitor.drifts:
            break
    return monitor


def _section(outcomes: Sequence[Outcome], calibration: Calibration, runs: Mapping[str, float]) -> Section:
    """`runs`: expert runs per token and layer, of VAR and of the audit in addition."""
    quiet = next(row for row in outcomes if row.name == _RECALIBRATED)
    most = allowed(quiet.repeats, ALPHA)
    columns = (
        *(Column("situation"), Column("harm", "+.4f")),
        *(Column(name, ".3f") for name in ("error", "agreement", "open")),
        *(Column("noticed"), Column("documents until", ".0f"), Column("at most", ".0f"), Column("first signal")),
    )
    rows: list[tuple[str | float | None, ...]] = [
        ("calibration", None, *(value.mean for value in calibration.values[:3]), None, None, None, "")
    ]
    for row in outcomes:
        noticed = (f"{row.noticed} of {row.repeats}", row.median, row.longest, ", ".join(sorted(row.first)))
        rows.append((row.name, row.harm, row.error, row.agreement, row.open, *noticed))
    figure = ReportFigure(
        "audit_noticed",
        "What the audit noticed, and how soon",
        "One row per situation. Bar: the share of the random orders of the documents in which the audit declared "
        "drift. Numbers: the median and the largest number of documents until then. Dotted line: the rate of false "
        "alarms that is promised at most.",
        "Drift is not harm: text of another kind is noticed even if VAR loses less on it, and a small fault may cost "
        "much or nothing. The orders share their documents, so they are not independent.",
        partial(_draw, outcomes),
    )
    return Section(
        "audit",
        "Does the audit notice what is wrong, and nothing else?",
        "PASS" if quiet.noticed <= most * quiet.repeats else "FAIL",
        f"where nothing is wrong, {quiet.noticed} false alarms in {quiet.repeats} random calibrations; at most "
        f"{ALPHA:.0%} are promised, {most:.1%} are within chance",
        (
            "Harm: nats per token lost against the plain model. Error: relative, of a layer's output where audited. "
            "Agreement: share of planned tokens whose first expert the router would choose. Open: share that the table "
            "does not know. The last three are means over documents, all layers together.",
            f"{calibration.texts} calibration documents; {calibration.share:.0%} of the planned tokens audited, "
            f"{runs['audit']:.2f} expert runs per token and layer in addition to VAR's {runs['var']:.2f}.",
        ),
        (Table("Situations", columns, tuple(rows)),),
        (figure,),
        f"{quiet.noticed} of {quiet.repeats} false alarms",
    )


def _draw(outcomes: Sequence[Outcome]) -> Figure:
    drawn, axis = subplots(figsize=(6.4, 1.4 + 0.3 * len(outcomes)))
    shares = [row.noticed / row.repeats for row in outcomes]
    axis.barh(range(len(outcomes)), shares, color="0.7", edgecolor="0", linewidth=0.5)
    for place, row in enumerate(outcomes):
        if row.median is not None:
            axis.text(0.02, place, f"{row.median:.0f}, at most {row.longest}", va="center", fontsize=8)
    axis.axvline(ALPHA, color="0", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(outcomes)), [row.name for row in outcomes])
    axis.invert_yaxis()
    axis.set(xlabel="share of the orders in which drift was declared", xlim=(0, 1))
    return drawn


if __name__ == "__main__":
    main()
