"""Compile programs for an H100 without one, and read their memory, their kernels and what these spill.

Only jax's CUDA plugin and NVIDIA's compiler are needed. Kernels, their grids and their shared memory are those that XLA
will launch, from the plan of launches that it dumps; spilled registers are from NVIDIA's assembler.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

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
PALLAS = ("attend", "gate_and_up", "down")  # the kernels that this project writes

_LAUNCH = re.compile(
    r"^(\d+): k(\w+) +\[[^\]]*\] *(\S+)(?: grid: \[(\d+), (\d+), (\d+)\].*shared_memory: (\d+))?", re.M
)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(?[a-z]\w*\[.*?) ([a-z][a-z\-]*)\(", re.MULTILINE)
_ARRAY = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")
_SPILLS = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", re.DOTALL)
_NOT_WRITTEN = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "while"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One step of a program: a kernel, a copy or a loop."""

    name: str
    grid: tuple[int, int, int]  # programs along each axis; a copy or a loop counts as one
    shared: int  # bytes of shared memory of each


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    held: int  # bytes of arguments and of results with memory of their own
    temporaries: int  # bytes
    launches: list[Launch]  # in their order, a loop counted as one
    spills: dict[str, int]  # bytes that each of our kernels spills
    text: str  # optimized HLO

    @property
    def pallas(self) -> list[Launch]:
        """The launches of our kernels."""
        return [launch for launch in self.launches if launch.name in PALLAS]

    def sums(self, operation: str) -> list[str]:
        """The dtypes in which the program adds up.

        Args:
            operation: "dot", of matrices, or "reduce".

        Returns:
            One for each, such as "f32".
        """
        return re.findall(rf"= ([a-z]\w*)\[[^ ]* {operation}\(", self.text)

    def written(self, elements: int) -> int:
        """Count the arrays of at least this many elements that are written anew, not only updated in place."""
        lines = self.text[self.text.index("\nENTRY ") :].splitlines()
        return sum(
            max(map(_elements, _ARRAY.findall(found[1])), default=0) >= elements
            for line in lines
            if (found := _INSTRUCTION.match(line)) and found[2] not in _NOT_WRITTEN and _UPDATE not in line
        )


_UPDATE = "dynamic_update_slice"  # in the name of an instruction that updates an array in place


@lru_cache
def device() -> Any:
    """The described device, always the same."""
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def on_device(tree: Any, where: Any = None) -> Any:
    """Shapes of arrays on the described device.

    Args:
        tree: of arrays or shapes.
        where: a sharding; None: of the one device.

    Returns:
        The same tree of shapes.
    """
    where = where or jax.sharding.SingleDeviceSharding(device())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def compiled(lowered: Any) -> Program:
    """Compile a program.

    Args:
        lowered: from `jax.jit(...).lower` with arguments of `on_device`.

    Returns:
        Its memory, launches and spills.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = lowered.compile(compiler_options={"xla_dump_to": folder})
        (plan,) = Path(folder).glob("*.thunk_sequence.txt")
        launches, spills = launches_of(plan.read_text()), _spills(Path(folder))
    memory = made.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(held, memory.temp_size_in_bytes, launches, spills, made.as_text())


def launches_of(plan: str) -> list[Launch]:
    """Read the launches of a program.

    Args:
        plan: XLA's `thunk_sequence.txt`; what loops and conditions launch is indented.

    Returns:
        The launches that are not.
    """
    found = []
    for line in _LAUNCH.finditer(plan):
        _, _, name, *grid, shared = line.groups()
        sizes = [int(size or 1) for size in grid]
        found.append(Launch(name, (sizes[0], sizes[1], sizes[2]), int(shared or 0)))
    return found


def _spills(folder: Path) -> dict[str, int]:
    """Bytes of registers that each of our kernels spills, by NVIDIA's assembler on XLA's output."""
    found: dict[str, int] = {}
    for path in folder.glob("*.ptx"):
        if any(f".entry {name}" in (text := path.read_text()) for name in PALLAS):
            target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
            assert target is not None
            command = [_assembler(), "--verbose", f"--gpu-name={target[1]}", "--output-file=/dev/null", str(path)]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            for name, spilled in _SPILLS.findall(said.stderr):
                if name in PALLAS:  # of which a program may have several variants
                    found[name] = max(found.get(name, 0), int(spilled))
    return found


@lru_cache
def _assembler() -> str:
    """The path of ptxas in the package that brings it."""
    package = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert package is not None and package.submodule_search_locations
    return str(Path(next(iter(package.submodule_search_locations))) / "bin" / "ptxas")


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in filter(None, shape.split(",")))
