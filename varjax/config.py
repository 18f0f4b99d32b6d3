"""The settings of VAR: what is looked up, how certain it must be, and what each layer does with a planned token.

`VARConfig` holds the settings of the whole model, `LayerPolicy` those of one layer. Both are frozen, checked when they
are made (one error names every fault), and survive a round trip through JSON. Neither names a file: the table comes
from `varjax.load_table` or `varjax.build_table`.

    config = VARConfig.from_routing_stats("results/routing_stats.parquet", cache_size=500)
    config = VARConfig.preset("balanced", layers={5: None})    # layer 5 stays with the router
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import numbers
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from varjax import checksums
from varjax.errors import InputError
from varjax.tablefiles import ENTRY, TableFiles

Source = Literal["gate", "table"]
AnswerType = Literal["float32", "bfloat16", "int8"]

PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"frequency_threshold": 100, "entropy_threshold": 0.3, "confidence_threshold": 0.9},
    "balanced": {"frequency_threshold": 50, "entropy_threshold": 0.5, "confidence_threshold": 0.8},
    "aggressive": {"frequency_threshold": 25, "entropy_threshold": 0.7, "confidence_threshold": 0.7},
}
_RENAMED = {  # names of fields in files of earlier versions
    "kept": "experts_kept",
    "residual": "use_answers",
    "orders": "ngram_orders",
    "renormalise": "renormalize",
    "residual_shrinkage": "answer_shrinkage",
}
_REMOVED = {  # what earlier versions had as settings, and where it belongs now
    "routing_stats": "pass the file to varjax.load_table",
    "residuals": "pass the file to varjax.load_table",
    "max_quality_degradation": "give the limit to the evaluation (--limit)",
}
_FORMER_LIMIT = 0.01  # the default of max_quality_degradation, and of --limit


@dataclass(frozen=True)
class LayerPolicy:
    """What one layer does with a token that the table knows.

    Raises:
        InputError: naming every field that is out of range, its value and what is allowed.
    """

    experts_kept: int | None = 1  # experts to run, 0 = none; None = all with a tolerance, else by mass_threshold
    use_answers: bool = True  # the answers of the experts that are left out stand in for them
    ngram_orders: tuple[int, ...] = (1,)  # lengths of the contexts to look up, the longest known wins; 0 = every token
    choice_from: Source = "gate"  # who names the experts
    weights_from: Source = "gate"  # who weighs them; the table's weights go by rank
    gate_ratio: float | None = None  # drop an expert whose weight is below this fraction of the first one's
    gate_mass: float | None = None  # drop the experts after those whose gate probabilities reach this sum
    tolerance: float | None = None  # drop an expert whose weight times its answer's deviation is below this
    renormalize: bool = False  # rescale the weights of the experts that run to the sum of all weights
    frequency_threshold: int | None = None  # occurrences that a key needs; None = VARConfig's
    entropy_threshold: float | None = None  # nats, highest mean gate entropy of a key; None = VARConfig's

    def __post_init__(self) -> None:
        check = _Check(self)
        check.integer("experts_kept", 0, optional=True)
        check.flags("use_answers", "renormalize")
        check.integers("ngram_orders", 0, optional=False)
        check.one_of("choice_from", ("gate", "table"))
        check.one_of("weights_from", ("gate", "table"))
        check.number("gate_ratio", 0.0, 1.0, above=True, optional=True)
        check.number("gate_mass", 0.0, 1.0, above=True, optional=True)
        check.number("tolerance", 0.0, above=True, optional=True)
        check.integer("frequency_threshold", 1, optional=True)
        check.number("entropy_threshold", 0.0, optional=True)
        if self.use_answers and self.renormalize:
            check.fault("renormalize", "False with use_answers=True: the answers carry the weight that is dropped")
        if not self.use_answers and self.tolerance is not None:
            check.fault("tolerance", "None with use_answers=False: it bounds the error of an answer")
        every_token = isinstance(self.ngram_orders, tuple) and 0 in self.ngram_orders
        if every_token and self.experts_kept is None and self.tolerance is None:
            check.fault(
                "experts_kept", "an integer, or a tolerance, with order 0: nothing is predicted for every token"
            )
        check.finish()


@dataclass(frozen=True)
class VARConfig:
    """The settings of VAR for one model. The defaults are the `balanced` preset.

    Raises:
        InputError: naming every field that is out of range, its value and what is allowed.
    """

    frequency_threshold: int = 50  # occurrences that a key needs before the fast tier answers for it
    entropy_threshold: float = 0.5  # nats, highest mean gate entropy of such a key; ln E and above let all pass
    confidence_threshold: float = 0.8  # top gate probability from which a learned decision enters the cache
    cache_size: int = 1000  # contexts that the cached tier remembers; 0 = no cached tier
    cache_ttl_seconds: float = 60.0  # seconds, age at which a cached decision expires
    context_window_size: int = 4  # token ids that make a cached context, the current one included
    enable_var: bool = True  # False = the plain model, bit for bit
    mass_threshold: float = 0.9  # fraction of the gate weight to keep when experts_kept is None, and for cache hits
    answer_shrinkage: float = 1.0  # k0, weight of an answer's prior, in occurrences
    answer_dtype: AnswerType = "float32"  # how answers are stored; "bfloat16" takes half of the bytes, "int8" a quarter
    answers_per_layer: int | None = None  # most answers that a layer holds, the most valuable ones; None = all
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
        check.flags("enable_var")
        check.number("mass_threshold", 0.0, 1.0, above=True)
        check.number("answer_shrinkage", 0.0)
        check.one_of("answer_dtype", ("float32", "bfloat16", "int8"))
        check.integer("answers_per_layer", 1, optional=True)
        check.policy("default")
        check.policies("layers")
        check.integers("cache_layers", 0, optional=True)
        check.finish()

    def policy(self, layer: int) -> LayerPolicy | None:
        """The policy of one layer, with the thresholds that it inherits filled in.

        Args:
            layer: number of the layer among those with experts, from 0.

        Returns:
            The policy; None if the layer is left to the learned router.
        """
        policy = dict(self.layers).get(layer, self.default)
        if policy is None:
            return None
        inherited = ("frequency_threshold", "entropy_threshold")
        return replace(policy, **{name: getattr(self, name) for name in inherited if getattr(policy, name) is None})

    def caches(self, layer: int) -> bool:
        """Whether the cached tier may decide in a layer.

        Args:
            layer: number of the layer among those with experts, from 0.

        Returns:
            True if there is a cached tier, the layer has a policy, and `cache_layers` does not exclude it.
        """
        listed = self.cache_layers is None or layer in self.cache_layers
        return self.cache_size > 0 and listed and self.policy(layer) is not None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> VARConfig:
        """A preset with some fields replaced.

        Args:
            name: `conservative`, `balanced` or `aggressive`.
            **overrides: fields of VARConfig.

        Returns:
            The config.

        Raises:
            InputError: no preset or no field has that name, or a value is out of range.
        """
        if name not in PRESETS:
            raise InputError(f"no preset is called {name!r}; known presets: {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | _known(cls, overrides)))

    @classmethod
    def from_routing_stats(
        cls, path: str | os.PathLike[str], answers: str | os.PathLike[str] | None = None, **overrides: Any
    ) -> VARConfig:
        """Settings that fit a statistics file: where there are no answers, the default policy uses none.

        Such a policy runs as many experts as reach `mass_threshold`, because nothing can stand in for the others.

        Args:
            path: Parquet file of the collection; pass it to `varjax.load_table` too.
            answers: safetensors file of the answers; None: the one next to the statistics, if there is one.
            **overrides: fields of VARConfig.

        Returns:
            The config.

        Raises:
            FileNotFoundError: one of the files does not exist.
            InputError: the first is not a Parquet file, the answers belong to other statistics, or an override is
                unknown or out of range.
        """
        values = _known(cls, overrides)
        if TableFiles.find(path, answers).answers is None:
            values.setdefault("default", LayerPolicy(experts_kept=None, use_answers=False))
        return cls(**values)

    def to_json(self) -> str:
        """The settings as JSON text.

        Returns:
            An object with every field; policies are objects, `layers` has the layer numbers as keys.
        """
        layers = {str(layer): policy and asdict(policy) for layer, policy in dict(self.layers).items()}
        return json.dumps(asdict(self) | {"layers": layers}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> VARConfig:
        """The inverse of `to_json`. It reads the names that earlier versions gave to fields, too.

        The limit on quality that earlier versions kept here is left out, with a UserWarning if it is not the default.

        Args:
            text: a JSON object; missing fields take their defaults. A checksum is verified; a text that was written by
                hand needs none.

        Returns:
            The config.

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
        values = {name: value for name, value in data.items() if name not in (ENTRY, *_REMOVED)}
        limit = data.get("max_quality_degradation", _FORMER_LIMIT)
        if limit != _FORMER_LIMIT:
            told = f"is no setting any more and left out; {_REMOVED['max_quality_degradation']}"
            warnings.warn(f"max_quality_degradation={limit!r} {told}", stacklevel=2)
        values = _known(cls, _renamed(cls, values))
        if "default" in values:
            values["default"] = _policy_from_json(values["default"], "default")
        if isinstance(values.get("layers"), dict):
            values["layers"] = tuple(
                (int(key) if key.isdecimal() else key, _policy_from_json(value, f"layers[{key}]"))
                for key, value in values["layers"].items()
            )
        return cls(**values)

    def digest(self, table: str = "") -> str:
        """A name for these settings and, if it is given, for the table that they are used with.

        Args:
            table: `TableFiles.digest` of its files.

        Returns:
            The SHA-256 of both, as hexadecimal digits.
        """
        return hashlib.sha256((self.to_json() + table).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str], files: TableFiles | None = None) -> None:
        """Write the settings as JSON with a checksum, whole or not at all.

        Args:
            path: replaced if it exists.
            files: of the table that the settings were found with; `varjax.tablefiles.saved_files` reads them back.
        """
        entry = {} if files is None else {ENTRY: asdict(files)}
        checksums.write_json(path, json.loads(self.to_json()) | entry)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VARConfig:
        """The settings that `save` wrote.

        Args:
            path: a JSON file.

        Returns:
            The config.

        Raises:
            InputError: as `from_json`, with the file named.
        """
        try:
            return cls.from_json(Path(path).read_bytes().decode("utf-8-sig"))
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from error


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

    def flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self.config, name), bool):
                self.fault(name, "True or False")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self.config, name) not in allowed:
            self.fault(name, " or ".join(map(repr, allowed)))

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


def _renamed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `cls` under the names of this version. Raises InputError for a field under both names."""
    names = {field.name for field in fields(cls)}
    new = {name: _RENAMED[name] for name in values if _RENAMED.get(name) in names}
    for former, name in new.items():
        if name in values:
            raise InputError(f"{cls.__name__}: {former!r} is the former name of {name!r}; remove one of the two")
    return {new.get(name, name): value for name, value in values.items()}


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values`, once every name in it is a field of `cls`."""
    names = [f.name for f in fields(cls)]
    for name in values:
        if name not in names:
            near = _RENAMED.get(name)
            if near not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            told = _REMOVED.get(name, f"did you mean {near!r}?")
            raise InputError(f"{cls.__name__} has no field {name!r}; {told}")
    return dict(values)


def _policy_from_json(value: Any, where: str) -> LayerPolicy | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with the fields of LayerPolicy or null, got {value!r}")
    try:
        return LayerPolicy(**_known(LayerPolicy, _renamed(LayerPolicy, value)))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
