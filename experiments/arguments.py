"""What the phase scripts share: their common arguments, and the loading of model and documents."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from analysis.command import HelpFormatter, add_dtype, name_argument, path_argument
from analysis.evaluate.losses import Caching
from analysis.evaluate.points import Subject
from analysis.inputs import STATISTICS, listed, table_files
from analysis.text import card
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.encoding import Encoded
from models import Model, load_model
from models.placement import DATA, MeshError, make_mesh
from varjax import VARConfig
from varjax.errors import InputError
from varjax.model import load_statistics
from varjax.tablefiles import TableFiles

AUTO = "auto"
NOTICED_AFTER = 20  # seconds without a sign of life after which a process counts as gone
DATASET_HELP = (
    "'embedded'; a .txt file (with <|endofdoc|> lines between documents), .jsonl, .json or .parquet file, which may be "
    "compressed (.gz, .zst); a directory of such files or one from prepare_datasets.py; or a hub dataset as "
    "name[:config[:split]]"
)


def parser(description: str | None, default_output: str) -> argparse.ArgumentParser:
    """Make a parser with the options that every phase has.

    Args:
        description: what the program does.
        default_output: default of `--output`.

    Returns:
        The parser.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add_dtype(made)
    add_options(
        made,
        ("model", name_argument, "reference", "model directory, hub id, or 'reference', which comes with varjax"),
        (
            "implementation",
            str,
            None,
            "expert engine, see models/experts.py (default: chosen for the device)",
        ),
        ("dataset", name_argument, "embedded", f"documents to read: {DATASET_HELP}"),
        ("text_column", str, "text", "name of the text field in JSONL, Parquet and hub datasets"),
        ("num_samples", int, None, "maximum number of documents to read"),
        ("output", path_argument, Path(default_output), "file or directory to write to"),
        ("seed", int, 0, "random seed"),
        ("batch_size", int, 8, "sequences of max_length tokens per batch"),
        ("max_length", int, 256, "tokens per window, and thus the longest context of a token"),
    )
    add_mesh(made)
    return made


def add_table(made: argparse.ArgumentParser, otherwise: str) -> None:
    """Add the options that name a policy and the files of its table.

    Args:
        made: the parser.
        otherwise: which config is used without `--var_config`, for the help.
    """
    add_options(
        made,
        (
            "routing_stats",
            path_argument,
            None,
            "routing_stats.parquet from phase 1 (default: the file that the config names, or else the first of "
            f"{listed(STATISTICS)} that exists)",
        ),
        (
            "answers",
            path_argument,
            None,
            "answers to use, such as distilled ones (default: the answers next to the statistics)",
        ),
        ("var_config", path_argument, None, f"VARConfig as a JSON file (default: {otherwise})"),
    )


def add_options(made: argparse.ArgumentParser, *options: tuple[str, Any, Any, str]) -> None:
    """Add options that take one value each.

    Args:
        made: the parser.
        options: name, type, default and help of each option.
    """
    for name, kind, default, text in options:
        made.add_argument(f"--{name}", type=kind, default=default, help=text)


def arguments_of(args: argparse.Namespace) -> dict[str, str]:
    """List the arguments that decide what a command finds.

    Args:
        args: the options of any program.

    Returns:
        All of them by name, but for the number of the process, as text.
    """
    return {name: str(value) for name, value in sorted(vars(args).items()) if name != "process_id"}


def add_mesh(made: argparse.ArgumentParser) -> None:
    """Add `--mesh`.

    Args:
        made: the parser.
    """
    made.add_argument(
        "--mesh",
        metavar="data=D,model=M",
        help="devices to use: the model is divided across M devices, and each batch across D such groups; see "
        "docs/scaling.md (default: one device)",
    )


def asked_mesh(args: argparse.Namespace) -> Mesh | None:
    """Make the mesh of devices.

    Args:
        args: the options of `add_mesh`.

    Returns:
        The mesh; None: one device.

    Raises:
        MeshError: the mesh is malformed, or leaves out devices of processes that were joined.
    """
    if not jax.distributed.is_initialized():
        return None if args.mesh is None else make_mesh(args.mesh)
    present = jax.device_count()
    mesh = make_mesh(args.mesh or f"{DATA}={present}")
    if mesh.size < present:
        raise MeshError(f"mesh {args.mesh!r}: the joined processes have {present} devices; give a mesh of that size")
    return mesh


