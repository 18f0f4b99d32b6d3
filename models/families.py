"""The published format of each family of checkpoints, as data: names of config fields and tensors, and constants.

The decoder (`models.decoder`) treats all families alike: their mathematical differences are fields of `MoEConfig`, and
their differences on disk are here. `models.config` reads and writes config.json by these tables, `models.weights` the
tensors.

The tables follow Hugging Face's `mixtral`, `olmoe` (Muennighoff et al. 2024, arXiv 2409.02060) and `qwen3_moe` (Qwen
team 2025, arXiv 2505.09388).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A published format. "Ours" are fields of `MoEConfig`, "theirs" fields of config.json."""

    architecture: str  # transformers' class
    fields: Mapping[str, str]  # ours -> theirs, in addition to COMMON_FIELDS or in place of it
    tensors: Mapping[str, tuple[str, bool]]  # as COMMON_TENSORS, for this family only
    defaults: Mapping[str, Any]  # ours -> value where config.json leaves the field out
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # published tensor -> transformers 5's name
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # ours -> value in every model of the family
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)  # alternative name -> theirs
    unsupported: tuple[str, ...] = ()  # theirs; must be null or absent
    window_switch: str | None = None  # theirs; without this flag the sliding window is ignored
    dense_layers: tuple[str, str] | None = None  # theirs: layers without experts; n if only each n-th layer has some


# our field -> theirs, in every family; `num_hidden_layers` counts layers with and without experts
COMMON_FIELDS = {
    **{name: name for name in ("vocab_size", "hidden_size", "head_dim", "rms_norm_eps", "max_position_embeddings")},
    **{name: name for name in ("tie_word_embeddings", "initializer_range", "router_aux_loss_coef")},
    **{name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "num_experts_per_tok",
}

# canonical path, with {} for a layer or an expert -> (published name, stored transposed)
COMMON_TENSORS = {
    "decoder/embed/embedding": ("model.embed_tokens.weight", False),
    "decoder/layers/{}/input_norm/weight": ("model.layers.{}.input_layernorm.weight", False),
    "decoder/layers/{}/attention/q_proj/kernel": ("model.layers.{}.self_attn.q_proj.weight", True),
    "decoder/layers/{}/attention/k_proj/kernel": ("model.layers.{}.self_attn.k_proj.weight", True),
    "decoder/layers/{}/attention/v_proj/kernel": ("model.layers.{}.self_attn.v_proj.weight", True),
    "decoder/layers/{}/attention/o_proj/kernel": ("model.layers.{}.self_attn.o_proj.weight", True),
    "decoder/layers/{}/expert_norm/weight": ("model.layers.{}.post_attention_layernorm.weight", False),
    "decoder/norm/weight": ("model.norm.weight", False),
    "decoder/head/kernel": ("lm_head.weight", True),
}
# How transformers 5 holds experts, in every family: all experts of a layer in one tensor, with these parts of each
# expert concatenated along the second axis.
STACKED_EXPERTS = {
    "model.layers.{}.mlp.experts.gate_up_proj": ("gate", "up"),
    "model.layers.{}.mlp.experts.down_proj": ("down",),
}
_MIXTRAL_TENSORS = {
    "decoder/layers/{}/gate/kernel": ("model.layers.{}.block_sparse_moe.gate.weight", True),
    "experts/{}/{}/gate": ("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", True),
    "experts/{}/{}/down": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", True),
    "experts/{}/{}/up": ("model.layers.{}.block_sparse_moe.experts.{}.w3.weight", True),
}
_OLMOE_TENSORS = {
    "decoder/layers/{}/attention/q_proj/bias": ("model.layers.{}.self_attn.q_proj.bias", False),
    "decoder/layers/{}/attention/k_proj/bias": ("model.layers.{}.self_attn.k_proj.bias", False),
    "decoder/layers/{}/attention/v_proj/bias": ("model.layers.{}.self_attn.v_proj.bias", False),
    "decoder/layers/{}/attention/o_proj/bias": ("model.layers.{}.self_attn.o_proj.bias", False),
    "decoder/layers/{}/attention/q_norm/weight": ("model.layers.{}.self_attn.q_norm.weight", False),
    "decoder/layers/{}/attention/k_norm/weight": ("model.layers.{}.self_attn.k_norm.weight", False),
    "decoder/layers/{}/gate/kernel": ("model.layers.{}.mlp.gate.weight", True),
    "experts/{}/{}/gate": ("model.layers.{}.mlp.experts.{}.gate_proj.weight", True),
    "experts/{}/{}/up": ("model.layers.{}.mlp.experts.{}.up_proj.weight", True),
    "experts/{}/{}/down": ("model.layers.{}.mlp.experts.{}.down_proj.weight", True),
}
_QWEN3_MOE_TENSORS = _OLMOE_TENSORS | {
    "decoder/layers/{}/mlp/gate_proj/kernel": ("model.layers.{}.mlp.gate_proj.weight", True),
    "decoder/layers/{}/mlp/up_proj/kernel": ("model.layers.{}.mlp.up_proj.weight", True),
    "decoder/layers/{}/mlp/down_proj/kernel": ("model.layers.{}.mlp.down_proj.weight", True),
}

FAMILIES = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        fields={
            "intermediate_size": "intermediate_size",
            "num_experts": "num_local_experts",
            "sliding_window": "sliding_window",
        },
        tensors=_MIXTRAL_TENSORS,
        defaults={
            "rope_theta": 1e6,
            "num_kv_heads": 8,
            "max_position_embeddings": 131_072,
            "router_aux_loss_coef": 0.001,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        spellings={"num_experts": "num_local_experts"},
        renamed={"model.layers.{}.block_sparse_moe.gate.weight": "model.layers.{}.mlp.gate.weight"},
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        fields={
            "intermediate_size": "intermediate_size",
            "num_experts": "num_experts",
            "normalize_top_k": "norm_topk_prob",
            "attention_bias": "attention_bias",
            "clip_qkv": "clip_qkv",
        },
        tensors=_OLMOE_TENSORS,
        defaults={
            "rope_theta": 1e4,
            "normalize_top_k": False,
            "max_position_embeddings": 4096,
            "router_aux_loss_coef": 0.01,
            "bos_token_id": None,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        constants={"query_key_norm": "projection"},
        spellings={"num_local_experts": "num_experts"},
        unsupported=("sliding_window",),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        fields={
            "intermediate_size": "moe_intermediate_size",
            "dense_size": "intermediate_size",
            "num_experts": "num_experts",
            "normalize_top_k": "norm_topk_prob",
            "attention_bias": "attention_bias",
            "sliding_window": "sliding_window",
        },
        tensors=_QWEN3_MOE_TENSORS,
        defaults={
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "num_kv_heads": 4,
            "normalize_top_k": False,
            "sliding_window": 4096,
            "router_aux_loss_coef": 0.001,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        constants={"query_key_norm": "head"},
        spellings={"num_local_experts": "num_experts"},
        window_switch="use_sliding_window",
        dense_layers=("mlp_only_layers", "decoder_sparse_step"),
    ),
}
