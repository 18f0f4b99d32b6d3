"""The architecture of a decoder, read from and written to Hugging Face's `config.json`.

Both styles of the format are read: the older one (`rope_theta`, `torch_dtype`) and the newer one
(`rope_parameters`, `dtype`). What the decoder cannot compute faithfully is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.families import COMMON_FIELDS, FAMILIES, Family
from varjax.errors import InputError


class ConfigError(InputError):
    """A `config.json` that this library cannot run faithfully; names file, field and mend."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Shape of a decoder whose layers hold experts. Hashable: it can be static under jit.

    Layers are counted by their experts: `num_layers` is L, the layers *with* experts, and everything that is told of
    routing (statistics, plans, answers, policies) is numbered 0 to L - 1 over these. Layers without experts stand
    between them and are named by `dense_layers`, their places among all `depth` layers.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F, of one expert
    num_layers: int  # L, layers with experts
    num_heads: int  # H, query heads
    num_kv_heads: int  # G, key and value heads; divides H
    head_dim: int
    num_experts: int  # E
    top_k: int  # K, experts per token
    family: str = "mixtral"  # how it is published, a key of `models.families.FAMILIES`; no part of the maths
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # keys visible to a query, itself included; None = all
    query_key_norm: str | None = None  # RMS norm of queries and keys before rotation: per "head", or whole "projection"
    clip_qkv: float | None = None  # queries, keys and values are clipped to this size; None = not
    attention_bias: bool = False  # in all four projections
    normalise_top_k: bool = True  # the K gate weights are divided by their sum
    dense_layers: tuple[int, ...] = ()  # rising, places of the layers without experts among all layers
    dense_size: int | None = None  # hidden size of the SwiGLU block there
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    @property
    def depth(self) -> int:
        """All layers of the decoder, with and without experts."""
        return self.num_layers + len(self.dense_layers)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The place, among all layers, of each of the L layers with experts."""
        return tuple(place for place in range(self.depth) if place not in self.dense_layers)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text; empty if the checkpoint names none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Begin, end and padding ids: never counted in statistics, so no key ends in one."""
        named = {self.bos_token_id, self.pad_token_id, *self.eos_token_ids} - {None}
        return tuple(sorted(token for token in named if token is not None))


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "depth", "num_heads", "num_experts", "top_k")


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
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise ConfigError(f"{source}: model_type is {name!r}; this decoder runs {_listed(FAMILIES)} checkpoints only")
    family = FAMILIES[name]
    names = {**COMMON_FIELDS, **family.fields}
    fields = {theirs: fields[other] for other, theirs in family.spellings.items() if other in fields} | dict(fields)
    missing = [names[ours] for ours in _REQUIRED if fields.get(names[ours]) is None]
    if missing:
        raise ConfigError(f"{source}: missing field(s) {', '.join(missing)}; add them, the shapes depend on them")
    supported = {"hidden_act": "silu", "quantization_config": None, **dict.fromkeys(family.unsupported)}
    for field, value in supported.items():
        if fields.get(field, value) != value:
            raise ConfigError(f"{source}: {field} is {fields[field]!r}; only {value!r} is supported")

    given = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    known: dict[str, Any] = {"head_dim": None, **family.defaults, **given, **family.constants}
    known["rope_theta"] = _rope_theta(fields, source, family.defaults["rope_theta"])
    if known.get("num_kv_heads") is None:
        known["num_kv_heads"] = known["num_heads"]
    if known["head_dim"] is None and _is_size(known["hidden_size"]) and _is_size(known["num_heads"]):
        known["head_dim"] = known["hidden_size"] // known["num_heads"]
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    if family.window_switch is not None and not fields.get(family.window_switch):
        known["sliding_window"] = None
    depth = known.pop("depth")
    dense, faults = _dense_layers(depth, fields, family)
    config = MoEConfig(family=name, num_layers=depth, **known)
    faults += _faults(config, names)
    if not faults and len(dense) == depth:
        faults.append(f"none of the {depth} layers has experts, there is nothing to route")
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}; restore the file that belongs to the weights")
    return dataclasses.replace(
        config,
        num_layers=depth - len(dense),
        dense_layers=dense,
        rope_theta=float(config.rope_theta),
        rms_norm_eps=float(config.rms_norm_eps),
        clip_qkv=None if config.clip_qkv is None else float(config.clip_qkv),
    )


