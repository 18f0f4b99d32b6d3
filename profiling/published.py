"""Published figures: the peak rates of accelerators, and the shapes of model checkpoints from their config.json.

A published rate is the vendor's peak, which no program reaches: dense matrix products (without structured sparsity) of
bfloat16 numbers accumulated in float32, and the nominal rate of the memory. A measured rate is what simple programs
reached on one machine: a large matrix product, a copy.

The models are mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924 and Qwen/Qwen3-30B-A3B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.config import MoEConfig, read_config
from profiling.costs import Cost


@dataclass(frozen=True)
class Hardware:
    """The peak rates of one accelerator."""

    name: str
    dtype: str  # of the numbers that are multiplied
    flops: float  # per second, dense matrix products
    bandwidth: float  # of the memory, bytes per second
    memory: float  # bytes
    source: str
    measured: bool = False  # not the vendor's peak but what a program reached


def _published(name: str, tflops: float, terabytes: float, gigabytes: float, source: str) -> Hardware:
    return Hardware(name, "bfloat16", tflops * 1e12, terabytes * 1e12, gigabytes * 1e9, source)


HARDWARE: Mapping[str, Hardware] = {
    "a100": _published("A100 80GB SXM", 312, 2.039, 80, "NVIDIA A100 80GB datasheet"),
    "h100": _published("H100 SXM", 989.4, 3.35, 80, "NVIDIA H100 datasheet; half of its figure with sparsity"),
    "h200": _published("H200 SXM", 989.4, 4.8, 141, "NVIDIA H200 datasheet; half of its figure with sparsity"),
    "b200": _published(
        "B200", 2250, 8.0, 180, "NVIDIA DGX B200 datasheet; an eighth of it, half of that with sparsity"
    ),
    "l40s": _published("L40S", 362.05, 0.864, 48, "NVIDIA L40S datasheet"),
    "rtx4090": _published("GeForce RTX 4090", 165.2, 1.008, 24, "NVIDIA Ada GPU architecture whitepaper"),
    "h200-measured": Hardware(
        "H200 SXM, measured",
        dtype="bfloat16",
        flops=790e12,
        bandwidth=4.3e12,
        memory=141e9,
        source="a large matrix product and a copy on one machine",
        measured=True,
    ),
}


def ceiling(costs: Mapping[str, Cost], hardware: Hardware) -> float:
    """The least time that components take one after the other, each limited by its arithmetic or its memory traffic.

    This is the roofline model (Williams, Waterman and Patterson 2009) by component, without launches or waiting. A
    program that moves the data of one component while another computes could be faster.

    Args:
        costs: component -> cost.
        hardware: the accelerator.

    Returns:
        Seconds.
    """
    return sum(max(cost.flops / hardware.flops, cost.bytes / hardware.bandwidth) for cost in costs.values())


_CONFIGS = Path(__file__).parent / "configs"
PUBLISHED: dict[str, MoEConfig] = {
    name: read_config(_CONFIGS / f"{name}.json") for name in ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b")
}
