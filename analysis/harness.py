"""Run tasks of lm-evaluation-harness (EleutherAI) on this library's forward pass, plain or under VAR.

    python -m analysis.harness --model reference --tasks my_task --include_path tasks --output results/harness.json

Prints the harness's own table and writes a JSON result. A task is one of the harness's (most download data) or your own
YAML file in --include_path. Requires the extra `eval`. `analysis.evaluate.harness_lm` explains how texts are read.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.command import HelpFormatter, add_dtype, name_argument, path_argument, program
from analysis.evaluate.harness_lm import HarnessLM  # says what to install where the harness is missing
from analysis.evaluate.losses import Caching, add_caching_arguments
from analysis.inputs import table_files
from analysis.report.output import Output
from analysis.report.provenance import provenance, write_json
from models import load_model
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel, load_table
from varjax.step import summary

UNITS = {
    "word_perplexity": "per word, as the task counts them",
    "byte_perplexity": "per byte of UTF-8, as the task counts them",
    "bits_per_byte": "bits, per byte of UTF-8",
    "max_length": "tokens",
    "stride": "tokens",
}
_TAKEN = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "task_hashes")  # from the harness
_SHARES = ("tiers", "hit_rate", "mispredictions", "experts_per_token", "layers")
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def evaluate(
    lm: HarnessLM,
    tasks: Sequence[Any],
    *,
    include_path: str | Path | None = None,
    task_manager: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks.

    Args:
        lm: the model.
        tasks: names, or task configs as dicts.
        include_path: a folder with your own YAML tasks.
        task_manager: `lm_eval.tasks.TaskManager`; None: one that knows the harness's tasks and `include_path`.
        options: of `lm_eval.simple_evaluate`, such as `limit` (documents of each task) and `num_fewshot`.

    Returns:
        The result of `lm_eval.simple_evaluate`, with the harness's `task_hashes` instead of the samples.

    Raises:
        InputError: a task is not known.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork to bootstrap, which JAX's threads forbid
    manager = task_manager or TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if isinstance(task, str) and not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"the harness knows no task {unknown[0]!r}; fix the name, or give the folder with its YAML file as "
            "include_path"
        )
    seeds = dict.fromkeys(_SEEDS, lm.seed)
    results = simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, **seeds, **options)
    samples = results.pop("samples")
    return results | {"task_hashes": {name: _task_hash(rows) for name, rows in samples.items()}}


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--model",
        default="reference",
        type=name_argument,
        help="directory, hub id, or 'reference', which comes with varjax",
    )
    add_dtype(parser)
    parser.add_argument("--var_config", type=path_argument, help="VARConfig as a JSON file (default: the plain model)")
    parser.add_argument(
        "--routing_stats", type=path_argument, help="routing statistics (default: those that the config names)"
    )
    parser.add_argument("--answers", type=path_argument, help="answers (default: those that the config names)")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of the tasks to run")
    parser.add_argument("--include_path", type=path_argument, help="folder with task definitions in YAML")
    parser.add_argument("--limit", type=int, help="maximum number of documents per task (default: all)")
    parser.add_argument(
        "--num_fewshot", type=int, help="examples before each question (default: as the task specifies)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="requests per batch")
    parser.add_argument(
        "--max_length", type=int, help="maximum number of tokens to read (default: the model's max_position_embeddings)"
    )
    add_caching_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="random seed for tasks that sample")
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("results/harness.json"),
        help="JSON file to write, or a directory for it",
    )
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "harness", (".json",))
    with output.locked():
        _command(args, output.main(".json"))


def _command(args: argparse.Namespace, path: Path) -> None:
    from lm_eval import __version__
    from lm_eval.utils import make_table

    model = load_model(args.model, args.dtype)
    config, files, table = VARConfig(enable_var=False), None, None
    if args.var_config:
        config = VARConfig.load(args.var_config)
        if config.enable_var:
            files = table_files(args.routing_stats, args.answers, args.var_config)
            table = load_table(model, config, files.routing_stats, files.answers)
    var_model = VARModel(model, config, table)
    lm = HarnessLM(
        var_model,
        batch_size=args.batch_size,
        max_length=args.max_length,
        caching=Caching.of(args),
        seed=args.seed,
    )
    asked = {"include_path": args.include_path, "limit": args.limit, "num_fewshot": args.num_fewshot}
    found = evaluate(lm, args.tasks, **asked)
    about = {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype.name}
    origin = {
        "model": about,
        "config": config,
        "table": files,
        "config_sha256": var_model.digest,
        "lm_eval": __version__,
    }
    result = {name: found[name] for name in _TAKEN if name in found}
    if lm.state is not None:
        shares = summary(lm.state.counters, model.config.top_k)
        result |= {name: shares[name] for name in _SHARES}
    result |= {"settings": {**lm.settings, **asked}, "units": UNITS}
    write_json(path, result | {"provenance": provenance(seed=args.seed, **origin)})
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    print(f"written to {path}")


def _task_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of a task's documents, prompts and targets, as the harness joins them."""
    parts = (sample[name] for sample in samples for name in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


if __name__ == "__main__":
    main()