def config_to_hf(config: MoEConfig, dtype: str) -> dict[str, Any]:
    """The fields of a `config.json` that transformers 4 and 5 both read (`rope_theta` and `rope_parameters`).

    Raises ConfigError if the family's format has no words for what this architecture does.
    """
    family = FAMILIES[config.family]
    fields = {theirs: getattr(config, ours) for ours, theirs in {**COMMON_FIELDS, **family.fields}.items()}
    if family.window_switch is not None:
        fields[family.window_switch] = config.sliding_window is not None
    if family.dense_layers is not None:
        listed, every = family.dense_layers
        fields |= {listed: list(config.dense_layers), every: 1}
    written = {
        "architectures": [family.architecture],
        "model_type": config.family,
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
    said = dataclasses.asdict(config_from_hf(written, source="this architecture"))
    lost = [f"{name}={value!r}" for name, value in dataclasses.asdict(config).items() if said[name] != value]
    if lost:
        raise ConfigError(f"the {config.family} format cannot say {', '.join(lost)}; save it as another family")
    return written


def _rope_theta(fields: Mapping[str, Any], source: str, default: float) -> Any:
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
    return rope.get("rope_theta", fields.get("rope_theta", default))


def _dense_layers(depth: Any, fields: Mapping[str, Any], family: Family) -> tuple[tuple[int, ...], list[str]]:
    """The places of layers without experts, and what is wrong with the fields that name them."""
    if family.dense_layers is None or not _is_size(depth):
        return (), []
    listed_name, every_name = family.dense_layers
    listed, every = fields.get(listed_name) or [], fields.get(every_name, 1)
    faults = []
    if not isinstance(listed, list) or not all(isinstance(place, int) for place in listed):
        faults.append(f"{listed_name} is {listed!r}, expected a list of layers")
    if not _is_size(every):
        faults.append(f"{every_name} is {every!r}, expected a positive integer")
    if faults:
        return (), faults
    dense = tuple(place for place in range(depth) if place in listed or (place + 1) % every)
    size = family.fields["dense_size"]
    if dense and fields.get(size) is None:
        faults.append(f"{size} is missing, expected the size of the {len(dense)} layers without experts")
    return dense, faults


def _faults(config: MoEConfig, names: Mapping[str, str]) -> list[str]:
    """Every field with a value that cannot be, by its published name."""
    faults = []
    optional = ("sliding_window", "dense_size", "clip_qkv")
    for name in (*_REQUIRED, "num_kv_heads", "head_dim", "sliding_window", "dense_size"):
        value = config.num_layers if name == "depth" else getattr(config, name)  # no dense layer was taken off yet
        if not _is_size(value) and not (value is None and name in optional):
            faults.append(f"{names[name]} is {value!r}, expected a positive integer")
    for name in ("rope_theta", "rms_norm_eps", "clip_qkv"):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if not number and not (value is None and name in optional):
            faults.append(f"{name} is {value!r}, expected a positive number")
    for name in ("normalise_top_k", "attention_bias", "tie_word_embeddings"):
        if not isinstance(getattr(config, name), bool):
            faults.append(f"{names[name]} is {getattr(config, name)!r}, expected true or false")
    if not faults:
        if config.top_k > config.num_experts:
            faults.append(
                f"num_experts_per_tok is {config.top_k} but {names['num_experts']} is {config.num_experts}, "
                "a token cannot use more experts than there are"
            )
        if config.num_heads % config.num_kv_heads:
            faults.append(
                f"num_key_value_heads is {config.num_kv_heads}, expected a divisor of "
                f"num_attention_heads {config.num_heads}"
            )
        if config.head_dim % 2:
            faults.append(f"head_dim is {config.head_dim}, expected an even number for rotary embeddings")
    return faults


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _listed(names: Iterable[str]) -> str:
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} and {last}"
