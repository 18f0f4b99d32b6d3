"""Tokenize datasets once and keep the token ids on disk for later runs.

Each dataset becomes a folder OUTPUT/NAME-SPLIT; give that folder as --dataset to the other scripts. A folder that
already contains the requested data is kept.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.command import HelpFormatter, name_argument, path_argument, program
from analysis.report.output import DIRECTORY, Output, lock
from analysis.text.corpus import SPLITS, check_request, iter_documents
from analysis.text.prepared import (
    Manifest,
    Request,
    is_prepared,
    open_prepared,
    prepare,
    read_manifest,
    tokenizer_hash,
)
from analysis.text.sources import CorpusError, stem_of
from experiments.arguments import DATASET_HELP, add_options
from models.model import REFERENCE
from models.tokenizer import load_tokenizer

DATASETS = {
    "c4": "allenai/c4:en",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext103": "Salesforce/wikitext:wikitext-103-raw-v1",
    "slimpajama": "DKYoon/SlimPajama-6B:",  # a sample in Parquet; the whole, cerebras/SlimPajama-627B, comes and goes
}
"""Short names; `:SPLIT` after one chooses the hub's own split."""


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    known = "; ".join(f"{short} = {name.rstrip(':')}" for short, name in DATASETS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--dataset",
        type=name_argument,
        nargs="+",
        default=["embedded"],
        help=f"datasets to tokenize: {DATASET_HELP}; or a short name, which may be followed by :split, as in "
        f"wikitext2:test ({known})",
    )
    parser.add_argument(
        *("--model", "--tokenizer"),
        type=name_argument,
        default="reference",
        metavar="DIR",
        help="model directory with the tokenizer (weights are not needed), or 'reference', which comes with varjax",
    )
    parser.add_argument(
        "--split",
        default="all",
        choices=["all", "build", *SPLITS],
        help="split to keep; a hash of the text assigns each document to a split, regardless of the dataset's own "
        "splits",
    )
    add_options(
        parser,
        ("text_column", str, "text", "name of the text field in JSONL, Parquet and hub datasets"),
        ("num_samples", int, None, "maximum number of documents to keep per dataset (default: all)"),
        ("max_tokens", int, None, "number of tokens after which a dataset is cut off (default: never)"),
        ("output", path_argument, Path("prepared"), "directory in which to create the folders"),
    )
    parser.add_argument("--overwrite", action="store_true", help="replace folders that already exist")
    args = parser.parse_args(arguments)
    Output.of(args.output, "prepared", DIRECTORY)  # refuses a file

    directory = REFERENCE if args.model == "reference" else Path(args.model)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory; give a model's directory (experiments/download_models.py downloads one)"
        )
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise CorpusError(f"{directory} holds no tokenizer; put the model's tokenizer.json or tokenizer.model there")

    for name in args.dataset:
        check_request(name)
    split = None if args.split == "all" else args.split
    folders = {name: args.output / _folder_name(name, split) for name in dict.fromkeys(args.dataset)}
    if len(set(folders.values())) < len(folders):
        raise CorpusError(f"two of {', '.join(folders)} would get the same folder; prepare them with another --output")
    reading = (split, args.num_samples, args.max_tokens, args.text_column)
    requests = {folder: Request(_full_name(name), *reading) for name, folder in folders.items()}
    existing: dict[Path, Manifest | None] = {}
    if not args.overwrite:  # a folder that is in the way is refused before the first dataset takes hours
        existing = {folder: _existing(folder, request, tokenizer) for folder, request in requests.items()}
    for folder, request in requests.items():
        manifest = existing.get(folder)
        if manifest is None:
            chosen = {"split": split, "limit": args.num_samples, "text_column": args.text_column}
            documents = iter_documents(request.dataset, **chosen)
            with lock(folder.with_name(f".{folder.name}.lock"), str(folder)):
                manifest = prepare(documents, tokenizer, folder, request, overwrite=args.overwrite)
            print(f"{folder}: written")
        else:
            print(f"{folder}: made on {manifest.provenance['time_utc']} for this request, kept (see --overwrite)")
        print(_summary(manifest))


def _existing(folder: Path, request: Request, tokenizer: Any) -> Manifest | None:
    """The manifest of a folder that holds what is asked for; None: there is no such folder.

    Raises CorpusError if the folder holds something else or is damaged.
    """
    if not is_prepared(folder):
        return None
    manifest = read_manifest(folder)
    if (manifest.request, manifest.tokenizer) != (request, tokenizer_hash(tokenizer)):
        raise CorpusError(
            f"{folder} was made by another request or with another tokenizer ({manifest.request}); choose another "
            "--output, or replace it with --overwrite"
        )
    open_prepared(folder, tokenizer, check_hashes=True)
    return manifest


def _full_name(dataset: str) -> str:
    """The name under which `analysis.text.corpus` finds the dataset."""
    short, colon, hub_split = dataset.partition(":")
    return f"{DATASETS[short]}{colon}{hub_split}".rstrip(":") if short in DATASETS else dataset


def _folder_name(dataset: str, split: str | None) -> str:
    """The stem of a file, the name of a directory, or the name on the hub without special characters; and the split."""
    path = Path(dataset)
    name = path.resolve().name if path.is_dir() else stem_of(path) if path.is_file() else dataset
    return re.sub(r"[^\w.-]+", "-", name) + (f"-{split}" if split else "")


def _summary(manifest: Manifest) -> str:
    return (
        f"  dataset      {manifest.request.dataset}, split {manifest.request.split or 'all'}\n"
        f"  documents    {manifest.documents:,} ({manifest.left_out:,} more had no two tokens)\n"
        f"  tokens       {manifest.tokens:,} ({manifest.min_length:,} to {manifest.max_length:,} a document)\n"
        f"  bytes/token  {manifest.bytes / manifest.tokens:.2f}"
    )


if __name__ == "__main__":
    main()
