"""What the phase scripts share: their common arguments, and the loading of model and documents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from analysis.command import HelpFormatter, name_argument, path_argument
from analysis.inputs import table_files
from analysis.text import card
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.encoding import Encoded
from models import Model, load_model
from models.placement import DATA, MeshError, make_mesh
from varjax import RoutingStats, VARConfig
from varjax.answers import Answers
from varjax.errors import InputError
from varjax.model import load_statistics
from varjax.tablefiles import TableFiles


def parser(description: str | None, default_output: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every phase takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    made.add_argument(
        "--model", default="reference", type=name_argument, help="directory, hub id, or 'reference' (comes with varjax)"
    )
    made.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters")
    made.add_argument("--implementation", default=None, help="expert engine; see models.experts")
    add_mesh(made)
    made.add_argument(
        "--dataset",
        default="embedded",
        type=name_argument,
        help="'embedded', a .txt (lines <|endofdoc|> divide it into documents), .jsonl, .json or .parquet file, "
        "compressed (.gz, .zst) or not, a directory of such or of prepare_datasets.py, or a datasets "
        "name[:config[:split]]",
    )
    made.add_argument("--text_column", default="text", help="field of the text in JSONL, Parquet and hub datasets")
    made.add_argument("--num_samples", type=int, default=None, help="documents to read at most; none: all")
    made.add_argument("--output", type=path_argument, default=Path(default_output), help="file or directory to write")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--batch_size", type=int, default=8, help="sequences per batch at max_length")
    made.add_argument("--max_length", type=int, default=256, help="tokens per window, the most context a token gets")
    return made


def add_mesh(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--mesh",
        default=None,
        metavar="data=D,model=M",
        help="divide the model over M devices and a batch over D groups of them (docs/scaling.md); none: undivided",
    )


def asked_mesh(args: argparse.Namespace) -> Mesh | None:
    """The devices that the arguments ask for; None: one. Processes that are joined use all that they have."""
    if not jax.distributed.is_initialized():
        return None if args.mesh is None else make_mesh(args.mesh)
    present = jax.device_count()
    mesh = make_mesh(args.mesh or f"{DATA}={present}")
    if mesh.size < present:
        raise MeshError(f"mesh {args.mesh!r}: the joined processes have {present} devices; give one of so many")
    return mesh


def open_model(args: argparse.Namespace) -> Model:
    """The model, on the devices that the arguments ask for."""
    return load_model(args.model, args.dtype, args.implementation, asked_mesh(args))


def load(args: argparse.Namespace, split: str) -> tuple[Model, list[Encoded], dict[str, Any]]:
    """The model, the documents of a split in its token ids, and what a result file says of both."""
    model = open_model(args)
    documents, data = load_encoded(model, args, split, args.num_samples)
    about = {"name": model.name, "fingerprint": model.fingerprint, "dtype": args.dtype}
    origin = {"model": about, "data": data, "card": card.announced(model, args.dataset)}
    return model, documents, origin


def load_encoded(
    model: Model, args: argparse.Namespace, split: str, limit: int | None
) -> tuple[list[Encoded], dict[str, Any]]:
    """At most `limit` documents of a split in the model's token ids, and what a result file says of them."""
    corpus = open_corpus(model, args, split, limit)
    return list(corpus), corpus.about


def open_corpus(model: Model, args: argparse.Namespace, split: str, limit: int | None = None) -> EncodedCorpus:
    """The documents of a split ('all': every one), to be read as often as needed; None: at most --num_samples."""
    wanted = None if split == "all" else split
    limit = args.num_samples if limit is None else limit
    return EncodedCorpus(args.dataset, wanted, limit, model.tokenizer, model.config, args.text_column)


def read_answers(model: Model, files: TableFiles) -> tuple[RoutingStats, Answers]:
    """The statistics and answers of a table that has both."""
    stats, answers = load_statistics(model, files)
    if answers is None:
        raise InputError(f"{files.routing_stats}: no answers next to it; run 01_routing_analysis.py with --answers")
    return stats, answers


def asked_config(args: argparse.Namespace, **fields: Any) -> tuple[VARConfig, TableFiles]:
    """The config and the table's files that --var_config, --routing_stats and --answers name.

    Args:
        fields: of the config where there is no --var_config, in the place of the defaults.
    """
    files = table_files(args.routing_stats, args.answers, args.var_config)
    return VARConfig.load(args.var_config) if args.var_config else new_config(files, **fields), files


def new_config(files: TableFiles, **fields: Any) -> VARConfig:
    """A config that fits the files."""
    return VARConfig.from_routing_stats(files.routing_stats, files.answers, **fields)
