"""Two evaluations of the same documents side by side, with intervals and the published criteria.

Letters: N documents.

The documents are paired, so what varies between texts cancels. Intervals are percentile bootstraps over documents:
tokens of one document depend on each other, documents do not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

MAX_DEGRADATION = 0.01  # relative increase of perplexity
MIN_SPEEDUP = 1.2
MAX_LEARNED = 0.15  # share of the tokens that the learned router still routes


class ResultError(ValueError):
    """A result file that cannot be compared; names file, field and mend."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation as `02_evaluate_var.py` wrote it."""

    path: Path
    fields: dict[str, Any]
    documents: pd.DataFrame  # id, group, nll, tokens, words, bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Criterion:
    name: str
    value: float | None
    bound: str
    passed: bool | None  # None: not measured


def read_result(path: Path) -> Result:
    """An evaluation and its documents. Raises ResultError if either is missing or not what it should be."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path} does not exist; run 02_evaluate_var.py first, or mend the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} is not JSON ({error}); give a result of 02_evaluate_var.py") from None
    missing = [name for name in ("perplexity", "mode", "documents_file") if name not in fields]
    if missing:
        raise ResultError(f"{path} has no field {missing[0]!r}; give a result of 02_evaluate_var.py")
    table = path.parent / fields["documents_file"]
    if not table.exists():
        raise ResultError(f"{table} is missing; it holds the documents of {path}: keep the two files together")
    return Result(path, fields, pd.read_parquet(table))


def check_pair(base: Result, other: Result) -> None:
    """Raises ResultError if the two are not of one model, read in one way: their losses would differ for that alone."""

    def settings(result: Result) -> dict[str, Any]:
        model = result.fields.get("provenance", {}).get("model", {})
        windows = {name: result.fields.get(name) for name in ("max_length", "stride", "prefix_id")}
        return {"model fingerprint": model.get("fingerprint"), "model dtype": model.get("dtype"), **windows}

    ours, theirs = settings(base), settings(other)
    for name, value in theirs.items():
        if value != ours[name]:
            raise ResultError(
                f"{other.path} has another {name} ({value}) than {base.path} ({ours[name]}); evaluate both alike"
            )


def degradation(base: Result, other: Result, samples: int = 2000, seed: int = 0) -> Estimate:
    """Relative change of perplexity per token from `base` to `other`, over the documents that both scored.

    Raises ResultError if they scored different documents or tokens, so that nothing could be paired, or `check_pair`
    does.
    """
    check_pair(base, other)
    pair = base.documents.merge(other.documents, on="id", suffixes=("", "_other"))
    if len(pair) != len(base.documents) or len(pair) != len(other.documents) or len(pair) == 0:
        raise ResultError(
            f"{base.path} and {other.path} share {len(pair)} of {len(base.documents)} and {len(other.documents)} "
            "documents; evaluate both on the same dataset, split and number of samples"
        )
    if (pair["tokens"] != pair["tokens_other"]).any():
        raise ResultError(f"{base.path} and {other.path} score different tokens; use the same tokenizer and lengths")
    difference = (pair["nll_other"] - pair["nll"]).to_numpy()
    return ratio_interval(difference, pair["tokens"].to_numpy(), samples, seed, math.expm1)


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, samples: int, seed: int, transform: Any) -> Estimate:
    """`transform(sum(numerator) / sum(denominator))` with a 95 % percentile bootstrap over the N documents."""
    rng = np.random.default_rng(seed)
    draws = np.empty(samples)
    for index in range(samples):
        chosen = rng.integers(0, len(numerator), len(numerator))
        draws[index] = transform(numerator[chosen].sum() / denominator[chosen].sum())
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(transform(numerator.sum() / denominator.sum()), float(low), float(high))


def criteria(change: Estimate, result: Result) -> list[Criterion]:
    """The published criteria of phase 2; a speed-up or a tier that was not measured is said to be so."""
    fields = result.fields
    speedup = fields.get("throughput", {}).get("speedup", {})
    learned = fields.get("tiers", {}).get("learned")

    def judged(name: str, value: float | None, bound: str, passed: bool) -> Criterion:
        return Criterion(name, value, bound, None if value is None else passed)

    rows = [judged("perplexity degradation", change.value, f"< {MAX_DEGRADATION:.0%}", change.value < MAX_DEGRADATION)]
    for phase in ("prefill", "decode"):
        value = speedup.get(phase, {}).get("value")
        rows.append(judged(f"speed-up, {phase}", value, f">= {MIN_SPEEDUP}x", (value or 0) >= MIN_SPEEDUP))
    rows.append(judged("learned tier", learned, f"< {MAX_LEARNED:.0%}", (learned or 0) < MAX_LEARNED))
    return rows


def report(base: Result, other: Result) -> tuple[str, dict[str, Any]]:
    """The comparison as text for people and as fields for a file."""
    change = degradation(base, other)
    judged = criteria(change, other)
    fields = other.fields
    lines = [
        f"{'':28}{base.fields['mode']:>14}{fields['mode']:>14}",
        f"{'perplexity per token':28}{base.fields['perplexity']:>14.3f}{fields['perplexity']:>14.3f}"
        f"   {change.value:+.2%}  [{change.low:+.2%}, {change.high:+.2%}]",
    ]
    for phase in ("prefill", "decode"):
        rates = [r.fields.get("throughput", {}).get(f"{phase}_tokens_per_second") for r in (base, other)]
        # The speed-up is measured pair by pair inside one run; the rates of two runs are not its quotient.
        ratio = fields.get("throughput", {}).get("speedup", {}).get(phase)
        if None in rates:
            continue
        tail = f"   {ratio['value']:.2f}x  [{ratio['low']:.2f}, {ratio['high']:.2f}] paired" if ratio else ""
        lines.append(f"{phase + ', tokens/s':28}{rates[0]:>14,.0f}{rates[1]:>14,.0f}{tail}")
    runs = (base.fields.get("experts_per_token"), fields.get("experts_per_token"))
    if None not in runs:
        lines.append(f"{'experts per token and layer':28}{runs[0]:>14.2f}{runs[1]:>14.2f}")
    if "tiers" in fields:
        tiers = "   ".join(f"{name} {share:.1%}" for name, share in fields["tiers"].items())
        lines.append(f"{'tiers':28}{tiers}")
    lines.append("")
    for row in judged:
        verdict = {True: "PASS", False: "FAIL", None: "not measured"}[row.passed]
        value = "" if row.value is None else _value(row)
        lines.append(f"  {row.name:26}{row.bound:>8}{value:>10}   {verdict}")
    documents, tokens = len(base.documents), int(base.documents["tokens"].sum())
    lines.append(f"\n{documents} documents, {tokens:,} tokens; 95 % intervals by bootstrap over documents.")
    if "throughput" in fields:
        lines.append(
            "Speed-ups are paired: both sides in turns inside the second run, intervals over its rounds. The tokens/s\n"
            "of two runs may differ by more, for the machine may have been busier in one."
        )
    saved = {
        "base": str(base.path),
        "other": str(other.path),
        "degradation": dataclasses.asdict(change),
        "criteria": [dataclasses.asdict(row) for row in judged],
        "documents": documents,
        "tokens": tokens,
    }
    return "\n".join(lines), saved


def _value(row: Criterion) -> str:
    """A factor, a change or a share, as its name says."""
    if row.name.startswith("speed-up"):
        return f"{row.value:.2f}x"
    return f"{row.value:+.2%}" if "degradation" in row.name else f"{row.value:.2%}"
