"""Published figures: the peak rates of accelerators, and the shapes of model checkpoints from their config.json.

A published rate is the vendor's peak, which no program reaches: dense matrix products (without structured sparsity) of
bfloat16 numbers accumulated in float32, and the nominal rate of the memory. A measured rate is what simple programs
reached on one machine: a large matrix product, a copy.

The models are mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924 and Qwen/Qwen3-30B-A3B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.config import MoEConfig
from profiling.costs import Cost
from varjax.errors import InputError


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


def get_hardware(name: str) -> Hardware:
    """Look up an accelerator.

    Args:
        name: a key of `HARDWARE`, in any case.

    Returns:
        Its rates.

    Raises:
        InputError: there is no such entry.
    """
    if name.lower() not in HARDWARE:
        raise InputError(
            f"hardware {name!r} is not in the table; choose one of {', '.join(HARDWARE)}, or describe yours with "
            "profiling.published.Hardware"
        )
    return HARDWARE[name.lower()]


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


MIXTRAL_8X7B = MoEConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
)
OLMOE_1B_7B = MoEConfig(
    family="olmoe",
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    top_k=8,
    rope_theta=1e4,
    max_position_embeddings=4096,
    query_key_norm="projection",
    normalize_top_k=False,
    router_aux_loss_coef=0.01,
    bos_token_id=None,
    eos_token_id=50279,
    pad_token_id=1,
)
QWEN3_30B_A3B = MoEConfig(
    family="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=768,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    query_key_norm="head",
    dense_size=6144,  # of layers without experts, of which it has none
    router_aux_loss_coef=0.001,
    bos_token_id=151643,
    eos_token_id=151645,
)
PUBLISHED = {"mixtral-8x7b": MIXTRAL_8X7B, "olmoe-1b-7b": OLMOE_1B_7B, "qwen3-30b-a3b": QWEN3_30B_A3B}
