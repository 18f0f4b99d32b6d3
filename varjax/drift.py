"""Drift: whether the texts that come in are still like those that the audit was calibrated on.

Letters: N texts, B texts of one call, L layers, M streams.

A stream is a signal in one layer and tier, or over all of them. The tokens of a text depend on each other, so a text's
mean over its tokens is one observation.

| signal | of a text |
|---|---|
| `error` | mean relative error of the layer's output, over its audited tokens, clipped at ERROR_CAP |
| `agreement` | share of its planned tokens whose predicted first expert is the learned router's |
| `open` | share of its tokens that the table does not know |

From calibration texts each stream gets a bound on its mean and, while texts come in, a confidence sequence
(`varjax.bounds`): bounds that hold after every text at once. Drift is declared where the two exclude each
other: the error's lower bound above the calibrated upper one, the agreement's upper bound below the calibrated lower
one, the open share to either side.

If the texts come from the population of the calibration texts, a drift is declared, however long the run, with
probability ALPHA at most. Half of ALPHA is for the calibration, half for the run; in each, the streams over all layers
share a half (they have the most tokens), those of single layers and tiers the other (Bonferroni). A change during a run
should not have to outweigh everything before it, so the sequences start again after as many texts as calibrated
the audit; the k-th of them gets the 1 / (k (k + 1)) part of the error, which sums to 1.

What the cached tier answers depends on the texts before, so its own streams are promised this only as far as its cache
was as full in calibration as it is in the run; the fast tier and the open share do not depend on it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from varjax import bounds, checksums
from varjax.bounds import ConfidenceSequence
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.routing import CACHED, FAST
from varjax.step import TIERS as ALL_TIERS

ERROR_CAP = 1.0  # relative error that an observation is clipped to: as without any answer
TIERS = ALL_TIERS[FAST : CACHED + 1]  # those that plan
ALPHA = 0.05  # probability of a false alarm in a run of any length
LOOK = 8  # texts between two looks at the bounds
NAMED = 4  # drifts that a message names
_SIDES: dict[str, bounds.Side] = {"error": "lower", "agreement": "upper", "open": "both"}  # that would tell of drift
FORMAT = 1  # of the calibration file


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """Sums over the tokens of each text; tallies of a text's parts may be added up."""

    tokens: Any  # int32 [B], real ones
    planned: Any  # int32 [B, L, tiers]
    agreed: Any  # int32 [B, L, tiers], planned ones whose predicted first expert was the learned router's
    audited: Any  # int32 [B, L, tiers], also computed in full
    error: Any  # float32 [B, L, tiers], sum of their clipped relative errors


class Stream(NamedTuple):
    """What is watched."""

    signal: str  # "error", "agreement" or "open"
    layer: int | None = None  # None: all layers together
    tier: str | None = None  # None: both planning tiers

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value of an observation."""
        return 0.0, ERROR_CAP if self.signal == "error" else 1.0

    def __str__(self) -> str:
        where = "over all layers" if self.layer is None else f"in layer {self.layer}"
        return f"{self.signal} {where}" + (f", {self.tier} tier" if self.tier else "")


def watched(config: VARConfig, num_layers: int) -> tuple[Stream, ...]:
    """The streams of a config: over all layers, then of each layer and tier that may plan.

    Args:
        config: the settings.
        num_layers: L.

    Returns:
        [M] streams.
    """
    streams = [Stream("error"), Stream("agreement"), Stream("open")]
    for layer in range(num_layers):
        if config.policy(layer) is None:
            continue
        for tier in TIERS if config.caches(layer) else TIERS[:1]:
            streams += [Stream("error", layer, tier), Stream("agreement", layer, tier)]
        streams.append(Stream("open", layer))
    return tuple(streams)


def observe(tally: Tally, streams: tuple[Stream, ...]) -> np.ndarray:
    """Each text's mean in each stream.

    `open` is the share that the table does not know, whatever is in the cache: the contents of the cache
    differ from text to text.

    Args:
        tally: the sums of B texts.
        streams: [M].

    Returns:
        float64 [B, M]; NaN where a text has no token to observe.
    """
    tokens = np.asarray(tally.tokens, np.float64)
    tallied = {name: np.asarray(getattr(tally, name), np.float64) for name in ("planned", "agreed", "audited", "error")}
    columns = []
    for signal, layer, tier in streams:
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        tiers = slice(None) if tier is None else slice(TIERS.index(tier), TIERS.index(tier) + 1)
        sums = {name: values[:, layers, tiers].sum(axis=(1, 2)) for name, values in tallied.items()}
        if signal == "open":
            every = tokens * tallied["planned"][:, layers].shape[1]
            above, below = every - tallied["planned"][:, layers, FAST].sum(axis=1), every
        elif signal == "agreement":
            above, below = sums["agreed"], sums["planned"]
        else:
            above, below = sums["error"], sums["audited"]
        # A float32 sum of clipped errors may pass the limit by its rounding.
        limit = Stream(signal).limits[1]
        columns.append(np.where(below > 0, np.minimum(above / np.maximum(below, 1), limit), np.nan))
    return np.stack(columns, axis=1)


class DriftWarning(UserWarning):
    """What comes in is not what the audit was calibrated on."""


@dataclass(frozen=True)
class Calibrated:
    """What a stream's mean was on the calibration texts. A side on which no drift is declared has the limit."""

    stream: Stream
    texts: int  # that had an observation
    mean: float | None  # None: there was no observation
    lower: float
    upper: float


