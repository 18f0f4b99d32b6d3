"""What VAR's error is made of, and how its free generation drifts: the report by itself, without the rest of a study.

    python -m analysis.error_report --var_config C --routing_stats S --output DIR

On held-out documents (those of the test split of the embedded corpus, unless told). Writes error_sources.txt, .json and
.html and the figures as PNG and PDF into --output, and prints the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from analysis.command import HelpFormatter, name_argument, path_argument, program
from analysis.evaluate import caching as cached_tier
from analysis.inputs import CONFIGS, find_config, listed, table_files
from analysis.report.files import write_output
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import provenance
from analysis.report.report import Report, text
from analysis.studies.error_figures import draw
from analysis.studies.error_sections import sections
from analysis.studies.error_sources import examine, prepare
from analysis.studies.generation_drift import drift
from analysis.text import card
from analysis.text.encoded_corpus import EncodedCorpus
from models import load_model
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel, load_statistics

INTERVALS = (
    "Intervals are 95 %, each for itself, by bootstrap over whole documents (over prompts where texts are continued). "
    "Everything holds for this model, this policy and these documents."
)


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], formatter_class=HelpFormatter)
    parser.add_argument(
        "--var_config",
        type=path_argument,
        help=f"the policy, a VARConfig as JSON; without it, the first of {listed(CONFIGS)} that exists",
    )
    parser.add_argument("--routing_stats", type=path_argument, help="statistics, if not those that the config names")
    parser.add_argument("--output", type=path_argument, default=Path("results/error_sources"), help=OUTPUT_HELP)
    parser.add_argument("--model", default="reference", type=name_argument, help="directory, hub id, or 'reference'")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters")
    parser.add_argument("--dataset", default="embedded", type=name_argument, help="as in the phase scripts")
    parser.add_argument("--split", default="test", help="documents to read; 'all' for every one")
    parser.add_argument("--num_samples", type=int, default=200, help="documents to read at most")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch at max_length")
    parser.add_argument("--max_length", type=int, default=256, help="tokens per window")
    parser.add_argument("--prompts", type=int, default=64, help="texts to continue; 0: none")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens of their beginnings")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap draws")
    cached_tier.add_arguments(parser)
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "error_sources")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    policy = find_config(args.var_config)
    if policy is None:
        raise InputError(
            f"no policy is named with --var_config, and none of {listed(CONFIGS)} exists; run "
            "experiments/02_evaluate_var.py --mode var or experiments/03_hyperparameter_optimization.py first"
        )
    config = VARConfig.load(policy)
    model = load_model(args.model, args.dtype)
    files = table_files(args.routing_stats, var_config=policy)
    stats, answers = load_statistics(model, files)
    split = None if args.split == "all" else args.split
    corpus = EncodedCorpus(args.dataset, split, args.num_samples, model.tokenizer, model.config)
    documents = list(corpus)
    checked = card.announced(model, args.dataset)
    caching = cached_tier.asked(args)
    subject = prepare(
        model, stats, answers, config, documents,
        batch_size=args.batch_size, max_length=args.max_length, seed=args.seed, caching=caching,
    )  # fmt: skip
    sources, drifted = examine(subject), None
    if args.prompts:
        var_model = VARModel(model, config, table=subject.table)
        sizes = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens", "seed")}
        drifted = drift(var_model, documents, caching=caching, **sizes)
    facts = (("model", model.name), ("documents", f"{len(documents):,}, {sources.tokens:,} tokens"))
    said = Report(
        "What VAR's error is made of",
        (*facts, *cached_tier.described(caching, config), *card.facts(checked)),
        (INTERVALS,),
        sections(sources, drifted),
    )
    about = provenance(
        seed=args.seed, model={"name": model.name, "fingerprint": model.fingerprint}, data=corpus.about,
        card=checked, config=config, table=files, config_sha256=config.digest(files.digest()),
    )  # fmt: skip
    figures = dict(draw(sources, drifted))
    write_output(said, output, figures=figures, beside={"provenance": about})
    print(text(said))
    print(f"written to {args.output}, with figures")


if __name__ == "__main__":
    main()
