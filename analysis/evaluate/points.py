"""Many configurations scored on the same documents: what each one costs, and how many experts it runs.

Letters: N documents, P points, S bootstrap draws.

A point is a configuration over a table. All tables of a study have equal shapes, so that its points share one compiled
program. The losses of a point are written as soon as they are known, under a hash of everything that decides them; the
same request is read back instead of scored again.
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

from analysis.evaluate.losses import INDEPENDENT, Caching, Losses, plain_runner, score, var_runner
from analysis.report.provenance import hash_json
from analysis.resampling import Estimate
from analysis.text.encoding import Encoded
from models import Model
from varjax import checksums
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import VARModel, build_for
from varjax.stats import RoutingStats
from varjax.step import TIERS, summary
from varjax.table import RouteTable

_FORMAT = 3  # of the files of losses; raised whenever the meaning of what is scored changes


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is scored: a model, the sources of its table, a policy, and the documents of every point.

    Raises:
        InputError: VAR is switched off in the config.
    """

    model: Model
    stats: RoutingStats
    answers: Answers
    config: VARConfig
    documents: Sequence[Encoded]  # that neither the table nor the policy has seen
    batch_size: int = 8  # as in `analysis.evaluate.losses.score`
    max_length: int = 256  # tokens
    stride: int | None = None  # tokens; None: max_length
    folder: Path | None = None  # where the losses are kept; None: nowhere
    samples: int = 2000  # bootstrap draws
    seed: int = 0
    progress: bool = True  # show bars on standard error
    caching: Caching = INDEPENDENT  # which documents share a cached tier, where a config has one
    table_sha256: str = ""  # `TableFiles.digest` of the statistics and answers; "": they come from no files

    def __post_init__(self) -> None:
        if not self.config.enable_var:
            raise InputError("enable_var=False: a study needs a VARConfig whose policy is switched on")

    @property
    def windows(self) -> dict[str, Any]:
        """The arguments of `score` and `token_losses` that say how documents are read."""
        return {"batch_size": self.batch_size, "max_length": self.max_length, "stride": self.stride}

    def build(self, config: VARConfig | None = None, *, keep_shapes: bool = True) -> RouteTable:
        """Build the table of a configuration.

        Args:
            config: None: that of the subject.
            keep_shapes: equal shapes under any policy, so that all tables share one compiled program.

        Returns:
            The table.
        """
        return build_for(self.model, config or self.config, self.stats, self.answers, keep_shapes=keep_shapes)

    @cached_property
    def digest(self) -> str:
        """A hash of everything but the config and the table."""
        arrays = jax.tree.leaves((self.stats, self.answers)) + [one.ids for one in self.documents]
        sha = hashlib.sha256(str(jax.tree.structure((self.stats, self.answers))).encode())
        for array in map(np.ascontiguousarray, arrays):
            sha.update(f"{array.dtype.str}{array.shape}".encode())
            sha.update(array.data)
        model = (self.model.fingerprint, self.model.dtype.name, self.model.engine.name)
        made_by = (_FORMAT, metadata.version("varjax"))
        return hash_json([*made_by, sha.hexdigest(), *model, *self.windows.values(), self.caching])


@dataclasses.dataclass(frozen=True)
class Point(Losses):
    """One configuration on the documents of a subject."""

    experts_per_token: float  # mean over tokens and layers
    open_share: float  # share of tokens and layers that the learned router decided
    read_back: bool = False  # not scored now but by an earlier run


@dataclasses.dataclass(frozen=True)
class MeasuredPoint:
    """One point for people."""

    dial: float
    experts_per_token: float
    open_share: float
    degradation: Estimate  # relative change in perplexity per token


def score_point(
    subject: Subject, config: VARConfig | None = None, table: RouteTable | None = None, change: Any = ""
) -> Point:
    """Score one configuration, or read back what an earlier run scored.

    Args:
        subject: the model and the documents.
        config: the configuration; None: the plain model.
        table: from the subject's statistics and answers, under the policies of `config`.
        change: what was done to the table beyond that, in words that tell tables apart.

    Returns:
        The losses of every document, and the experts that ran.
    """
    path = subject.folder and subject.folder / f"{hash_json([subject.digest, config, change])[:32]}.parquet"
    if path is not None and path.is_file():
        return _read(path)
    experts, left_open = float(subject.model.config.top_k), 1.0
    if config is None:
        scores, _ = score(plain_runner(subject.model), None, subject.documents, progress=False, **subject.windows)
    else:
        var_model = VARModel(subject.model, config, table=table)
        run, start = var_runner(var_model, subject.caching), subject.caching.init(var_model, subject.batch_size)
        scores, state = score(run, start, subject.documents, progress=False, **subject.windows)
        shares = summary(state.counters, subject.model.config.top_k)
        experts, left_open = shares["experts_per_token"], shares["tiers"][TIERS[-1]]
    found = Point(list(scores.ids), list(scores.groups), scores.nll, scores.tokens, experts, left_open)
    if path is not None:
        _write(path, found)
    return found


def _write(path: Path, found: Point) -> None:
    about = {"experts_per_token": found.experts_per_token, "open_share": found.open_share}
    table = pa.table({"id": found.ids, "group": found.groups, "nll": found.nll, "tokens": found.tokens})
    checksums.write_parquet(path, table.replace_schema_metadata({"varjax": json.dumps(about)}))


def _read(path: Path) -> Point:
    table = checksums.read_parquet(path, "delete it, and it is scored again", required=True)
    about = json.loads(table.schema.metadata[b"varjax"])
    names = table["id"].to_pylist(), table["group"].to_pylist()
    return Point(*names, table["nll"].to_numpy(), table["tokens"].to_numpy(), **about, read_back=True)


def degradations(plain: Losses, points: Sequence[Losses], counts: np.ndarray) -> np.ndarray:
    """Compute the relative change in perplexity per token in every bootstrap draw.

    Args:
        plain: of the plain model.
        points: P others on the same documents.
        counts: float64 [S, N], how often each draw has each document.

    Returns:
        float64 [P, S].
    """
    difference = np.stack([point.nll - plain.nll for point in points])
    return np.expm1(difference @ counts.T / (counts @ plain.tokens))


def measured(dial: float, plain: Losses, point: Point, counts: np.ndarray) -> MeasuredPoint:
    """Summarize a point.

    Args:
        dial: the setting that tells it from its neighbors.
        plain: of the plain model.
        point: on the same documents.
        counts: float64 [S, N], as in `degradations`.

    Returns:
        The point with a 95% percentile interval of its degradation.
    """
    (value,) = degradations(plain, [point], np.ones((1, len(plain.nll))))[0]
    low, high = np.quantile(degradations(plain, [point], counts)[0], [0.025, 0.975])
    change = Estimate(float(value), float(low), float(high))
    return MeasuredPoint(dial, point.experts_per_token, point.open_share, change)