@dataclass(frozen=True)
class Calibration:
    """The calibrated values of one model under one config."""

    fingerprint: str  # of the model
    config_sha256: str  # `VARModel.digest`
    share: float  # of the planned tokens that is audited
    texts: int
    values: tuple[Calibrated, ...]

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that were calibrated, [M]."""
        return tuple(value.stream for value in self.values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration as JSON with a checksum, whole or not at all.

        Args:
            path: replaced if it exists.
        """
        values = [asdict(value) | {"stream": value.stream._asdict()} for value in self.values]
        checksums.write_json(path, {"format": FORMAT, **asdict(self), "values": values})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Args:
            path: a JSON file.

        Returns:
            The calibration.

        Raises:
            InputError: the file is not a calibration, or was damaged.
        """
        data = checksums.read_json(path, "calibrate again")
        try:
            if data.pop("format") != FORMAT:
                raise InputError(f"another format than {FORMAT}")
            values = [Calibrated(**value | {"stream": Stream(**value["stream"])}) for value in data.pop("values")]
            return cls(**data, values=tuple(values))
        except (InputError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the calibration of an audit ({error}); calibrate again") from error


@dataclass(frozen=True)
class Drift:
    """One stream that has left its calibration."""

    stream: Stream
    texts: int  # that had come in by then
    calibrated: float  # mean
    calibrated_bound: float
    observed: float  # mean, since the sequences last began
    observed_bound: float  # of its mean, on the side of `calibrated_bound`

    def __str__(self) -> str:
        sign = ">" if self.observed_bound > self.calibrated_bound else "<"
        return (
            f"drift after {self.texts} texts: {self.stream} is {self.observed:.3f} (bound {self.observed_bound:.3f}), "
            f"calibrated {self.calibrated:.3f} ({sign} {self.calibrated_bound:.3f})"
        )


@dataclass(frozen=True)
class Monitor:
    """What has come in so far."""

    calibration: Calibration
    sequences: tuple[ConfidenceSequence, ...]  # [M]
    turn: int  # how often the sequences have begun, 1 at first
    texts: int  # looked at
    waiting: np.ndarray  # float64 [< LOOK, M], observed since the last look
    drifts: tuple[Drift, ...]  # the first of each stream


def calibrate(
    observed: np.ndarray, streams: tuple[Stream, ...], *, fingerprint: str, config_sha256: str, share: float
) -> Calibration:
    """Bounds on each stream's mean from calibration texts.

    Args:
        observed: float64 [N, M], from `observe`.
        streams: [M].
        fingerprint: of the model.
        config_sha256: `VARModel.digest`.
        share: of the planned tokens that was audited.

    Returns:
        The calibration.

    Raises:
        InputError: fewer than two texts.
    """
    if len(observed) < 2:
        raise InputError(f"{len(observed)} calibration texts; give at least two, some hundred to notice much")
    values = []
    for stream, column, error in zip(streams, observed.T, _errors(streams), strict=True):
        low, high = lower, upper = stream.limits
        seen = column[~np.isnan(column)]
        level = 1 - (error / 2 if stream.signal == "open" else error)  # two sides or one
        if len(seen) >= 2 and stream.signal != "agreement":
            upper = bounds.upper_bound(seen, low, high, level)
        if len(seen) >= 2 and stream.signal != "error":
            lower = -bounds.upper_bound(-seen, -high, -low, level)
        values.append(Calibrated(stream, len(seen), float(seen.mean()) if len(seen) else None, lower, upper))
    return Calibration(fingerprint, config_sha256, share, len(observed), tuple(values))


def begin(calibration: Calibration) -> Monitor:
    """A monitor that has seen nothing.

    Args:
        calibration: what to compare with.

    Returns:
        The monitor.
    """
    nothing = np.empty((0, len(calibration.values)))
    return Monitor(calibration, _sequences(calibration, 1), 1, 0, nothing, ())


def watch(monitor: Monitor, observed: np.ndarray) -> Monitor:
    """The monitor after some more texts.

    Args:
        monitor: before them.
        observed: float64 [N, M], from `observe`, in the order in which the texts came.

    Returns:
        The new monitor.
    """
    waiting = np.concatenate([monitor.waiting, observed])
    while len(waiting) >= LOOK:
        monitor = _look(monitor, waiting[:LOOK])
        waiting = waiting[LOOK:]
    return replace(monitor, waiting=waiting)


def message(monitor: Monitor) -> str:
    """The drifts in words, the first few of them.

    Args:
        monitor: with a drift.

    Returns:
        A sentence.
    """
    shown, more = monitor.drifts[:NAMED], len(monitor.drifts) - NAMED
    return "; ".join(map(str, shown)) + (f"; and {more} more streams." if more > 0 else ".")


def report(monitor: Monitor) -> dict[str, Any]:
    """What was calibrated and what was observed since the sequences last began, ready for JSON.

    Args:
        monitor: any.

    Returns:
        Fields.
    """
    streams = []
    for value, sequence in zip(monitor.calibration.values, monitor.sequences, strict=True):
        calibrated = {name: getattr(value, name) for name in ("texts", "mean", "lower", "upper")}
        lower, upper = bounds.interval(sequence)
        mean = sequence.total / sequence.count if sequence.count else None
        now = {"texts": sequence.count, "mean": mean, "lower": lower, "upper": upper}
        streams.append({**value.stream._asdict(), "calibrated": calibrated, "observed": now})
    drifts = [{**asdict(found), "stream": found.stream._asdict()} for found in monitor.drifts]
    return {
        "texts": monitor.texts,
        "texts_waiting": len(monitor.waiting),
        "false_alarm_probability": ALPHA,
        "share": monitor.calibration.share,
        "drifts": drifts,
        "streams": streams,
    }


def _look(monitor: Monitor, observed: np.ndarray) -> Monitor:
    calibration, texts = monitor.calibration, monitor.texts + len(observed)
    sequences, drifts = [], list(monitor.drifts)
    for value, sequence, column in zip(calibration.values, monitor.sequences, observed.T, strict=True):
        seen = column[~np.isnan(column)]
        if len(seen):
            sequence = bounds.update(sequence, seen)
            found = _drift(value, sequence, texts)
            if found and all(found.stream != known.stream for known in drifts):
                drifts.append(found)
        sequences.append(sequence)
    turn = 1 + texts // max(calibration.texts, LOOK)
    if turn > monitor.turn:
        sequences = list(_sequences(calibration, turn))
    return replace(monitor, sequences=tuple(sequences), turn=turn, texts=texts, drifts=tuple(drifts))


def _drift(value: Calibrated, sequence: ConfidenceSequence, texts: int) -> Drift | None:
    lower, upper = bounds.interval(sequence)
    mean = sequence.total / sequence.count
    if value.mean is None or not (lower > value.upper or upper < value.lower):
        return None
    limits = (value.upper, mean, lower) if lower > value.upper else (value.lower, mean, upper)
    return Drift(value.stream, texts, value.mean, *limits)


def _sequences(calibration: Calibration, turn: int) -> tuple[ConfidenceSequence, ...]:
    errors = np.maximum(
        _errors(calibration.streams) / (turn * (turn + 1)), 2.0**-50
    )  # less would be lost when added to 1
    return tuple(
        bounds.begin(*stream.limits, 1 - error, _SIDES[stream.signal])
        for stream, error in zip(calibration.streams, errors, strict=True)
    )


def _errors(streams: tuple[Stream, ...]) -> np.ndarray:
    """float64 [M]: the part of ALPHA / 2 that falls to each stream."""
    whole = np.array([stream.layer is None for stream in streams])
    if whole.all():
        return np.full(len(streams), ALPHA / 2 / len(streams))
    return ALPHA / 4 / np.where(whole, whole.sum(), (~whole).sum())
