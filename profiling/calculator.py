"""What would VAR give on this accelerator, at this batch size and this mix of tiers? Ceilings from published figures.

    python -m profiling.calculator --model mixtral-8x7b --hardware h200 --batch 1 --experts 1.0

Give the model (a directory with a config.json, such a file, "reference", "mixtral-8x7b", "olmoe-1b-7b" or
"qwen3-30b-a3b"), the accelerator, and how many experts VAR runs per token and layer: what `VARModel.summary` prints for
your text and your policy. Nothing is loaded and nothing is timed: each part of a call takes as long as its arithmetic
or its memory traffic at the hardware's full speed, whichever is slower. That is a ceiling, not a forecast.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from analysis.command import name_argument, program
from models.config import MoEConfig, read_config
from models.model import REFERENCE
from profiling.costs import component_costs, parameters
from profiling.hardware import HARDWARE, Hardware, ceiling, get_hardware
from profiling.published import PUBLISHED
from profiling.workload import Mix, Workload
from varjax.errors import InputError

KNOWN = ", ".join(("reference", *PUBLISHED))  # models that need no file
ITEMSIZES = {"bfloat16": 2, "float32": 4}
BATCHES = tuple(2**power for power in range(13))  # 1 to 4096
NO_GAIN = 1.05  # a speed-up under this counts as none
NEARLY_ALL = 0.8  # of the experts: from here on their weights are what keeps a call from getting quicker
CEILING = (
    "This is a ceiling, not a forecast. The rates are what the accelerator's full speed would allow, and every real",
    "program is slower, with VAR and without. The speed-up is that of a program equally far from full speed in all its",
    "parts: where experts run less well than the rest VAR gains more, where launches and waiting count, less.",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The ceilings of one kind of call: the plain model, and VAR."""

    workload: Workload
    plain: float  # tokens/s
    var: float  # tokens/s
    distinct: tuple[float, float]  # experts of a layer whose weights a call reads: plain and VAR

    @property
    def speedup(self) -> float:
        return self.var / self.plain


@program
def main(arguments: Sequence[str] | None) -> None:
    args = _parser().parse_args(arguments)
    config, hardware = _model(args.model), _hardware(args)
    asked = {name: getattr(args, name) for name in ("experts", "batch", "prompt", "context", "orders")}
    print(report(config, hardware, name=args.model, **asked))


def estimate(config: MoEConfig, hardware: Hardware, workload: Workload, experts: float, orders: int = 1) -> Estimate:
    """The ceilings of `workload` with K and with `experts` experts per token and layer, all drawn evenly.

    Args:
        orders: context orders that VAR looks up.

    Raises:
        InputError: the model does not run so many experts.
    """
    if not 0 <= experts <= config.top_k:
        raise InputError(f"experts={experts}: this model runs {config.top_k} per token; give 0 to {config.top_k}")
    plain = Mix.plain(config, workload.tokens)
    var = Mix.even(config, workload.tokens, experts, orders=orders)
    plain_seconds, var_seconds = (ceiling(component_costs(config, workload, mix), hardware) for mix in (plain, var))
    return Estimate(
        workload,
        plain=workload.tokens / plain_seconds,
        var=workload.tokens / var_seconds,
        distinct=(plain.distinct, var.distinct),
    )


def needed_memory(config: MoEConfig, workload: Workload) -> int:
    """Bytes of the parameters and of the key/value cache; what a call needs in between comes on top."""
    positions = workload.batch * (workload.cached + workload.length)
    cache = 2 * config.depth * positions * config.num_kv_heads * config.head_dim
    return workload.itemsize * (parameters(config) + cache)


def report(
    config: MoEConfig,
    hardware: Hardware,
    *,
    name: str,
    experts: float,
    batch: int,
    prompt: int,
    context: int,
    orders: int,
) -> str:
    """The answer, for people. The arguments are those of the command line."""
    itemsize = ITEMSIZES[hardware.dtype]

    def decoding(batch: int) -> Workload:
        return Workload(batch=batch, length=1, cached=context - 1, itemsize=itemsize)

    def of(workload: Workload) -> Estimate:
        return estimate(config, hardware, workload, experts, orders)

    by_batch = [of(decoding(size)) for size in sorted({*BATCHES, batch})]
    kind = "measured" if hardware.measured else "published"
    lines = [
        f"{name}: {parameters(config) / 1e9:.3g} billion parameters in {hardware.dtype}, {config.top_k} of "
        f"{config.num_experts} experts per token; VAR runs {experts:.2f} and looks up the rest",
        f"{hardware.name}: {hardware.flops / 1e12:,.4g} TFLOP/s, {hardware.bandwidth / 1e12:.4g} TB/s "
        f"({kind}: {hardware.source})",
        "",
        f"{'tokens/s at the ceiling':<34}{'plain':>12}{'VAR':>12}{'speed-up':>10}",
        _row(f"prefill, {batch} x {prompt:,} tokens", of(Workload(batch=batch, length=prompt, itemsize=itemsize))),
        _row(f"decode, batch {batch}, {context:,} keys", of(decoding(batch))),
        "",
        f"Decoding by batch size, {context:,} keys a sequence, the tokens' experts drawn evenly and independently:",
        f"{'batch':>7}{'plain':>12}{'VAR':>12}{'speed-up':>10}{'experts read, plain / VAR':>28}{'memory':>10}",
        *(_batch_row(config, hardware, one) for one in by_batch),
        "",
        where_it_vanishes(by_batch, config.num_experts),
        "",
        *CEILING,
    ]
    return "\n".join(lines)


