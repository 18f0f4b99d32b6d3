"""Two evaluations of the same documents side by side, with intervals and the published criteria.

Letters: N documents.

The documents are paired, so what varies between texts cancels. Intervals are percentile bootstraps over documents:
tokens of one document depend on each other, documents do not.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from varjax import checksums
from varjax.errors import InputError

MAX_DEGRADATION = 0.01  # relative increase of perplexity
MIN_SPEEDUP = 1.2
MAX_LEARNED = 0.15  # share of the tokens that the learned router still routes


class ResultError(InputError):
    """A result file that cannot be compared; names file, field and fix."""


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
        fields = checksums.read_json(path, "give a result of 02_evaluate_var.py", error=ResultError)
    except FileNotFoundError:
        raise ResultError(f"{path} does not exist; run 02_evaluate_var.py first, or correct the path") from None
    needed = ("perplexity", "mode", "documents_file", "documents_sha256")
    missing = [name for name in needed if name not in fields]
    if missing:
        raise ResultError(f"{path} has no field {missing[0]!r}; give a result of 02_evaluate_var.py")
    table = path.parent / fields["documents_file"]
    if not table.exists():
        raise ResultError(f"{table} is missing; it holds the documents of {path}: keep the two files together")
    if checksums.digest_of_file(table) != fields["documents_sha256"]:
        raise ResultError(f"{table}: it was damaged, or belongs to another evaluation than {path}; evaluate again")
    return Result(path, fields, pd.read_parquet(table))


def check_pair(base: Result, other: Result) -> None:
    """Raises ResultError if the two are not of one model, read in one way: their losses would differ for that alone."""

    def settings(result: Result) -> dict[str, Any]:
        model = result.fields.get("provenance", {}).get("model", {})
        windows = {name: result.fields.get(name) for name in ("max_length", "stride", "prefix_id", "full_last")}
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
