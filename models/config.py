"""The architecture of a decoder, read from and written to Hugging Face's `config.json`.

Both styles of the format are read: the older one (`rope_theta`, `torch_dtype`) and the newer one
(`rope_parameters`, `dtype`). What the decoder cannot compute faithfully is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import fields as json_fields
from models.families import COMMON_FIELDS, FAMILIES, Family
from models.fields import FLAG, NOT_NEGATIVE, POSITIVE, SIZE, TOKEN, TOKENS, Kind, integer_up_to, listed, shown
from varjax.errors import InputError


class ConfigError(InputError):
    """A `config.json` or `generation_config.json` that this library cannot follow; names file, field and fix."""


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
    normalize_top_k: bool = True  # the K gate weights are divided by their sum
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
        return json_fields.ids_of(self.eos_token_id)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Begin, end and padding ids: never counted in statistics, so no key ends in one."""
        named = {self.bos_token_id, self.pad_token_id, *self.eos_token_ids} - {None}
        return tuple(sorted(token for token in named if token is not None))


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "depth", "num_heads", "num_experts", "top_k")
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 200_000  # experts of all layers; each of them is an object on the host
# Our field -> the type of its value in `config.json`, in every family.
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"), SIZE),
    "depth": integer_up_to(_MOST_LAYERS),
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
# Written as integers, too; the fingerprint must not tell 8 from 8.0.
_NUMBERS = [field.name for field in dataclasses.fields(MoEConfig) if str(field.type).startswith("float")]


def read_config(path: Path, source: str | None = None) -> MoEConfig:
    """The architecture in `path` (a `config.json`).

    Args:
        source: the file's name in messages; None: its path.

    Raises:
        ConfigError: the file is missing, is not JSON, has a value of a wrong type, or describes something that this
            decoder does not compute.
    """
    return config_from_hf(json_fields.read_object(path, ConfigError, source), source or str(path))


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> MoEConfig:
    """`MoEConfig` from the fields of a Hugging Face config of either style.

    Raises:
        ConfigError: as `read_config`.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type is {shown(name)}; this decoder runs {listed(FAMILIES)} checkpoints only"
        )
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

    given = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    known: dict[str, Any] = {"head_dim": None, **family.defaults, **given, **family.constants}
    known["rope_theta"], faults = _rope_theta(fields, source, family.defaults["rope_theta"])
    if known.get("num_kv_heads") is None:
        known["num_kv_heads"] = known["num_heads"]
    if known["head_dim"] is None and SIZE.fits(known["hidden_size"]) and SIZE.fits(known["num_heads"]):
        known["head_dim"] = known["hidden_size"] // known["num_heads"]
    known |= {ours: json_fields.without_negative_ids(known[ours]) for ours in TOKEN_IDS if ours in known}
    switch = family.window_switch
    if switch is not None and not fields.get(switch):
        known["sliding_window"] = None
    dense, dense_faults = _dense_layers(known["depth"], fields, family)
    faults += dense_faults
    faults += json_fields.wrong_types(
        {names.get(ours, ours): known[ours] for ours in _KINDS if ours in known},
        {names.get(ours, ours): kind for ours, kind in _KINDS.items()},
    )
    faults += json_fields.wrong_types(fields, {} if switch is None else {switch: FLAG})
    if not faults:
        faults = _contradictions(known, dense, names)
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}; restore the file that belongs to the weights")
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    known |= {ours: float(known[ours]) for ours in _NUMBERS if known.get(ours) is not None}
    return MoEConfig(family=name, num_layers=known.pop("depth") - len(dense), dense_layers=dense, **known)


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


def _check_supported(fields: Mapping[str, Any], family: Family, source: str) -> None:
    """Raises ConfigError for a field whose value asks for something that the decoder does not compute."""
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
    """The base of the rotary angles, as transformers 5 finds it, and what is wrong with the fields that state it.

    The base is the default where something is wrong, so that no fault is told twice.

    There `rope_scaling`, if it holds anything, takes the place of `rope_parameters`, and the base in it that of
    `rope_theta`; transformers 4 reads `rope_theta` alone. A file with two bases is two models, and is refused.
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
    if faults := json_fields.wrong_types(bases, dict.fromkeys(bases, POSITIVE)):
        return default, faults
    if any(base != theta for base in bases.values()):
        told = " and ".join(f"{name} is {shown(base)}" for name, base in bases.items())
        raise ConfigError(
            f"{source}: {told}, of which transformers uses {shown(theta)}; "
            "keep the base that the model was trained with"
        )
    return theta, []


def _dense_layers(depth: Any, fields: Mapping[str, Any], family: Family) -> tuple[tuple[int, ...], list[str]]:
    """The places of layers without experts, and what is wrong with the fields that name them."""
    if family.dense_layers is None or not _KINDS["depth"].fits(depth):
        return (), []
    listed_name, every_name = family.dense_layers
    given = {listed_name: fields.get(listed_name) or [], every_name: fields.get(every_name, 1)}
    layers = Kind("a list of layers", lambda value: isinstance(value, list) and all(map(json_fields.is_integer, value)))
    if faults := json_fields.wrong_types(given, {listed_name: layers, every_name: SIZE}):
        return (), faults
    places = set(given[listed_name])
    dense = tuple(place for place in range(depth) if place in places or (place + 1) % given[every_name])
    size = family.fields["dense_size"]
    if dense and fields.get(size) is None:
        return dense, [f"{size} is missing, expected the size of the {len(dense)} layers without experts"]
    return dense, []


def _contradictions(known: Mapping[str, Any], dense: tuple[int, ...], names: Mapping[str, str]) -> list[str]:
    """What is wrong with fields that are each of their type."""
    faults = []
    experts, layers = names["num_experts"], names["depth"]
    if known["top_k"] > known["num_experts"]:
        faults.append(
            f"num_experts_per_tok is {known['top_k']} but {experts} is {known['num_experts']}, "
            "a token cannot use more experts than there are"
        )
    if known["num_experts"] * known["depth"] > _MOST_EXPERTS:
        faults.append(
            f"{layers} is {known['depth']} and {experts} is {known['num_experts']}, expected at most {_MOST_EXPERTS:,} "
            "experts in all layers together"
        )
    if known["num_heads"] % known["num_kv_heads"]:
        faults.append(
            f"num_key_value_heads is {known['num_kv_heads']}, expected a divisor of "
            f"num_attention_heads {known['num_heads']}"
        )
    if known["head_dim"] % 2:
        faults.append(f"head_dim is {known['head_dim']}, expected an even number for rotary embeddings")
    if len(dense) == known["depth"]:
        faults.append(f"none of the {known['depth']} layers has experts, there is nothing to route")
    return faults
