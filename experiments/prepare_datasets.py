"""Tokenize datasets once and keep them on disk, for runs that then read token ids as they are.

Each dataset becomes a folder OUTPUT/NAME-SPLIT; give that folder as --dataset to the other scripts. A folder that
already holds what is asked for is left as it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.command import name_argument, path_argument, program
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
from models.model import REFERENCE
from models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASETS = {
    "c4": "allenai/c4:en",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext103": "Salesforce/wikitext:wikitext-103-raw-v1",
    "slimpajama": "DKYoon/SlimPajama-6B:",  # a sample in Parquet; the whole, cerebras/SlimPajama-627B, comes and goes
}
"""Short names; `:SPLIT` after one chooses the hub's own split."""


@program
def main(arguments: Sequence[str] | None) -> None:
    known = "; ".join(f"{short} = {name.rstrip(':')}" for short, name in DATASETS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--dataset",
        type=name_argument,
        nargs="+",
        default=["embedded"],
        help="one or several of: 'embedded'; a .txt, .jsonl, .json or .parquet file, also with .gz or .zst, or a "
        "directory of such; a datasets name[:config[:split]]; or a short name, which may be followed by :split as in "
        f"wikitext2:test ({known})",
    )
    parser.add_argument(
        *("--model", "--tokenizer"),
        type=name_argument,
        default="reference",
        metavar="DIR",
        help="model directory whose tokenizer is used (its weights are not needed), or 'reference' (comes with varjax)",
    )
    parser.add_argument(
        "--split",
        default="all",
        choices=["all", "build", *SPLITS],
        help="documents to keep, by a hash of their text, whatever splits the dataset itself has",
    )
    parser.add_argument("--text_column", default="text", help="field of the text in JSONL, Parquet and hub datasets")
    parser.add_argument("--num_samples", type=int, default=None, help="documents of each at most; none: all")
    parser.add_argument("--max_tokens", type=int, default=None, help="stop a dataset after so many tokens; none: never")
    parser.add_argument("--output", type=path_argument, default=Path("prepared"), help="directory for the folders")
    parser.add_argument("--overwrite", action="store_true", help="make anew what is there already")
    args = parser.parse_args(arguments)
    Output.of(args.output, "prepared", DIRECTORY)  # refuses a file

    directory = REFERENCE if args.model == "reference" else Path(args.model)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory; give a model's directory (experiments/download_models.py fetches one)"
        )
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise CorpusError(f"{directory} holds no tokenizer; put the model's tokenizer.json or tokenizer.model there")

    for name in args.dataset:
        check_request(name)
    split = None if args.split == "all" else args.split
    folders = {name: args.output / folder_name(name, split) for name in dict.fromkeys(args.dataset)}
    if len(set(folders.values())) < len(folders):
        raise CorpusError(f"two of {', '.join(folders)} would get the same folder; prepare them with another --output")
    requests = {
        folder: Request(full_name(name), split, args.num_samples, args.max_tokens, args.text_column)
        for name, folder in folders.items()
    }
    # What is in the way is said before the first dataset takes its hours.
    there = (
        {} if args.overwrite else {folder: already(folder, request, tokenizer) for folder, request in requests.items()}
    )
    for folder, request in requests.items():
        manifest = there.get(folder)
        if manifest is None:
            documents = iter_documents(
                request.dataset, split=split, limit=request.num_samples, text_column=request.text_column
            )
            with lock(folder.with_name(f".{folder.name}.lock"), str(folder)):
                manifest = prepare(documents, tokenizer, folder, request, overwrite=args.overwrite)
            print(f"{folder}: written")
        else:
            print(f"{folder}: made on {manifest.provenance['time_utc']} for this, left as it is (see --overwrite)")
        print(summary(manifest))


def already(folder: Path, request: Request, tokenizer: PreTrainedTokenizerBase) -> Manifest | None:
    """What is there, if it is what is asked for; None if nothing is there.

    Raises:
        CorpusError: something else is there, or it is damaged.
    """
    if not is_prepared(folder):
        return None
    manifest = read_manifest(folder)
    if (manifest.request, manifest.tokenizer) != (request, tokenizer_hash(tokenizer)):
        raise CorpusError(
            f"{folder} holds what another request or another tokenizer gave ({manifest.request}); choose another "
            "--output, or replace it with --overwrite"
        )
    open_prepared(folder, tokenizer, check_hashes=True)
    return manifest


def full_name(dataset: str) -> str:
    """The dataset as `analysis.text.corpus` knows it."""
    short, colon, hub_split = dataset.partition(":")
    return f"{DATASETS[short]}{colon}{hub_split}".rstrip(":") if short in DATASETS else dataset


def folder_name(dataset: str, split: str | None) -> str:
    """A file's stem, a directory's name, or the name on the hub without its signs; and the split."""
    path = Path(dataset)
    name = path.resolve().name if path.is_dir() else stem_of(path) if path.is_file() else dataset
    return re.sub(r"[^\w.-]+", "-", name) + (f"-{split}" if split else "")


def summary(manifest: Manifest) -> str:
    return (
        f"  dataset      {manifest.request.dataset}, split {manifest.request.split or 'all'}\n"
        f"  documents    {manifest.documents:,} ({manifest.left_out:,} more had no two tokens)\n"
        f"  tokens       {manifest.tokens:,} ({manifest.min_length:,} to {manifest.max_length:,} a document)\n"
        f"  bytes/token  {manifest.bytes / manifest.tokens:.2f}"
    )


if __name__ == "__main__":
    main()
