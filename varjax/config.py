"""The settings of VAR: what is looked up, how sure it must be, and what each layer does with the answer.

`VARConfig` holds what concerns the whole model, `LayerPolicy` what one layer does with a planned token. Both
are frozen, checked when they are made (every fault in one error), and survive a round trip through JSON.

    config = VARConfig.from_routing_stats("results/routing_stats.parquet", cache_size=500)
    config = VARConfig.balanced(layers={0: LayerPolicy(experts_kept=0), 5: None})    # layer 5 stays with the router
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from varjax import checksums
from varjax.errors import InputError

Source = Literal["gate", "table"]
AnswerType = Literal["float32", "bfloat16", "int8"]

PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"frequency_threshold": 100, "entropy_threshold": 0.3, "confidence_threshold": 0.9},
    "balanced": {"frequency_threshold": 50, "entropy_threshold": 0.5, "confidence_threshold": 0.8},
    "aggressive": {"frequency_threshold": 25, "entropy_threshold": 0.7, "confidence_threshold": 0.7},
}


@dataclass(frozen=True)
class LayerPolicy:
    """What one layer does with a token that the table knows.

    Raises:
        InputError: naming every field that is out of range, its value and what is allowed.
    """

    experts_kept: int | None = (
        1  # experts to run, 0 = look-up only; None = all with a tolerance, else those in mass_threshold
    )
    residual: bool = True  # what the left-out experts say on average at the key stands in for them
    orders: tuple[int, ...] = (1,)  # context orders that may answer, the longest known one does; 0 = every token
    choice_from: Source = "gate"  # who names the experts
    weights_from: Source = "gate"  # who weighs them, whoever named them: the table's weights go by rank
    gate_ratio: float | None = None  # drop an expert whose weight is under this share of the first one's
    gate_mass: float | None = None  # drop the experts after those whose gate probabilities reach this
    tolerance: float | None = None  # drop an expert whose weight times its answer's deviation is under this
    renormalize: bool = False  # rescale the kept weights to their former sum
    frequency_threshold: int | None = None  # occurrences that a key needs; None = VARConfig's
    entropy_threshold: float | None = None  # nats, most mean gate entropy of a key; None = VARConfig's

    def __post_init__(self) -> None:
        check = _Check(self)
        check.integer("experts_kept", 0, optional=True)
        check.flag("residual")
        check.integers("orders", 0, optional=False)
        check.one_of("choice_from", ("gate", "table"))
        check.one_of("weights_from", ("gate", "table"))
        check.number("gate_ratio", 0.0, 1.0, above=True, optional=True)
        check.flag("renormalize")
        check.integer("frequency_threshold", 1, optional=True)
        check.number("entropy_threshold", 0.0, optional=True)
        check.number("gate_mass", 0.0, 1.0, above=True, optional=True)
        check.number("tolerance", 0.0, above=True, optional=True)
        if self.residual and self.renormalize:
            check.fault("renormalize", "False with residual=True: kept weights stay, the residual carries the rest")
        if not self.residual and self.tolerance is not None:
            check.fault("tolerance", "None with residual=False: it is about how far an answer is off")
        if isinstance(self.orders, tuple) and 0 in self.orders and self.experts_kept is None and self.tolerance is None:
            check.fault(
                "experts_kept", "an integer, or a tolerance, where orders hold 0: nothing is predicted for every token"
            )
        check.finish()


@dataclass(frozen=True)
class VARConfig:
    """The settings of VAR for one model. The defaults are the `balanced` preset.

    Raises:
        InputError: naming every field that is out of range, its value and what is allowed.
    """

    frequency_threshold: int = 50  # occurrences that a key needs before the fast tier answers for it
    entropy_threshold: float = 0.5  # nats, most mean gate entropy of such a key; ln E and above let all pass
    confidence_threshold: float = 0.8  # top gate probability from which a learned decision enters the cache
    cache_size: int = 1000  # contexts that the cached tier remembers; 0 = no cached tier
    cache_ttl_seconds: float = 60.0  # seconds, age at which a cached decision expires
    context_window_size: int = 4  # token ids that make a cached context, the current one included
    routing_stats: str | None = None  # path of the Parquet file that the table is built from
    residuals: str | None = None  # path of the safetensors file with the answers
    enable_var: bool = True  # False = the plain model, bit for bit
    max_quality_degradation: float = 0.01  # relative increase of perplexity that is still acceptable
    mass_threshold: float = 0.9  # share of the gate weight that runs: of predictions if kept is open, and of the cached
    residual_shrinkage: float = 1.0  # k0, occurrences that the prior of an answer weighs
    answer_dtype: AnswerType = "float32"  # how answers are kept; "bfloat16" takes half of the bytes, "int8" a quarter
    answers_per_layer: int | None = None  # answers that a layer holds at most, the most valuable ones; None = all
    default: LayerPolicy | None = field(default_factory=LayerPolicy)  # layers not listed below; None = left open
    layers: Mapping[int, LayerPolicy | None] | tuple[tuple[int, LayerPolicy | None], ...] = ()  # exceptions
    cache_layers: tuple[int, ...] | None = None  # layers that the cached tier may decide; None = all not left open

    def __post_init__(self) -> None:
        check = _Check(self)
        check.integer("frequency_threshold", 1)
        check.number("entropy_threshold", 0.0)
        check.number("confidence_threshold", 0.0, 1.0)
        check.integer("cache_size", 0)
        check.number("cache_ttl_seconds", 0.0)
        check.integer("context_window_size", 1)
        check.path("routing_stats")
        check.path("residuals")
        check.flag("enable_var")
        check.number("max_quality_degradation", 0.0)
        check.number("mass_threshold", 0.0, 1.0, above=True)
        check.number("residual_shrinkage", 0.0)
        check.one_of("answer_dtype", ("float32", "bfloat16", "int8"))
        check.integer("answers_per_layer", 1, optional=True)
        check.policy("default")
        check.policies("layers")
        check.integers("cache_layers", 0, optional=True)
        check.finish()

    def policy(self, layer: int) -> LayerPolicy | None:
        """The policy of one layer with its inherited thresholds filled in; None if the layer is left open."""
        policy = dict(self.layers).get(layer, self.default)
        if policy is None:
            return None
        own = {name: getattr(policy, name) for name in ("frequency_threshold", "entropy_threshold")}
        return replace(policy, **{name: getattr(self, name) for name, value in own.items() if value is None})

    def caches(self, layer: int) -> bool:
        """Whether the cached tier may decide in this layer."""
        listed = self.cache_layers is None or layer in self.cache_layers
        return self.cache_size > 0 and listed and self.policy(layer) is not None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> VARConfig:
        """`conservative`, `balanced` or `aggressive`, with some fields replaced.

        Raises:
            InputError: no preset or no field has that name.
        """
        if name not in PRESETS:
            raise InputError(f"no preset is called {name!r}; known presets: {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | _known(cls, overrides, "VARConfig")))

    @classmethod
    def conservative(cls, **overrides: Any) -> VARConfig:
        """Few tokens are planned: 100 occurrences, 0.3 nats, confidence 0.9."""
        return cls.preset("conservative", **overrides)

    @classmethod
    def balanced(cls, **overrides: Any) -> VARConfig:
        """The defaults: 50 occurrences, 0.5 nats, confidence 0.8."""
        return cls.preset("balanced", **overrides)

    @classmethod
    def aggressive(cls, **overrides: Any) -> VARConfig:
        """Many tokens are planned: 25 occurrences, 0.7 nats, confidence 0.7."""
        return cls.preset("aggressive", **overrides)

    @classmethod
    def from_routing_stats(cls, path: str | os.PathLike[str], **overrides: Any) -> VARConfig:
        """A config for a statistics file, and for the residual rows that lie beside it, if any.

        The rows are looked for in `<stem>.residuals.safetensors` in the same folder. Without them nothing can
        be added back, so the default policy runs as many experts as reach `mass_threshold`.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: it is not a Parquet file, or an override is unknown or out of range.
        """
        stats = Path(path)
        if not stats.is_file():
            raise FileNotFoundError(f"{stats}: no such file; collect routing statistics first, or correct the path")
        with stats.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise InputError(f"{stats}: not a Parquet file; expected what the collection of statistics wrote")
        found: dict[str, Any] = {"routing_stats": str(stats)}
        rows = residuals_beside(stats)
        if rows.is_file():
            found["residuals"] = str(rows)
        values = found | _known(cls, overrides, "VARConfig")
        if values.get("residuals") is None:
            values.setdefault("default", LayerPolicy(experts_kept=None, residual=False))
        return cls(**values)

    def at(self, routing_stats: str | os.PathLike[str], residuals: str | os.PathLike[str] | None = None) -> VARConfig:
        """The same settings over other files.

        Args:
            routing_stats: a statistics file.
            residuals: a file of answers; None: the one that this config names, if it is there, else the one beside the
                statistics.

        Raises:
            FileNotFoundError: there is no such file of statistics.
            InputError: as `from_routing_stats`, or the answers belong to other statistics.
        """
        beside = VARConfig.from_routing_stats(routing_stats)
        own = self.residuals if self.residuals is not None and Path(self.residuals).is_file() else beside.residuals
        chosen = own if residuals is None else os.fspath(residuals)
        if chosen is not None and Path(chosen).is_file():
            from varjax.answersfile import check_statistics  # it brings pyarrow and safetensors with it

            check_statistics(chosen, Path(routing_stats))
        return replace(self, routing_stats=beside.routing_stats, residuals=chosen)

    def to_json(self) -> str:
        """JSON text with every field, policies as objects, `layers` keyed by layer number."""
        layers = {str(layer): policy and asdict(policy) for layer, policy in dict(self.layers).items()}
        return json.dumps(asdict(self) | {"layers": layers}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> VARConfig:
        """The inverse of `to_json`; fields that are missing take their defaults.

        The text of a saved file holds a checksum, which is verified; one that was written by hand needs none.

        Raises:
            InputError: not JSON, an unknown field (the nearest known one is named), a value out of range, or the
                checksum is that of other settings.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # of whole numbers with thousands of digits, too
            raise InputError(f"not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"expected a JSON object with the fields of VARConfig, got {type(data).__name__}")
        try:
            data = checksums.without_checksum(data)
        except InputError as error:
            raise InputError(f'it {error}; restore it or, if you edited it, remove its field "checksum"') from error
        values = _known(cls, data, "VARConfig")
        if "default" in values:
            values["default"] = _policy_from_json(values["default"], "default")
        if isinstance(values.get("layers"), dict):
            values["layers"] = tuple(
                (int(key) if key.isdecimal() else key, _policy_from_json(value, f"layers[{key}]"))
                for key, value in values["layers"].items()
            )
        return cls(**values)

    def digest(self) -> str:
        """SHA-256 of the settings with what the files hold in the place of their paths: they may move, but not change.

        It names a policy and its table. A path at which no file lies plays no part: the table was given then.
        """
        contents: dict[str, Any] = {}
        for name in ("routing_stats", "residuals"):
            path = getattr(self, name)
            contents[name] = None
            if path is not None and Path(path).is_file():
                contents[name] = checksums.digest_of_file(path)
        return hashlib.sha256(replace(self, **contents).to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()` with a checksum, whole or not at all."""
        checksums.write_json(path, json.loads(self.to_json()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VARConfig:
        """Reads what `save` wrote.

        Raises:
            InputError: as `from_json`, with the file named.
        """
        try:
            return cls.from_json(Path(path).read_bytes().decode("utf-8-sig"))
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from error


def residuals_beside(stats: Path) -> Path:
    """Where the residual rows that belong to a statistics file are kept."""
    return stats.with_name(f"{stats.stem}.residuals.safetensors")


class _Check:
    """Checks the fields of a config under construction, stores their plain forms and gathers the faults."""

    def __init__(self, config: Any):
        self.config = config
        self.faults: list[str] = []

    def fault(self, name: str, expected: str) -> None:
        self.faults.append(f"{name}={getattr(self.config, name)!r}: expected {expected}")

    def finish(self) -> None:
        if self.faults:
            raise InputError(f"{type(self.config).__name__}: " + "; ".join(self.faults))

    def store(self, name: str, value: Any) -> None:
        object.__setattr__(self.config, name, value)

    def integer(self, name: str, low: int, optional: bool = False) -> None:
        value = getattr(self.config, name)
        if value is None and optional:
            return
        if not _is_integer(value) or value < low:
            self.fault(name, f"an integer of at least {low}" + " or None" * optional)
        else:
            self.store(name, int(value))

    def integers(self, name: str, low: int, optional: bool) -> None:
        value = getattr(self.config, name)
        if value is None and optional:
            return
        if not isinstance(value, tuple | list) or not all(_is_integer(v) and v >= low for v in value):
            self.fault(name, f"a tuple of integers of at least {low}" + " or None" * optional)
        elif not value and not optional:
            self.fault(name, f"at least one integer of at least {low}")
        else:
            self.store(name, tuple(sorted({int(v) for v in value})))

    def number(
        self, name: str, low: float, high: float = math.inf, above: bool = False, optional: bool = False
    ) -> None:
        value = getattr(self.config, name)
        if value is None and optional:
            return
        real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not low <= value <= high or (above and value == low):
            span = f"{'above' if above else 'of at least'} {low:g}" + f" and at most {high:g}" * (high < math.inf)
            self.fault(name, f"a finite number {span}" + " or None" * optional)
        else:
            self.store(name, float(value))

    def flag(self, name: str) -> None:
        if not isinstance(getattr(self.config, name), bool):
            self.fault(name, "True or False")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self.config, name) not in allowed:
            self.fault(name, " or ".join(map(repr, allowed)))

    def path(self, name: str) -> None:
        value = getattr(self.config, name)
        if value is not None and not isinstance(value, str | os.PathLike):
            self.fault(name, "a path or None")
        elif value is not None:
            self.store(name, os.fspath(value))

    def policy(self, name: str) -> None:
        if not isinstance(getattr(self.config, name), LayerPolicy | None):
            self.fault(name, "a LayerPolicy or None")

    def policies(self, name: str) -> None:
        value = getattr(self.config, name)
        expected = "layer numbers, each once, with a LayerPolicy or None: {0: LayerPolicy(experts_kept=0), 5: None}"
        try:
            pairs = [(k, v) for k, v in (value.items() if isinstance(value, Mapping) else value)]
        except (TypeError, ValueError):
            return self.fault(name, expected)
        valid = all(_is_integer(k) and k >= 0 and isinstance(v, LayerPolicy | None) for k, v in pairs)
        if not valid or len({k for k, _ in pairs}) < len(pairs):
            return self.fault(name, expected)
        self.store(name, tuple((int(k), v) for k, v in sorted(pairs, key=lambda pair: pair[0])))


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _known(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of `values`, once every name in it is a field of `cls`."""
    names = [f.name for f in fields(cls)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise InputError(f"{where} has no field {name!r}; did you mean {near!r}?")
    return dict(values)


def _policy_from_json(value: Any, where: str) -> LayerPolicy | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with the fields of LayerPolicy or null, got {value!r}")
    try:
        return LayerPolicy(**_known(LayerPolicy, value, "LayerPolicy"))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
