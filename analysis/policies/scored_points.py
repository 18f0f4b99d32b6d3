"""Many configurations scored on the same documents: what each one costs, and how many experts it runs.

Letters: N documents, P points, S bootstrap draws.

A point is a configuration over a table. All tables of a study have equal shapes, so that its points share one compiled
program. What a point gave is written as soon as it is known, under the hash of everything that decides it; the same
request is read back instead of scored again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from analysis.evaluate.caching import INDEPENDENT, Caching
from analysis.evaluate.quality import plain_runner, score, var_runner
from analysis.report.provenance import hash_json
from analysis.resampling import Estimate
from analysis.text.encoding import Encoded
from models import Model
from varjax import checksums
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.stats import RoutingStats
from varjax.step import TIERS, summary
from varjax.table import RouteTable

FORMAT = 2  # of the files of losses; another one whenever what is scored changes its meaning


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a study is about: a model, its table's sources, a policy, and the documents that every point is scored on.

    Raises:
        InputError: VAR is switched off in the config.
    """

    model: Model
    stats: RoutingStats
    answers: Answers
    config: VARConfig
    documents: Sequence[Encoded]  # that neither the table nor the policy has seen
    batch_size: int = 8  # as in `analysis.evaluate.quality.score`
    max_length: int = 256  # tokens
    stride: int | None = None  # tokens; None: max_length
    folder: Path | None = None  # where the losses are kept; None: nowhere
    samples: int = 2000  # bootstrap draws
    seed: int = 0
    progress: bool = True  # show bars on standard error
    table_sha256: str = ""  # `TableFiles.digest` of the statistics and answers; "": they come from no files
    caching: Caching = INDEPENDENT  # which documents share a cached tier, where a config has one

    def __post_init__(self) -> None:
        if not self.config.enable_var:
            raise InputError("enable_var=False: a study needs a VARConfig whose policy is switched on")

    @cached_property
    def digest(self) -> str:
        """Of everything but the config and the table."""
        arrays = jax.tree.leaves((self.stats, self.answers)) + [one.ids for one in self.documents]
        sha = hashlib.sha256(str(jax.tree.structure((self.stats, self.answers))).encode())
        for array in map(np.ascontiguousarray, arrays):
            sha.update(f"{array.dtype.str}{array.shape}".encode())
            sha.update(array.data)
        model = (self.model.fingerprint, self.model.dtype.name, self.model.engine.name)
        made_by = (FORMAT, metadata.version("varjax"))
        reading = (self.batch_size, self.max_length, self.stride, self.caching)
        return hash_json([*made_by, sha.hexdigest(), *model, *reading])


@dataclasses.dataclass(frozen=True)
class Losses:
    """One point on the documents of a study."""

    nll: np.ndarray  # float64 [N], summed over the document's scored tokens, nats
    tokens: np.ndarray  # int64 [N], scored
    experts_per_token: float  # mean over tokens and layers
    open_share: float  # share of tokens and layers that the learned router decided
    read_back: bool = False  # not scored now but by an earlier run


@dataclasses.dataclass(frozen=True)
class Measured:
    """One point for people."""

    dial: float
    experts_per_token: float
    open_share: float
    degradation: Estimate  # relative change of perplexity per token


def losses(
    subject: Subject, config: VARConfig | None = None, table: RouteTable | None = None, change: Any = ""
) -> Losses:
    """What one point gives, scored now or read back.

    Args:
        config: None: the plain model.
        table: from the subject's statistics and answers, under the policies of `config`.
        change: what was done to the table beyond that, in words that tell tables apart.
    """
    path = subject.folder and subject.folder / f"{hash_json([subject.digest, config, change])[:32]}.parquet"
    if path is not None and path.is_file():
        return _read(path)
    reading: dict[str, Any] = {
        "batch_size": subject.batch_size,
        "max_length": subject.max_length,
        "stride": subject.stride,
    }
    experts, left_open = float(subject.model.config.top_k), 1.0
    if config is None:
        scores, _ = score(plain_runner(subject.model), None, subject.documents, progress=False, **reading)
    else:
        var_model = VARModel(subject.model, config, table=table)
        run, start = var_runner(var_model, subject.caching), subject.caching.init(var_model, subject.batch_size)
        scores, state = score(run, start, subject.documents, progress=False, **reading)
        shares = summary(state.counters, subject.model.config.top_k)
        experts, left_open = shares["experts_per_token"], shares["tiers"][TIERS[-1]]
    found = Losses(scores.nll, scores.tokens, experts, left_open)
    if path is not None:
        _write(path, found, [one.id for one in subject.documents])
    return found


def degradations(plain: Losses, points: Sequence[Losses], counts: np.ndarray) -> np.ndarray:
    """float64 [P, S]: relative change of perplexity per token under the documents' counts [S, N]."""
    difference = np.stack([point.nll - plain.nll for point in points])
    return np.expm1(difference @ counts.T / (counts @ plain.tokens))


def measured(dial: float, plain: Losses, point: Losses, counts: np.ndarray) -> Measured:
    """The point with a 95 % percentile interval of its degradation over the draws [S, N]."""
    (value,) = degradations(plain, [point], np.ones((1, len(plain.nll))))[0]
    low, high = np.quantile(degradations(plain, [point], counts)[0], [0.025, 0.975])
    change = Estimate(float(value), float(low), float(high))
    return Measured(dial, point.experts_per_token, point.open_share, change)


def _write(path: Path, found: Losses, ids: Sequence[str]) -> None:
    about = {"experts_per_token": found.experts_per_token, "open_share": found.open_share}
    table = pa.table({"id": ids, "nll": found.nll, "tokens": found.tokens})
    checksums.write_parquet(path, table.replace_schema_metadata({"varjax": json.dumps(about)}))


def _read(path: Path) -> Losses:
    table = checksums.read_parquet(path, "delete it, and it is measured again", required=True)
    about = json.loads(table.schema.metadata[b"varjax"])
    return Losses(table["nll"].to_numpy(), table["tokens"].to_numpy(), **about, read_back=True)
