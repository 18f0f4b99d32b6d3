"""Compile the decoder for an H100, without one, and check what the compiler made of it.

    make gpu-check                                        # installs jax's CUDA plugin into build/gpu, then runs this
    python -m benchmarks.cuda --output results/cuda.md    # where jax[cuda12] is installed; the table in Markdown

XLA compiles for a device of which it only knows a description. Nothing runs, no weights are read, and kernels are not
tuned to the device, so this shows memory, copies and numbers of kernels, and not how fast they are. Models have two and
four layers; what a layer adds is the difference, and memory at full depth follows from it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays live there; programs are compiled for the described device

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from analysis.command import path_argument, program
from benchmarks import harness
from models.config import MoEConfig
from models.decoder import Network
from models.experts import get_engine
from models.kv_cache import KVCache
from models.model import plain_step
from models.parameters import init_params, prepare
from profiling.published import PUBLISHED
from varjax.errors import InputError
from varjax.files import replacing

GB = 1e9
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""  # of XLA's `GpuTargetConfigProto`: figures of NVIDIA's H100 SXM5 datasheet and of its CUDA limits
# Kernels that a layer starts in a step of decoding, at batch 8 and at batch 1: what is reached today.
KERNELS = {"mixtral-8x7b": (24, 30), "olmoe-1b-7b": (26, 30.5), "qwen3-30b-a3b": (29, 31.5)}
_FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "while"}  # instructions without a kernel
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(?[a-z]\w*\[.*?) ([a-z][a-z\-]*)\(", re.MULTILINE)
_ARRAY = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    held: int  # bytes of arguments and of results with memory of their own
    temporaries: int  # bytes
    text: str  # optimized HLO

    @cached_property
    def entry(self) -> list[tuple[str, str]]:
        """The shape and the operation of each instruction that runs once per call."""
        start = self.text.index("\nENTRY ")
        return [(found[1], found[2]) for found in _INSTRUCTION.finditer(self.text, start)]

    @property
    def kernels(self) -> int:
        """Instructions that start a kernel, at least."""
        return sum(operation not in _FREE for _, operation in self.entry)

    @property
    def pallas_calls(self) -> int:
        """Kernels of `models.experts_pallas`."""
        return self.text.count('custom_call_target="__gpu$xla.gpu.triton"')

    def written(self, elements: int) -> int:
        """Arrays of at least this many elements that are written anew, updates in place excepted."""
        lines = self.text[self.text.index("\nENTRY ") :].splitlines()
        return sum(
            max(map(_elements, _ARRAY.findall(found[1])), default=0) >= elements
            for line in lines
            if (found := _INSTRUCTION.match(line)) and found[2] not in _FREE and "dynamic_update_slice" not in line
        )


@dataclasses.dataclass(frozen=True)
class Check:
    """What must hold for a program."""

    name: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        return self.value <= self.most


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--shapes", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), help="what to compile"
    )
    options.add_argument("--output", type=path_argument, help="Markdown file for the table (default: only print it)")
    args = options.parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here cannot be loaded here
    columns = ("model", "program", "at full depth", "temporaries", "kernels per layer")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    failed: list[str] = []
    for name in args.shapes:
        for title, shallow, deep, seconds, checks in compiled(PUBLISHED[name], KERNELS[name]):
            layers = PUBLISHED[name].num_layers
            whole = shallow.held + (deep.held - shallow.held) / 2 * (layers - 2) + deep.temporaries
            each = (deep.kernels - shallow.kernels) / 2
            cells = (name, title, f"{whole / GB:.1f} GB", f"{deep.temporaries / GB:.2f} GB", f"{each:g}")
            lines.append(f"| {' | '.join(cells)} |")
            print(f"{lines[-1]} compiled in {seconds:.0f} s", flush=True)
            for check in checks:
                said = f"  {'ok' if check.holds else 'FAILS'}: {check.name}: {check.value:g}, at most {check.most:g}"
                print(said, flush=True)
                failed += [] if check.holds else [f"{name}, {title}: {check.name}: {check.value:g}"]
    if args.output:
        with replacing(args.output) as file:
            file.write_text("\n".join(lines) + "\n")
    if failed:
        raise InputError("\n".join(["the compiled programs break a bound:", *failed]))


def compiled(
    config: MoEConfig, kernels: tuple[float, float]
) -> Iterator[tuple[str, Program, Program, float, list[Check]]]:
    """Each program with two layers and with four, the seconds that took, and what must hold for it."""
    for title, lower, checks in programs(config, kernels):
        shallow, deep = (dataclasses.replace(config, num_layers=layers) for layers in (2, 4))
        start = time.perf_counter()
        few, many = _program(lower(shallow)), _program(lower(deep))
        yield title, few, many, time.perf_counter() - start, checks(few, many)


def programs(
    config: MoEConfig, kernels: tuple[float, float]
) -> list[tuple[str, Callable[[MoEConfig], Any], Callable[[Program, Program], list[Check]]]]:
    """Name, what lowers it for a number of layers, and its checks; `kernels` as in `KERNELS`."""

    def prefill(few: Program, many: Program) -> list[Check]:
        return [Check("GB of temporaries", many.temporaries / GB, 3)]

    def decode(batch: int, slots: int, most: float, few: Program, many: Program) -> list[Check]:
        cache = batch * slots * config.num_kv_heads * config.head_dim
        return [
            Check("arrays of the size of a layer's cache that are written", many.written(cache), 0),
            Check("kernels per layer", (many.kernels - few.kernels) / 2, most),
            Check("Pallas calls per layer", (many.pallas_calls - few.pallas_calls) / 2, 2),
        ]

    return [
        ("prefill 1 x 32,768", partial(step, batch=1, length=32768, slots=32768), prefill),
        ("decode 8 x 1 of 4,096", partial(step, batch=8, length=1, slots=4096), partial(decode, 8, 4096, kernels[0])),
        (
            "decode 1 x 1 of 32,768",
            partial(step, batch=1, length=1, slots=32768),
            partial(decode, 1, 32768, kernels[1]),
        ),
    ]


def step(config: MoEConfig, *, batch: int, length: int, slots: int) -> Any:
    """A call of the plain model with a key/value cache, lowered."""
    engine = get_engine("pallas")
    params = jax.eval_shape(lambda: prepare(init_params(config, jax.random.key(0), jnp.bfloat16), engine))
    kv = jax.eval_shape(lambda: KVCache.empty(config, batch, slots, jnp.bfloat16))
    ids, mask = (jax.ShapeDtypeStruct((batch, length), kind) for kind in (jnp.int32, jnp.bool))
    return plain_step.lower(*on_device((params, kv, ids, mask)), network=Network(config, engine))


def on_device(tree: Any) -> Any:
    """Shapes of arrays on the described device."""
    where = jax.sharding.SingleDeviceSharding(_device())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _device() -> Any:
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def _program(lowered: Any) -> Program:
    made = lowered.compile()
    memory = made.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(held, memory.temp_size_in_bytes, made.as_text())


def _elements(shape: str) -> int:
    found = 1
    for size in filter(None, shape.split(",")):
        found *= int(size)
    return found


if __name__ == "__main__":
    main()
