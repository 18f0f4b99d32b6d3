"""How much could VAR gain on an accelerator, at a given batch size and mix of tiers? Ceilings from published figures.

    python -m profiling.calculator --model mixtral-8x7b --hardware h200 --batch 1 --experts 1.0

Give the model (a directory with a config.json, such a file, "reference", "mixtral-8x7b", "olmoe-1b-7b" or
"qwen3-30b-a3b"), the accelerator, and how many experts VAR runs per token and layer, which `VARModel.summary` prints.
Nothing is loaded and nothing is timed: each part of a call takes as long as its arithmetic or its memory traffic at the
full speed of the hardware, whichever is slower. That is a ceiling, not a forecast.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from analysis.command import HelpFormatter, name_argument, program
from models.config import MoEConfig, read_config
from models.model import REFERENCE
from profiling.costs import Mix, Workload, component_costs, parameters
from profiling.published import HARDWARE, PUBLISHED, Hardware, ceiling
from varjax.errors import InputError

_KNOWN = ", ".join(("reference", *PUBLISHED))  # models that need no file
_ITEMSIZES = {"bfloat16": 2, "float32": 4}
_BATCHES = tuple(2**power for power in range(13))  # 1 to 4096
_NO_GAIN = 1.05  # a speed-up below this counts as none
_NEARLY_ALL = 0.8  # of the experts: from here on reading their weights limits a call
_CEILING = (
    "This is a ceiling, not a forecast: every real program is slower, with VAR or without. The speed-up is that of a",
    "program equally far from full speed in all its parts. Where experts run less efficiently than the rest, VAR gains",
    "more; where launches and waiting count, less.",
)


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The ceilings of one kind of call: the plain model, and VAR."""

    workload: Workload
    plain: float  # tokens/s
    var: float  # tokens/s
    distinct: tuple[float, float]  # experts of a layer whose weights a call reads: plain and VAR

    @property
    def speedup(self) -> float:
        """Of VAR over the plain model."""
        return self.var / self.plain


@program
def main(arguments: Sequence[str] | None) -> None:
    """Print the ceilings that the command line asks for."""
    args = _parser().parse_args(arguments)
    config, hardware = _model(args.model), _hardware(args)
    names = ("experts", "batch", "prompt", "context", "orders", "answer_rank")
    asked = {name: getattr(args, name) for name in names}
    print(_report(config, hardware, name=args.model, **asked))


def _estimate(
    config: MoEConfig, hardware: Hardware, workload: Workload, experts: float, orders: int = 1, answer_rank: int = 0
) -> Ceiling:
    """The ceilings of a call, with experts drawn evenly."""
    if not 0 <= experts <= config.top_k:
        raise InputError(f"experts={experts}: this model runs {config.top_k} per token; give 0 to {config.top_k}")
    if not 0 <= answer_rank <= config.hidden_size:
        raise InputError(f"answer_rank={answer_rank}: expected 0 to this model's hidden size, {config.hidden_size}")
    plain_mix = Mix.plain(config, workload.tokens)
    mixes = plain_mix, Mix.even(config, workload.tokens, experts, orders, answer_rank=answer_rank)
    plain, var = (workload.tokens / ceiling(component_costs(config, workload, mix), hardware) for mix in mixes)
    return Ceiling(workload, plain, var, distinct=(mixes[0].distinct, mixes[1].distinct))


def _needed_memory(config: MoEConfig, workload: Workload) -> int:
    """Memory for the parameters and the key/value cache, without the intermediate arrays of a call."""
    positions = workload.batch * (workload.cached + workload.length)
    cache = 2 * config.depth * positions * config.num_kv_heads * config.head_dim
    return workload.itemsize * (parameters(config) + cache)


