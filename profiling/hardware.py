"""What accelerators can do at most: operations per second, bytes per second, bytes. And the time that costs take there.

A published figure is the vendor's peak, which no program reaches: dense matrix products (without structured sparsity)
of bfloat16 numbers that add up in float32, and the memory's nominal rate. A measured one is what simple programs
reached on one machine: a large matrix product, a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from profiling.costs import Cost
from varjax.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """The ceilings of one accelerator."""

    name: str
    dtype: str  # of the numbers that are multiplied
    flops: float  # per second, dense matrix products
    bandwidth: float  # bytes per second, of the memory
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


def get_hardware(name: str) -> Hardware:
    """The entry called `name`, capitals aside. Raises InputError if there is none."""
    if name.lower() not in HARDWARE:
        raise InputError(
            f"hardware {name!r} is not in the table; choose one of {', '.join(HARDWARE)}, or describe yours with "
            "profiling.hardware.Hardware"
        )
    return HARDWARE[name.lower()]


def ceiling(costs: Mapping[str, Cost], hardware: Hardware) -> float:
    """Seconds that the components take one after the other, each as long as its slower side, arithmetic or memory.

    The roofline model (Williams, Waterman and Patterson 2009), component by component: no launch, no wait, no
    inefficiency. A program that moves one component's data while another computes could be faster than this.
    """
    return sum(max(cost.flops / hardware.flops, cost.bytes / hardware.bandwidth) for cost in costs.values())
