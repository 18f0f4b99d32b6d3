"""The architecture of a decoder, read from and written to Hugging Face's `config.json`.

Both styles of the format are read: the older one (`rope_theta`, `torch_dtype`) and the newer one
(`rope_parameters`, `dtype`). What the decoder cannot compute faithfully is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A `config.json` that this library cannot run faithfully; names file, field and mend."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Shape of a Mixtral-like decoder (Jiang et al. 2024, arXiv 2401.04088). Hashable: it can be static under jit."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F, of one expert
    num_layers: int  # L
    num_heads: int  # H, query heads
    num_kv_heads: int  # G, key and value heads; divides H
    head_dim: int
    num_experts: int  # E
    top_k: int  # K, experts per token
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # keys visible to a query, itself included; None = all
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text; empty if the checkpoint names none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Begin, end and padding ids: never counted in statistics, never planned."""
        named = {self.bos_token_id, self.pad_token_id, *self.eos_token_ids} - {None}
        return tuple(sorted(token for token in named if token is not None))


# our field -> Hugging Face's field
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "sliding_window": "sliding_window",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_experts",
    "top_k",
)


def read_config(path: Path) -> MoEConfig:
    """The architecture in `path` (a `config.json`).

    Raises ConfigError if the file is missing, is not JSON, or describes something this decoder does not compute.
    """
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a model directory needs a config.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds a JSON {type(fields).__name__}, expected an object; fetch the file again")
    return config_from_hf(fields, source=str(path))


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> MoEConfig:
    """`MoEConfig` from the fields of a Hugging Face config of either style."""
    family = fields.get("model_type")
    if family != "mixtral":
        raise ConfigError(f"{source}: model_type is {family!r}; this decoder runs 'mixtral' checkpoints only")
    missing = [_HF_NAMES[name] for name in _REQUIRED if fields.get(_HF_NAMES[name]) is None]
    if missing:
        raise ConfigError(f"{source}: missing field(s) {', '.join(missing)}; add them, the shapes depend on them")
    for field, supported in (("hidden_act", "silu"), ("quantization_config", None)):
        if fields.get(field, supported) != supported:
            raise ConfigError(f"{source}: {field} is {fields[field]!r}; only {supported!r} is supported")

    known: dict[str, Any] = {ours: fields[hf] for ours, hf in _HF_NAMES.items() if hf in fields}
    known["rope_theta"] = _rope_theta(fields, source)
    if known.get("num_kv_heads") is None:
        known["num_kv_heads"] = known["num_heads"]
    if known.get("head_dim") is None:
        known["head_dim"] = known["hidden_size"] // known["num_heads"]
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    config = MoEConfig(**known)
    _check(config, source)
    return dataclasses.replace(config, rope_theta=float(config.rope_theta), rms_norm_eps=float(config.rms_norm_eps))


def config_to_hf(config: MoEConfig, dtype: str) -> dict[str, Any]:
    """The fields of a `config.json` that transformers 4 and 5 both read (`rope_theta` and `rope_parameters`)."""
    fields = {hf: getattr(config, ours) for ours, hf in _HF_NAMES.items()}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **fields,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "torch_dtype": dtype,
        "dtype": dtype,
        "output_router_logits": False,
        "use_cache": True,
    }


def _rope_theta(fields: Mapping[str, Any], source: str) -> Any:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{source}: the rotary settings are {rope!r}; expected an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{source}: rope_type is {kind!r}; only 'default' rotary embeddings are supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{source}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported"
        )
    return rope.get("rope_theta", fields.get("rope_theta", MoEConfig.rope_theta))


def _check(config: MoEConfig, source: str) -> None:
    """Raise ConfigError naming every field with a value that cannot be."""
    faults = []
    for name in (*_REQUIRED, "num_kv_heads", "head_dim", "sliding_window"):
        value = getattr(config, name)
        if value is None and name == "sliding_window":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(f"{_HF_NAMES[name]} is {value!r}, expected a positive integer")
    for name in ("rope_theta", "rms_norm_eps"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            faults.append(f"{name} is {value!r}, expected a positive number")
    if not faults:
        if config.top_k > config.num_experts:
            faults.append(
                f"num_experts_per_tok is {config.top_k} but num_local_experts is {config.num_experts}, "
                "a token cannot use more experts than there are"
            )
        if config.num_heads % config.num_kv_heads:
            faults.append(
                f"num_key_value_heads is {config.num_kv_heads}, expected a divisor of "
                f"num_attention_heads {config.num_heads}"
            )
        if config.head_dim % 2:
            faults.append(f"head_dim is {config.head_dim}, expected an even number for rotary embeddings")
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}; restore the file that belongs to the weights")
