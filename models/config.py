"""The architecture of a decoder, read from and written to Hugging Face's `config.json`.

Both styles of the format are read: the older one (`rope_theta`, `torch_dtype`) and the newer one
(`rope_parameters`, `dtype`). A setting that the decoder cannot compute faithfully is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.families import COMMON_FIELDS, FAMILIES, Family
from models.fields import (
    FLAG,
    LAYERS,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    TOKEN,
    TOKENS,
    Kind,
    read_object,
    shown,
    without_negative_ids,
    wrong_types,
)
from varjax.errors import InputError


class ConfigError(InputError):
    """A config.json or generation_config.json that this library cannot follow. Names file, field and fix."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The architecture of a decoder with experts. Hashable, so it can be static under jit.

    `num_layers` (L) counts the layers *with* experts, and everything about routing (statistics, plans, answers,
    policies) is numbered 0 to L - 1 over these. `dense_layers` gives the positions of the layers without experts among
    all `depth` layers.
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
    family: str = "mixtral"  # its published format, a key of `models.families.FAMILIES`
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # keys visible to a query, including its own; None: all
    query_key_norm: str | None = None  # RMS norm of queries and keys before rotation: per "head" or "projection"
    clip_qkv: float | None = None  # queries, keys and values are clipped to this size; None: not clipped
    attention_bias: bool = False  # in all four projections
    normalize_top_k: bool = True  # the K gate weights are divided by their sum
    dense_layers: tuple[int, ...] = ()  # ascending, positions of the layers without experts among all layers
    dense_size: int | None = None  # hidden size of the SwiGLU block in those layers
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    @property
    def depth(self) -> int:
        """Number of all layers, with and without experts."""
        return self.num_layers + len(self.dense_layers)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The position among all layers of each of the L layers with experts."""
        return tuple(place for place in range(self.depth) if place not in self.dense_layers)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text; empty if the checkpoint names none."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Begin, end and padding ids, sorted. Statistics never count them, so no key ends in one."""
        named = {self.bos_token_id, self.pad_token_id, *self.eos_token_ids}
        return tuple(sorted(token for token in named if token is not None))


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "depth", "num_heads", "num_experts", "top_k")
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 200_000  # experts of all layers; each is an object on the host
# Our field -> the type of its value in config.json, in every family.
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"), SIZE),
    "depth": Kind(
        f"a positive integer up to {_MOST_LAYERS:,}", lambda value: SIZE.fits(value) and value <= _MOST_LAYERS
    ),
    **dict.fromkeys(("num_experts", "top_k", "max_position_embeddings"), SIZE),
    **dict.fromkeys(("sliding_window", "dense_size"), SIZE.or_null()),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), POSITIVE),
    "clip_qkv": POSITIVE.or_null(),
    **dict.fromkeys(("initializer_range", "router_aux_loss_coef"), NOT_NEGATIVE),
    **dict.fromkeys(("normalize_top_k", "attention_bias", "tie_word_embeddings"), FLAG),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN.or_null()),
    "eos_token_id": TOKENS.or_null(),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# These may be written as integers; the fingerprint must not depend on 8 or 8.0.
_NUMBERS = [field.name for field in dataclasses.fields(MoEConfig) if str(field.type).startswith("float")]


def read_config(path: Path) -> MoEConfig:
    """Read the architecture of a checkpoint.

    Args:
        path: a config.json.

    Returns:
        The architecture.

    Raises:
        ConfigError: the file is missing or damaged, or asks for something that this decoder does not compute.
    """
    return config_from_hf(read_object(path, ConfigError), str(path))