def _report(
    config: MoEConfig,
    hardware: Hardware,
    *,
    name: str,
    experts: float,
    batch: int,
    prompt: int,
    context: int,
    orders: int,
    answer_rank: int,
) -> str:
    """The answer in words and tables; the arguments are those of the command line."""
    itemsize = _ITEMSIZES[hardware.dtype]

    def decoding(size: int) -> Ceiling:
        workload = Workload(size, 1, context - 1, itemsize=itemsize)
        return _estimate(config, hardware, workload, experts, orders, answer_rank)

    def row(what: str, one: Ceiling) -> str:
        return f"{what:<34}{one.plain:>12,.0f}{one.var:>12,.0f}{one.speedup:>9.2f}x"

    by_batch = [decoding(size) for size in sorted({*_BATCHES, batch})]
    whole = Workload(batch, prompt, itemsize=itemsize)
    prefill = _estimate(config, hardware, whole, experts, orders, answer_rank)
    maps = f", with maps of rank {answer_rank}" if answer_rank else ""
    lines = [
        f"{name}: {parameters(config) / 1e9:.3g} billion parameters in {hardware.dtype}, {config.top_k} of "
        f"{config.num_experts} experts per token; VAR runs {experts:.2f} and looks up the rest{maps}",
        f"{hardware.name}: {hardware.flops / 1e12:,.4g} TFLOP/s, {hardware.bandwidth / 1e12:.4g} TB/s "
        f"({'measured' if hardware.measured else 'published'}: {hardware.source})",
        "",
        f"{'tokens/s at the ceiling':<34}{'plain':>12}{'VAR':>12}{'speed-up':>10}",
        row(f"prefill, {batch} x {prompt:,} tokens", prefill),
        row(f"decode, batch {batch}, {context:,} keys", decoding(batch)),
        "",
        f"Decoding by batch size, {context:,} keys per sequence, experts drawn evenly and independently:",
        f"{'batch':>7}{'plain':>12}{'VAR':>12}{'speed-up':>10}{'experts read, plain / VAR':>28}{'memory':>10}",
    ]
    for one in by_batch:
        memory = _needed_memory(config, one.workload)
        read = "{:.2f} / {:.2f}".format(*one.distinct)
        lines.append(
            f"{one.workload.batch:>7,}{one.plain:>12,.0f}{one.var:>12,.0f}{one.speedup:>9.2f}x{read:>28}"
            f"{memory / 1e9:>7,.0f} GB{'' if memory <= hardware.memory else '  does not fit'}"
        )
    return "\n".join([*lines, "", _where_it_vanishes(by_batch, config.num_experts), "", *_CEILING])


def _where_it_vanishes(by_batch: Sequence[Ceiling], num_experts: int) -> str:
    """Say at which batch sizes decoding gains nothing and, where the numbers show it, why."""
    without = [one for one in by_batch if one.speedup < _NO_GAIN]
    gain, largest = f"{_NO_GAIN - 1:.0%}", by_batch[-1].workload.batch
    if not without:
        return f"Decoding gains at least {gain} at every batch size up to {largest:,}."
    first, last = without[0].workload.batch, without[-1].workload.batch
    words = f"Decoding gains less than {gain} at batch {first:,}" + (f" to {last:,}" if len(without) > 1 else "")
    if len(without) == len(by_batch):
        return words + ": with this mix there is nothing to gain."
    if without[0].distinct[1] < _NEARLY_ALL * num_experts:
        return words + "."
    words += ": that many tokens use nearly every expert, whose weights are read however few tokens run it."
    if last < largest:
        words += "\nAt larger batches arithmetic is the limit, which does fall with the experts that run."
    return words


def _model(name: str) -> MoEConfig:
    """The architecture of a directory, a config.json or a known name."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = REFERENCE if name == "reference" else Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise InputError(
            f"--model {name}: there is no {path}; give a directory with a config.json, such a file, or one of {_KNOWN}"
        )
    return read_config(path)


def _hardware(args: argparse.Namespace) -> Hardware:
    """The entry of the table, or the one that the other options describe."""
    given = {"--tflops": args.tflops, "--bandwidth": args.bandwidth, "--memory": args.memory, "--dtype": args.dtype}
    missing = [flag for flag, value in given.items() if value is None]
    if args.hardware is not None:
        if len(missing) < len(given):
            raise InputError(f"--hardware {args.hardware} implies {', '.join(given)}; leave these out, or --hardware")
        if args.hardware.lower() not in HARDWARE:
            raise InputError(
                f"--hardware {args.hardware} is not in the table; choose one of {', '.join(HARDWARE)}, or describe "
                f"yours with {', '.join(given)}"
            )
        return HARDWARE[args.hardware.lower()]
    if missing:
        raise InputError(f"no accelerator: give --hardware ({', '.join(HARDWARE)}), or also {' and '.join(missing)}")
    rates = args.tflops * 1e12, args.bandwidth * 1e12, args.memory * 1e9
    return Hardware("as given", args.dtype, *rates, "the command line")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m profiling.calculator", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--model", type=name_argument, required=True, help=f"directory, config.json, or one of {_KNOWN}")
    add("--hardware", help=f"accelerator, one of {', '.join(HARDWARE)}; or describe it with the next four options")
    add("--tflops", type=_positive, help="rate of dense matrix products, in 10^12 operations per second")
    add("--bandwidth", type=_positive, help="memory bandwidth, in TB/s")
    add("--memory", type=_positive, help="memory size, in GB")
    add("--dtype", choices=sorted(_ITEMSIZES), help="data type of the parameters, for which --tflops holds")
    add("--experts", type=float, required=True, help="experts per token and layer under VAR, 0 to the model's K")
    add("--batch", type=_count, default=1, help="sequences per call")
    add("--prompt", type=_count, default=2048, help="tokens per prompt")
    add("--context", type=_count, default=1024, help="keys that a decoded token attends to")
    add("--orders", type=_count, default=1, help="number of context orders that VAR looks up")
    add("--answer_rank", type=_count_or_none, default=0, help="rank of the maps of affine answers; 0: constant answers")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive integer")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected a positive number")


if __name__ == "__main__":
    main()