def open_model(args: argparse.Namespace) -> Model:
    """Load the model.

    Args:
        args: the options of `parser`.

    Returns:
        The model on the devices that `--mesh` asks for.
    """
    return load_model(args.model, args.dtype, args.implementation, asked_mesh(args))


def load(args: argparse.Namespace, split: str, limit: int | None) -> tuple[Model, list[Encoded], dict[str, Any]]:
    """Load the model and the documents of a split.

    Args:
        args: the options of `parser`.
        split: which documents; "all" for every one.
        limit: the most documents; None: all.

    Returns:
        The model, the documents in its token ids, and what a result file states about both.
    """
    model = open_model(args)
    corpus = open_corpus(model, args, split, limit)
    documents = list(corpus)
    about = {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype.name}
    return model, documents, {"model": about, "data": corpus.about, "card": card.announced(model, args.dataset)}


def open_corpus(model: Model, args: argparse.Namespace, split: str, limit: int | None) -> EncodedCorpus:
    """Open the documents of a split, to be read as often as needed.

    Args:
        model: its tokenizer is used.
        args: the options of `parser`.
        split: which documents; "all" for every one.
        limit: the most documents; None: all.

    Returns:
        The corpus in the model's token ids.
    """
    wanted = None if split == "all" else split
    return EncodedCorpus(args.dataset, wanted, limit, model.tokenizer, model.config, args.text_column)


def asked_config(args: argparse.Namespace, **fields: Any) -> tuple[VARConfig, TableFiles]:
    """Make or load the config.

    Args:
        args: the options of `add_table`.
        **fields: of the config where there is no `--var_config`.

    Returns:
        The config and the files of its table.
    """
    files = table_files(args.routing_stats, args.answers, args.var_config)
    if args.var_config:
        return VARConfig.load(args.var_config), files
    return VARConfig.from_routing_stats(files.routing_stats, files.answers, **fields), files


def make_subject(
    args: argparse.Namespace, model: Model, config: VARConfig, files: TableFiles, documents: list[Encoded], **more: Any
) -> Subject:
    """Put together what is scored.

    Args:
        args: the options of `parser` and of `add_caching_arguments`.
        model: the model.
        config: the policy.
        files: statistics and answers, both of which are needed.
        documents: what is read.
        **more: other fields of the subject.

    Returns:
        The subject.

    Raises:
        InputError: there are no answers, or a file belongs to another model.
    """
    stats, answers = load_statistics(model, files)
    if answers is None:
        raise InputError(f"{files.routing_stats}: no answers next to it; run 01_routing_analysis.py with --answers")
    more |= {name: getattr(args, name) for name in ("batch_size", "max_length", "seed")}
    more |= {"caching": Caching.of(args), "table_sha256": files.digest()}
    return Subject(model, stats, answers, config, documents, **more)


def add_hosts(made: argparse.ArgumentParser) -> None:
    """Add the options of a program that several processes run, on one machine or on many.

    Args:
        made: the parser.
    """
    made.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="run one program on the devices of all --num_processes processes (docs/scaling.md): the address at which "
        f"the first process listens, or {AUTO!r} to take the address and the numbers from SLURM, MPI or Kubernetes",
    )
    add_options(
        made,
        ("num_processes", int, 1, "number of processes"),
        ("process_id", int, 0, "number of this process, starting from 0"),
    )


def join(args: argparse.Namespace) -> None:
    """Join the other processes if `--coordinator` is given.

    All processes have the same arguments, read the same files and compute every result; the model and its batches are
    divided over all devices (`--mesh`). Only the first one prints and writes from then on.

    Args:
        args: the options of `add_hosts`.

    Raises:
        InputError: the options contradict each other.
    """
    if args.coordinator is None:
        return
    given: dict[str, Any] = {}
    if args.coordinator != AUTO:
        last = args.num_processes - 1
        if not 0 <= args.process_id <= last:
            raise InputError(f"process {args.process_id} of {last + 1}: expected a process from 0 to {last}")
        given = {"coordinator_address": args.coordinator, "num_processes": last + 1, "process_id": args.process_id}
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=NOTICED_AFTER, shutdown_timeout_seconds=NOTICED_AFTER)
    if jax.process_index() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
