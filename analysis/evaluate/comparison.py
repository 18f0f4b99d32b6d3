"""Two evaluations of the same documents side by side, with intervals and the published criteria.

Letters: N documents.

The documents are paired, so what varies between texts cancels. Intervals are percentile bootstraps over documents:
tokens of one document depend on each other, documents do not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.criteria import EVALUATION_SPEEDUP, MAX_DEGRADATION, MAX_LEARNED, Criterion
from analysis.report.report import shown
from analysis.resampling import Estimate, ratio_estimate
from varjax import checksums
from varjax.errors import InputError


class ResultError(InputError):
    """A result file that cannot be compared; names file, field and fix."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation as `02_evaluate_var.py` wrote it."""

    path: Path
    fields: dict[str, Any]
    documents: pd.DataFrame  # id, group, nll, tokens, words, bytes


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
    return ratio_estimate(difference, pair["tokens"].to_numpy(), samples, seed, np.expm1)


def criteria(change: Estimate, result: Result) -> list[Criterion]:
    """The published criteria of phase 2; a speed-up or a tier that was not measured is said to be so."""
    fields = result.fields
    speedup = fields.get("throughput", {}).get("speedup", {})
    learned = fields.get("tiers", {}).get("learned")

    def judged(name: str, bound: str, value: float | None, form: str, passed: bool) -> Criterion:
        return Criterion(name, bound, shown(value, form), None if value is None else passed, value)

    loss = change.value
    rows = [judged("perplexity degradation", f"< {MAX_DEGRADATION:.0%}", loss, "+.2%", loss < MAX_DEGRADATION)]
    for phase in ("prefill", "decode"):
        value, bar = speedup.get(phase, {}).get("value"), EVALUATION_SPEEDUP
        rows.append(judged(f"speed-up, {phase}", f">= {bar}x", value, ".2f", (value or 0) >= bar))
    rows.append(judged("learned tier", f"< {MAX_LEARNED:.0%}", learned, ".2%", (learned or 0) < MAX_LEARNED))
    return rows