def read_dtype(path: Path) -> str:
    """Read in which dtype a checkpoint is to be computed.

    Args:
        path: a config.json.

    Returns:
        "bfloat16" if the file says so, else "float32": bfloat16 would round the numbers of a float16 checkpoint.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    fields = read_object(path, ConfigError)
    return "bfloat16" if (fields.get("dtype") or fields.get("torch_dtype")) == "bfloat16" else "float32"


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> MoEConfig:
    """Convert the fields of a Hugging Face config of either style.

    Args:
        fields: of the config.
        source: its name in messages.

    Returns:
        The architecture.

    Raises:
        ConfigError: as `read_config`.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        families = ", ".join(map(repr, FAMILIES))
        raise ConfigError(f"{source}: model_type is {shown(name)}; only checkpoints of {families} are supported")
    family = FAMILIES[name]
    names = {**COMMON_FIELDS, **family.fields}
    for other, theirs in family.spellings.items():
        if None not in (fields.get(other), fields.get(theirs)) and fields[other] != fields[theirs]:
            raise ConfigError(
                f"{source}: {theirs} is {shown(fields[theirs])} and {other} is {shown(fields[other])}, which is "
                "another name for it; keep the one that belongs to the weights"
            )
    fields = {theirs: fields[other] for other, theirs in family.spellings.items() if other in fields} | dict(fields)
    missing = [names[ours] for ours in _REQUIRED if fields.get(names[ours]) is None]
    if missing:
        raise ConfigError(f"{source}: missing field(s) {', '.join(missing)}; add them, the shapes depend on them")
    _check_supported(fields, family, source)

    known: dict[str, Any] = {"head_dim": None, **family.defaults}
    known |= {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields} | dict(family.constants)
    known["rope_theta"], faults = _rope_theta(fields, source, family.defaults["rope_theta"])
    if known.get("num_kv_heads") is None:
        known["num_kv_heads"] = known["num_heads"]
    if known["head_dim"] is None and SIZE.fits(known["hidden_size"]) and SIZE.fits(known["num_heads"]):
        known["head_dim"] = known["hidden_size"] // known["num_heads"]
    known |= {ours: without_negative_ids(known[ours]) for ours in TOKEN_IDS if ours in known}
    switch = family.window_switch
    if switch is not None and not fields.get(switch):
        known["sliding_window"] = None
    dense, dense_faults = _dense_layers(known["depth"], fields, family)
    kinds = {names.get(ours, ours): kind for ours, kind in _KINDS.items()}
    faults += dense_faults
    faults += wrong_types({names.get(ours, ours): known[ours] for ours in _KINDS if ours in known}, kinds)
    faults += wrong_types(fields, {} if switch is None else {switch: FLAG})
    if not faults:
        faults = _contradictions(known, dense, names)
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}; restore the file that belongs to the weights")
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    known |= {ours: float(known[ours]) for ours in _NUMBERS if known.get(ours) is not None}
    return MoEConfig(family=name, num_layers=known.pop("depth") - len(dense), dense_layers=dense, **known)


