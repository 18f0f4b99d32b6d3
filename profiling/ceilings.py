"""Measure what this machine can reach: matrix products, memory bandwidth, and the cost of a call.

    python -m profiling.ceilings [--full]

The programs are as simple as possible (one product, one copy, one sum), so their speed is a ceiling for programs that
do the same along with other work. Bandwidth is measured on an array larger than the usual last-level cache and on one
that fits into it, because the weights of a small model stay there. Everything is timed in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.command import HelpFormatter, path_argument, program
from analysis.report.output import Output
from analysis.report.provenance import write_json
from analysis.resampling import median_estimate
from profiling.timing import compare
from varjax.errors import InputError

DTYPES = ("float32", "bfloat16")
_MEBIBYTE = 2**20
_CALLS = 50  # in a timed run of what takes microseconds
_KERNELS = 65  # in the long program; the short one has one


@dataclasses.dataclass(frozen=True)
class Rate:
    """One measured figure: median and 95% bootstrap interval over rounds."""

    kind: str  # "product", "copy", "read" or "overhead"
    name: str  # its shape or size
    dtype: str
    value: float  # FLOP/s, bytes/s or seconds
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The figures of one machine."""

    device: str
    figures: tuple[Rate, ...]

    def best(self, kind: str, dtype: str = "float32", name: str = "") -> float:
        """The highest figure of a kind.

        Args:
            kind: of `Rate`.
            dtype: of `Rate`.
            name: what the figure's name starts with.

        Returns:
            FLOP/s, bytes/s or seconds.

        Raises:
            InputError: none was measured.
        """
        found = [
            one.value for one in self.figures if one.kind == kind and one.dtype == dtype and one.name.startswith(name)
        ]
        if not found:
            raise InputError(f"no figure of kind {kind!r}, dtype {dtype!r}, name {name!r} was measured; see measure()")
        return max(found)

    @property
    def product(self) -> float:
        """FLOP/s of the best float32 product."""
        return self.best("product")

    @property
    def memory(self) -> float:
        """Bytes/s from beyond the caches, the better of copy and read."""
        return max(self.best("copy", name="memory"), self.best("read", name="memory"))

    @property
    def cache(self) -> float:
        """Bytes/s within the last-level cache, the better of copy and read."""
        return max(self.best("copy", name="cache"), self.best("read", name="cache"))

    @property
    def call(self) -> float:
        """Seconds of a jitted call that does nothing, waited for."""
        return self.best("overhead", name="call")

    @property
    def kernel(self) -> float:
        """Seconds of one more small kernel inside a program."""
        return self.best("overhead", name="kernel")

    def __str__(self) -> str:
        units = {"product": (1e-9, "GFLOP/s"), "copy": (1e-9, "GB/s"), "read": (1e-9, "GB/s"), "overhead": (1e6, "µs")}
        lines = [f"{self.device}, median and 95% interval over rounds"]
        for one in self.figures:
            scale, unit = units[one.kind]
            interval = f"[{one.low * scale:,.1f}, {one.high * scale:,.1f}]"
            lines.append(f"  {one.kind:9}{one.name:32}{one.dtype:10}{one.value * scale:>10,.1f} {unit:8}{interval:>20}")
        return "\n".join(lines)


@program
def main(arguments: Sequence[str] | None) -> None:
    """Measure and print the ceilings, and save them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--full", action="store_true", help="use larger arrays and more rounds (takes half a minute)")
    parser.add_argument("--output", type=path_argument, help="JSON file to write, or a directory for it")
    args = parser.parse_args(arguments)
    if args.output is None:
        print(measure(quick=not args.full))
        return
    output = Output.of(args.output, "ceilings", (".json",))
    with output.locked():
        found = measure(quick=not args.full)
        write_json(output.main(".json"), found)
        print(found)


def measure(quick: bool = True, repeats: int | None = None, seed: int = 0, size: int | None = None) -> Ceilings:
    """Measure all figures of the default device.

    Args:
        quick: use smaller arrays; takes a few seconds.
        repeats: rounds; None: 7, or 15 if not quick.
        seed: of the numbers and of the order within rounds.
        size: rows and columns of the square product on a fast device, which only larger arrays keep busy; memory is
            then measured over 2 GiB. None: those of `quick`.

    Returns:
        The figures.
    """
    large = 2048 * _MEBIBYTE
    if size is None:
        size, large = (1024, 128 * _MEBIBYTE) if quick else (2048, 512 * _MEBIBYTE)
    rng = np.random.default_rng(seed)
    runs: dict[tuple[str, str, str], tuple[Callable[[], Any], float]] = {}  # with the work of each
    for dtype in DTYPES:
        for name, rows, inner, columns in (
            ("square", size, size, size),
            ("prefill", 256, 1024, 2 * size),
            ("decode, 8 rows", 8, 2 * size, 2 * size),
            ("matrix-vector", 1, 4096, 4096),
        ):
            left, right = (_random(rng, *of, dtype=dtype) for of in ((rows, inner), (inner, columns)))
            key = ("product", f"{name}: {rows} x {inner} x {columns}", dtype)
            runs[key] = (partial(_product, left, right), 2.0 * rows * inner * columns)
    for place, count, number in (("memory", large, 1), ("cache", 4 * _MEBIBYTE, _CALLS)):
        array = jnp.ones(count // 4, jnp.float32)
        name = f"{place}: {count // _MEBIBYTE} MiB"
        runs["copy", name, "float32"] = (partial(_repeated, partial(_copy, array), number), 2.0 * count * number)
        runs["read", name, "float32"] = (partial(_repeated, partial(_read, array), number), 1.0 * count * number)
    small = jnp.ones((8, 8), jnp.float32)
    for name, kernels in (("call", 1), ("kernel", _KERNELS)):
        runs["overhead", name, "float32"] = (partial(_repeated, partial(_chain, small, kernels=kernels), _CALLS), 0)

    rounds = (7 if quick else 15) if repeats is None else repeats
    seconds = compare({"/".join(key): run for key, (run, _) in runs.items()}, rounds, seed=seed)
    figures = []
    for key, (_, work) in runs.items():
        own = seconds["/".join(key)]
        if key[1] == "call":
            values = own / _CALLS
        elif key[1] == "kernel":
            # Noise may make the difference negative; an overhead is at least a nanosecond.
            values = np.maximum(own - seconds["overhead/call/float32"], 0) / _CALLS / (_KERNELS - 1) + 1e-9
        else:
            values = work / own
        figures.append(Rate(*key, *dataclasses.astuple(median_estimate(values))))
    return Ceilings(jax.devices()[0].device_kind, tuple(figures))


@jax.jit
def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return -x  # a mere copy might be optimized away


@jax.jit
def _read(x: jax.Array) -> jax.Array:
    return x.sum()


@partial(jax.jit, static_argnames="kernels")
def _chain(x: jax.Array, kernels: int) -> jax.Array:
    """Products of negligible size, each of which waits for the one before."""
    y = x
    for _ in range(kernels):
        y = jnp.dot(y, x)
    return y


def _repeated(run: Callable[[], Any], number: int) -> Any:
    for _ in range(number):
        out = jax.block_until_ready(run())
    return out


def _random(rng: np.random.Generator, *shape: int, dtype: str) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[0])), dtype)


if __name__ == "__main__":
    main()