def where_it_vanishes(by_batch: list[Estimate], num_experts: int) -> str:
    """The batch sizes at which decoding gains nothing, and why as far as the numbers say it."""
    without = [one.workload.batch for one in by_batch if one.speedup < NO_GAIN]
    gain = f"{NO_GAIN - 1:.0%}"
    if not without:
        return f"Decoding gains at least {gain} at every batch size up to {by_batch[-1].workload.batch:,}."
    words = f"Decoding gains less than {gain} at batch {without[0]:,}"
    if len(without) > 1:
        words += f" to {without[-1]:,}"
    if len(without) == len(by_batch):
        return words + ": at this mix there is nothing to gain."
    _, hit = next(one.distinct for one in by_batch if one.workload.batch == without[0])
    if hit < NEARLY_ALL * num_experts:
        return words + "."
    words += ": so many tokens hit nearly every expert, and its weights are read however few tokens run it."
    if without[-1] < by_batch[-1].workload.batch:
        words += "\nAbove that arithmetic decides, which does fall with the experts that run."
    return words


def _row(name: str, one: Estimate) -> str:
    return f"{name:<34}{one.plain:>12,.0f}{one.var:>12,.0f}{one.speedup:>9.2f}x"


def _batch_row(config: MoEConfig, hardware: Hardware, one: Estimate) -> str:
    memory = needed_memory(config, one.workload)
    fits = "" if memory <= hardware.memory else "  does not fit"
    read = "{:.2f} / {:.2f}".format(*one.distinct)
    return (
        f"{one.workload.batch:>7,}{one.plain:>12,.0f}{one.var:>12,.0f}{one.speedup:>9.2f}x{read:>28}"
        f"{memory / 1e9:>7,.0f} GB{fits}"
    )


def _model(name: str) -> MoEConfig:
    """The architecture of a directory, a config.json or a known name. Raises InputError that says what to do."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = REFERENCE if name == "reference" else Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise InputError(
            f"--model {name}: there is no {path}; give a directory with a config.json, such a file, or one of {KNOWN}"
        )
    return read_config(path)


def _hardware(args: argparse.Namespace) -> Hardware:
    """The entry of the table, or what the user says of another one."""
    given = {"--tflops": args.tflops, "--bandwidth": args.bandwidth, "--memory": args.memory, "--dtype": args.dtype}
    missing = [flag for flag, value in given.items() if value is None]
    if args.hardware is not None:
        if len(missing) < len(given):
            raise InputError(f"--hardware {args.hardware} says all of {', '.join(given)}; leave these out, or it")
        return get_hardware(args.hardware)
    if missing:
        raise InputError(f"no accelerator: give --hardware ({', '.join(HARDWARE)}), or also {' and '.join(missing)}")
    return Hardware(
        "as given", args.dtype, args.tflops * 1e12, args.bandwidth * 1e12, args.memory * 1e9, "the command line"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m profiling.calculator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=name_argument, required=True, help=f"directory, config.json, or one of {KNOWN}")
    parser.add_argument("--hardware", help=f"one of {', '.join(HARDWARE)}")
    parser.add_argument("--tflops", type=_positive, help="instead: dense matrix products, 10^12 operations a second")
    parser.add_argument("--bandwidth", type=_positive, help="and: memory bandwidth, TB/s")
    parser.add_argument("--memory", type=_positive, help="and: memory, GB")
    parser.add_argument("--dtype", choices=sorted(ITEMSIZES), help="and: of the parameters, which --tflops is for")
    parser.add_argument(
        "--experts", type=float, required=True, help="per token and layer under VAR, 0 to the model's K"
    )
    parser.add_argument("--batch", type=_count, default=1, help="sequences at once (1)")
    parser.add_argument("--prompt", type=_count, default=2048, help="tokens of a prompt (2048)")
    parser.add_argument("--context", type=_count, default=1024, help="keys that a decoded token attends to (1024)")
    parser.add_argument("--orders", type=_count, default=1, help="context orders that VAR looks up (1)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive integer")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected a positive number")


if __name__ == "__main__":
    main()