def config_to_hf(config: MoEConfig, dtype: str) -> dict[str, Any]:
    """Convert an architecture to the fields of a config.json that transformers 4 and 5 both read.

    Args:
        config: the architecture.
        dtype: in which the model is to be computed, such as "bfloat16".

    Returns:
        The fields, with `rope_theta` and `rope_parameters`.

    Raises:
        ConfigError: the family's format cannot express the architecture.
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
        raise ConfigError(f"the {config.family} format cannot express {', '.join(lost)}; save it as another family")
    return written


def _check_supported(fields: Mapping[str, Any], family: Family, source: str) -> None:
    """Refuse a field whose value asks for something that the decoder does not compute."""
    for name in ("quantization_config", "compression_config"):
        if (quantized := fields.get(name)) is not None:
            method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
            raise ConfigError(
                f"{source}: the checkpoint is quantized ({name} has quant_method {shown(method)}); only float32, "
                "bfloat16 and float16 weights are read, use the checkpoint that this one was made from"
            )
    supported: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0, None)}
    supported |= dict.fromkeys(family.unsupported, (None,))
    for field, values in supported.items():
        if fields.get(field, values[0]) not in values:
            raise ConfigError(f"{source}: {field} is {shown(fields[field])}; only {values[0]!r} is supported")


def _rope_theta(fields: Mapping[str, Any], source: str, default: float) -> tuple[Any, list[str]]:
    """The base of the rotary angles, as transformers 5 finds it, and the faults of the fields that state it.

    transformers 5 prefers `rope_scaling`, if it is not empty, to `rope_parameters`, and the base in either to
    `rope_theta`; transformers 4 reads `rope_theta` only. A file with two bases describes two models and is refused.
    Where there are faults, the base is the default, so that no fault is reported twice.
    """
    stated = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is not None and not isinstance(rope, Mapping):
            raise ConfigError(f"{source}: {name} is {shown(rope)}; expected an object or null")
        rope = rope or {}
        kind, turned = rope.get("rope_type", rope.get("type", "default")), rope.get("partial_rotary_factor")
        if kind != "default":
            raise ConfigError(
                f"{source}: in {name}, rope_type is {shown(kind)}; only 'default' rotary embeddings are supported"
            )
        if turned not in (None, 1.0):
            raise ConfigError(f"{source}: in {name}, partial_rotary_factor is {shown(turned)}; only 1.0 is supported")
        if rope:
            stated[name] = rope
    bases = {f"{name}.rope_theta": rope["rope_theta"] for name, rope in stated.items() if "rope_theta" in rope}
    bases |= {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    theta = next(iter(stated.values()), {}).get("rope_theta", fields.get("rope_theta", default))
    if faults := wrong_types(bases, dict.fromkeys(bases, POSITIVE)):
        return default, faults
    if any(base != theta for base in bases.values()):
        told = " and ".join(f"{name} is {shown(base)}" for name, base in bases.items())
        raise ConfigError(
            f"{source}: {told}, of which transformers uses {shown(theta)}; keep the base that the model was trained "
            "with"
        )
    return theta, []


def _dense_layers(depth: Any, fields: Mapping[str, Any], family: Family) -> tuple[tuple[int, ...], list[str]]:
    """The positions of the layers without experts, and the faults of the fields that state them."""
    if family.dense_layers is None or not _KINDS["depth"].fits(depth):
        return (), []
    listed_name, every_name = family.dense_layers
    given = {listed_name: fields.get(listed_name) or [], every_name: fields.get(every_name, 1)}
    if faults := wrong_types(given, {listed_name: LAYERS, every_name: SIZE}):
        return (), faults
    places = set(given[listed_name])
    dense = tuple(place for place in range(depth) if place in places or (place + 1) % given[every_name])
    size = family.fields["dense_size"]
    if dense and fields.get(size) is None:
        return dense, [f"{size} is missing, expected the size of the {len(dense)} layers without experts"]
    return dense, []


def _contradictions(known: Mapping[str, Any], dense: tuple[int, ...], names: Mapping[str, str]) -> list[str]:
    """The faults of fields that each have a value of the right type."""
    experts, layers, depth = names["num_experts"], names["depth"], known["depth"]
    rules = [
        (
            known["top_k"] > known["num_experts"],
            f"num_experts_per_tok is {known['top_k']} but {experts} is {known['num_experts']}, a token cannot use more "
            "experts than there are",
        ),
        (
            known["num_experts"] * depth > _MOST_EXPERTS,
            f"{layers} is {depth} and {experts} is {known['num_experts']}, expected at most {_MOST_EXPERTS:,} experts "
            "in all layers together",
        ),
        (
            known["num_heads"] % known["num_kv_heads"],
            f"num_key_value_heads is {known['num_kv_heads']}, expected a divisor of num_attention_heads "
            f"{known['num_heads']}",
        ),
        (known["head_dim"] % 2, f"head_dim is {known['head_dim']}, expected an even number for rotary embeddings"),
        (len(dense) == depth, f"none of the {depth} layers has experts, there is nothing to route"),
    ]
    return [message for broken, message in rules if broken]
