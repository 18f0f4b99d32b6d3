"""The frontier of a model: how much of its experts' work answers save, against what that costs, on several texts.

    python -m benchmarks.frontier --model checkpoints/smollm2 --routing_stats S.parquet --answers A.safetensors \\
        B.safetensors --texts books=books.txt wiki=Salesforce/wikitext:wikitext-103-raw-v1 --output results/frontier

For every file of answers and every budget, the policy is searched on the tune split of the embedded corpus. It is
judged on the test split, from the same kind of text, and on the given datasets, which are of other kinds. Perplexity on
text like that of the tables flatters them; the divergence from the plain model does not.

The policies are written too, for experiments/02_evaluate_var.py. What was measured is kept until the table is written,
so that the same command resumes a killed run; the losses of the search stay in OUTPUT/frontier_losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from analysis.command import name_argument, path_argument, program
from analysis.evaluate.nearness import Nearness, nearness
from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import Search, search
from analysis.report.files import write_report
from analysis.report.output import Output
from analysis.report.provenance import provenance
from analysis.report.report import Column, Report, Section, Table, text
from analysis.resampling import Estimate
from analysis.steps import Steps, finished_steps
from analysis.text.corpus import corpus_hash, load_documents
from analysis.text.encoding import Encoded, encode
from benchmarks import harness
from models import Model, load_model
from varjax import VARConfig, VARModel
from varjax.errors import InputError
from varjax.model import load_statistics
from varjax.table import with_policies
from varjax.tablefiles import TableFiles

BUDGETS = (0.0025, 0.005, 0.01, 0.02, 0.04)


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy on one text."""

    answers: str  # name of the file
    budget: float  # relative change in perplexity that the search was allowed on the tune documents
    text: str
    saved: float  # share of the experts' runs
    degradation: Estimate  # relative change in perplexity per token
    divergence: float  # nats per token
    agreement: float  # share of positions at which both models would write the same token


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument("--model", type=name_argument, required=True, help="checkpoint directory, or reference")
    options.add_argument("--routing_stats", type=path_argument, required=True, help="statistics of the model")
    options.add_argument("--answers", type=path_argument, nargs="+", required=True, help="files of answers to compare")
    options.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="budgets of the search")
    options.add_argument("--texts", nargs="*", default=[], metavar="NAME=DATASET", help="texts of other kinds")
    options.add_argument("--tune_samples", type=int, default=60, help="documents of the search")
    options.add_argument("--num_samples", type=int, default=60, help="documents of each text")
    options.add_argument("--batch_size", type=int, default=8, help="windows of a batch")
    options.add_argument("--max_length", type=int, default=256, help="tokens of a window")
    options.add_argument("--output", type=path_argument, default=Path("results/frontier"), help="where to write")
    args = options.parse_args(arguments)
    output = Output.of(args.output, "frontier")
    if len({_name(path) for path in args.answers}) < len(args.answers):
        options.error("--answers: two files have the same name; rows are known by it")
    tables = {_name(path): TableFiles.find(args.routing_stats, path) for path in args.answers}
    model = load_model(args.model)
    read = partial(_documents, model)
    tune = read("embedded", "tune", args.tune_samples)
    texts = {"test": read("embedded", "test", args.num_samples)}
    for one in args.texts:
        name, found, path = one.partition("=")
        if not found or name in texts or "/" in name:
            raise InputError(f"--texts {one}: expected NAME=DATASET, with a name that is not used yet")
        texts[name] = read(path, None, args.num_samples)
    run = {
        "model": model.fingerprint,
        "tables": {name: files.digest() for name, files in tables.items()},
        "texts": {name: corpus_hash(one.id for one in documents) for name, documents in (texts | {"": tune}).items()},
        "settings": [args.batch_size, args.max_length],
    }
    with output.locked(), finished_steps(output, run) as steps:
        folder = output.other("frontier_losses")
        reading = {"batch_size": args.batch_size, "max_length": args.max_length, "folder": folder}
        rows: list[Row] = []
        for name, files in tables.items():
            stats, answers = load_statistics(model, files)
            assert answers is not None
            subject = Subject(model, stats, answers, VARConfig(cache_size=0), tune, **reading)
            configs = {budget: _found(steps, subject, name, budget) for budget in args.budgets}
            for budget, config in configs.items():
                config.save(output.other(f"{name}-{budget}.var_config.json"), files)
            rows += _rows(steps, subject, name, configs, texts)
        said = write_report(
            lambda: _report(model, rows, texts), output, extra={"rows": rows, "provenance": provenance(seed=0)}
        )
    print(text(said))


def _name(path: Path) -> str:
    """NAME of NAME.answers.safetensors."""
    return path.name.removesuffix(".safetensors").removesuffix(".answers")


def _documents(model: Model, dataset: str, split: str | None, limit: int) -> list[Encoded]:
    return encode(load_documents(dataset, split=split, limit=limit), model.tokenizer, model.config)


def _found(steps: Steps, subject: Subject, name: str, budget: float) -> VARConfig:
    """The policy that is found within a budget."""
    return steps.do(f"search-{name}-{budget}", Search, partial(search, subject, budget=budget)).config


def _rows(
    steps: Steps, subject: Subject, name: str, configs: Mapping[float, VARConfig], texts: Mapping[str, list[Encoded]]
) -> list[Row]:
    """The policies of every budget on every text, with one file of answers."""
    table = subject.build(next(iter(configs.values())))
    under = partial(with_policies, table, stats=subject.stats, answers=subject.answers)
    var_models = [VARModel(subject.model, config, under(config=config)) for config in configs.values()]
    rows = []
    for kind, documents in texts.items():
        judge = partial(nearness, subject.model, var_models, documents, batch_size=subject.batch_size)
        judge = partial(judge, max_length=subject.max_length)
        for budget, near in zip(configs, steps.do(f"judge-{name}-{kind}", list[Nearness], judge), strict=True):
            saved, said = 1 - near.experts_per_token / subject.model.config.top_k, near.summary()
            also = said["divergence"]["value"], said["agreement"]["value"]
            rows.append(Row(name, budget, kind, saved, near.degradation(), *also))
    return rows


def _report(model: Model, rows: Sequence[Row], texts: dict[str, list[Encoded]]) -> Report:
    columns = (
        *(Column("answers"), Column("budget", ".2%"), Column("text"), Column("work saved", ".1%")),
        *(Column("perplexity", "+.2%"), Column("low", "+.2%"), Column("high", "+.2%")),
        *(Column("divergence [nats]", ".4f"), Column("agreement", ".1%")),
    )
    body = [
        (
            row.answers,
            row.budget,
            row.text,
            row.saved,
            *dataclasses.astuple(row.degradation),
            row.divergence,
            row.agreement,
        )
        for row in rows
    ]
    sizes = ", ".join(f"{name}: {sum(len(one.ids) for one in documents):,}" for name, documents in texts.items())
    words = (
        "Work saved: the share of the experts' runs that are left out, maps of affine answers not counted. Perplexity: "
        "relative change, with a 95% interval over documents. Divergence and agreement: from the plain model.",
    )
    section = Section(
        "frontier",
        "Work saved against quality",
        "reported",
        f"{len(rows)} points",
        words,
        (Table("Policies", columns, tuple(body)),),
    )
    facts = (("model", model.name), ("tokens", sizes))
    return Report("The frontier of answers", facts, (), (section,))


if __name__ == "__main__":
    main()
