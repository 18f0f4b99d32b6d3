"""A certificate: how much loss a configuration costs at most, with a stated confidence.

Letters: N documents, K configurations, G groups of enough documents, alpha = 1 - level.

A baseline and K configurations score the same calibration documents. A document's increase is its summed loss under the
configuration minus that under the baseline, over its scored tokens: nats per token, the log of the ratio of its two
perplexities. Increases are clipped to [-clip, clip], because without a limit no finite sample bounds a mean; how many
were clipped is reported. What is bounded is the mean over documents, in which a document counts once however long it
is; exp(mean) - 1 is the increase of perplexity, as a geometric mean over documents. The increase over all tokens
together, unclipped, stands beside it as an estimate.

The bound is that of `varjax.bounds.upper_bound`: it holds for every N, provided that the documents are independent
draws from the population that the certificate is to speak of, and that what one costs does not depend on those before
it, as it does with a cached tier that all documents share (`analysis.evaluate.caching`). Three statements, each of
which fails in at most alpha of all calibrations:

- the overall bound of a configuration named beforehand;
- all its group bounds together (each at alpha / G);
- that no certified configuration exceeds `limit` (Learn-then-Test, Angelopoulos et al. 2021, arXiv 2110.01052). Each is
  tested for exceeding it. "fixed_sequence" tests at alpha in the given order and stops at the first that is not
  certified: the order, surest first, comes from other documents. "holm" needs no order and pays for that.

The bound of a configuration picked by its result is covered by the third statement alone. Even without any spread a
bound stays about 1.1 clip log(1 / alpha) / N above the mean, the price of disasters too rare to be seen: a clip is
chosen small, and before looking.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.evaluate.comparison import MAX_DEGRADATION, Result, check_pair
from analysis.evaluate.quality import Scores
from analysis.report.provenance import hash_json
from analysis.text.encoding import Drawn
from varjax.bounds import documents_needed, p_value, upper_bound
from varjax.errors import InputError

LIMIT = math.log1p(MAX_DEGRADATION)  # nats per token
CLIP = 0.2  # nats per token, of a document's increase: its perplexity rises by 22 %
MIN_DOCUMENTS = 20  # fewer are refused, and a group of fewer is not certified

Testing = Literal["fixed_sequence", "holm"]


class CertificateError(InputError):
    """Losses that no certificate can be made of; names what is wrong and the fix."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """What one configuration lost on each document."""

    ids: Sequence[str]  # N, each once
    groups: Sequence[str]  # N
    nll: np.ndarray  # float64 [N], summed over the scored tokens, nats
    tokens: np.ndarray  # int64 [N], scored

    @classmethod
    def of(cls, source: Scores | Result) -> Losses:
        """Those of an evaluation in memory or in files."""
        if isinstance(source, Scores):
            return cls(source.ids, source.groups, source.nll, source.tokens)
        table = source.documents
        return cls(list(table["id"]), list(table["group"]), table["nll"].to_numpy(), table["tokens"].to_numpy())


@dataclasses.dataclass(frozen=True)
class Bound:
    """The increase of loss over a set of documents."""

    documents: int
    tokens: int
    level: float  # of this bound alone
    mean: float  # nats per token, clipped, mean over documents
    bound: float | None  # nats per token, the mean's upper confidence bound; None: fewer than MIN_DOCUMENTS
    perplexity_bound: float | None  # exp(bound) - 1
    within_limit: bool  # there is a bound and it does not exceed the limit
    clipped: float  # share of the documents
    pooled: float  # nats per token, all tokens together, unclipped: an estimate
    needed_for_limit: int | None  # about how many documents bring the bound to the limit; None: the mean is not below
    needed_for_half: int | None  # and half as far above the mean


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is known of one configuration."""

    name: str
    sha256: str
    p: float  # p-value of "its mean increase exceeds the limit"
    certified: bool  # by the procedure of the certificate
    cached: bool  # a cached tier carried over, so that its documents depended on each other
    overall: Bound
    groups: dict[str, Bound]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The result, with all that it depends on; `analysis.report.provenance.write_json` writes it."""

    level: float
    limit: float  # nats per token
    clip: float  # nats per token
    testing: Testing
    seed: int  # of the order in which documents are taken
    model_sha256: str
    data_sha256: str  # of the documents' ids and tokens
    documents: int
    tokens: int
    unscored: int  # documents without a scored token, left out
    drawn: Drawn | None  # how the documents came out of their split; None: that was not recorded
    configurations: tuple[Configuration, ...]  # in the order in which they were given

    @property
    def certified(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.configurations if one.certified)


def certify(
    baseline: Losses,
    candidates: Mapping[str, Losses],
    *,
    clip: float,
    model_sha256: str,
    config_sha256: Mapping[str, str],
    level: float = 0.95,
    limit: float = LIMIT,
    testing: Testing = "fixed_sequence",
    seed: int = 0,
    drawn: Drawn | None = None,
    cached: Collection[str] = (),
) -> Certificate:
    """Bound each candidate's increase of loss over the baseline and say which ones stay within the limit.

    The documents' order in the arguments plays no part. All of `clip`, `level`, `limit`, `testing`, `seed` and the
    order of the candidates have to be chosen without these losses.

    Args:
        candidates: by name, in the order in which "fixed_sequence" tests them.
        clip: nats per token, above `limit`; 0.2 is a document whose perplexity rises by 22 %.
        config_sha256: of every candidate, as `VARConfig.digest` makes it.
        level: the confidence of each of the three statements above.
        limit: nats per token; the default is a perplexity 1 % higher.
        drawn: how the documents came out of their split, as it was recorded; None: that was not recorded.
        cached: the candidates that ran with a cached tier which all documents shared.

    Raises:
        CertificateError: documents that do not pair or occur twice, losses that are not finite, fewer than
            MIN_DOCUMENTS documents, no candidate, a candidate without hash, or settings out of their range.
    """
    _check(candidates, config_sha256, clip, level, limit, testing)
    base = _table("the baseline", baseline)
    scored = (base["tokens"] > 0).to_numpy()
    increases = {}
    for name, losses in candidates.items():
        other = _table(name, losses)
        _check_pairs(name, base, other)
        increases[name] = (other["nll"] - base["nll"]).to_numpy()[scored]
    documents = base[scored]
    if len(documents) < MIN_DOCUMENTS:
        raise CertificateError(
            f"{len(documents)} documents have a scored token; a certificate needs {MIN_DOCUMENTS}, a useful one "
            "some hundreds: evaluate more documents of the calibration split"
        )

    tokens, group = documents["tokens"].to_numpy(), documents["group"].to_numpy()
    sizes = documents["group"].value_counts().sort_index()
    group_level = 1 - (1 - level) / max(1, int((sizes >= MIN_DOCUMENTS).sum()))

    def bounded(increase: np.ndarray, chosen: np.ndarray, at: float) -> Bound:
        return _bound(increase[chosen], tokens[chosen], clip, at, limit, seed)

    everything = np.ones(len(documents), bool)
    p = {
        name: p_value(np.clip(increase / tokens, -clip, clip), limit, -clip, clip, level, seed=seed)
        for name, increase in increases.items()
    }
    passed = TESTS[testing](p, 1 - level)
    return Certificate(
        level=level,
        limit=limit,
        clip=clip,
        testing=testing,
        seed=seed,
        model_sha256=model_sha256,
        data_sha256=hash_json([base.index.tolist(), base["tokens"].tolist()]),
        documents=len(documents),
        tokens=int(tokens.sum()),
        unscored=int((~scored).sum()),
        drawn=drawn,
        configurations=tuple(
            Configuration(
                name=name,
                sha256=config_sha256[name],
                p=p[name],
                certified=name in passed,
                cached=name in cached,
                overall=bounded(increase, everything, level),
                groups={one: bounded(increase, group == one, group_level) for one in sizes.index},
            )
            for name, increase in increases.items()
        ),
    )


def certify_results(baseline: Result, candidates: Mapping[str, Result], **settings: Any) -> Certificate:
    """`certify` for evaluations in files, which name model and configuration themselves.

    Raises:
        CertificateError: as `certify` does, and where they lack their hashes, are of another mode than their place in
            the arguments asks for, or hold documents that made or chose configurations (splits train, build and tune,
            or all).
        ResultError: as `analysis.evaluate.comparison.check_pair`.
    """
    every = {"the baseline": baseline} | dict(candidates)
    origins = {name: result.fields.get("provenance", {}) for name, result in every.items()}
    for name, result in every.items():
        model, split = origins[name].get("model", {}), origins[name].get("data", {}).get("split")
        if model.get("fingerprint") is None or "config_sha256" not in origins[name]:
            raise CertificateError(f"{result.path} names no model and configuration; evaluate again with this version")
        mode, expected = result.fields.get("mode"), "baseline" if result is baseline else "var"
        if mode != expected:
            raise CertificateError(
                f"{result.path} is of mode {mode!r}, expected {expected!r}; give the baseline first, then what runs "
                "under VAR"
            )
        check_pair(baseline, result)
        if split in (None, "train", "build", "tune"):
            of = "all splits, and train and tune" if split is None else f"the split {split!r}, which"
            raise CertificateError(
                f"{result.path} is of {of} made or chose configurations; evaluate on 'calibrate', or 'test'"
            )
    data, configs = origins["the baseline"]["data"], {name: origins[name].get("config", {}) for name in candidates}
    # A result that does not say so is of a version in which all documents shared one cache.
    shared = {name: (one.fields.get("cached_tier") or {}).get("shared", True) for name, one in candidates.items()}
    return certify(
        Losses.of(baseline),
        {name: Losses.of(result) for name, result in candidates.items()},
        model_sha256=origins["the baseline"]["model"]["fingerprint"],
        config_sha256={name: origins[name]["config_sha256"] for name in candidates},
        drawn=Drawn.of(data),
        cached=[name for name, config in configs.items() if config.get("cache_size", 0) > 0 and shared[name]],
        **settings,
    )


def fixed_sequence(p: Mapping[str, float], alpha: float) -> set[str]:
    """Of hypotheses in the order of `p`, those that are rejected: up to the first whose p-value exceeds alpha."""
    return set(itertools.takewhile(lambda name: p[name] <= alpha, p))


def holm(p: Mapping[str, float], alpha: float) -> set[str]:
    """Those rejected in order of their p-values, each against alpha over how many are left (Holm 1979)."""
    ordered = sorted(p, key=lambda name: p[name])
    return fixed_sequence({name: p[name] * (len(p) - rank) for rank, name in enumerate(ordered)}, alpha)


TESTS = {"fixed_sequence": fixed_sequence, "holm": holm}


def _bound(increase: np.ndarray, tokens: np.ndarray, clip: float, level: float, limit: float, seed: int) -> Bound:
    """Of documents whose loss rose by `increase` nats in all, over `tokens`."""
    rates = increase / tokens
    x = np.clip(rates, -clip, clip)
    mean, bound, for_limit, for_half = float(x.mean()), None, None, None
    if len(x) >= MIN_DOCUMENTS:
        bound = upper_bound(x, -clip, clip, level, seed=seed)
        for_limit = documents_needed(x, -clip, clip, level, limit)
        for_half = documents_needed(x, -clip, clip, level, (mean + bound) / 2)
    return Bound(
        documents=len(x),
        tokens=int(tokens.sum()),
        level=level,
        mean=mean,
        bound=bound,
        perplexity_bound=None if bound is None else math.expm1(bound),
        within_limit=bound is not None and bound <= limit,
        clipped=float(np.mean(np.abs(rates) > clip)),
        pooled=float(increase.sum() / tokens.sum()),
        needed_for_limit=for_limit,
        needed_for_half=for_half,
    )


def _table(name: str, losses: Losses) -> pd.DataFrame:
    """group, nll and tokens by id, in the order of the ids."""
    table = pd.DataFrame({"group": losses.groups, "nll": losses.nll, "tokens": losses.tokens}, index=list(losses.ids))
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise CertificateError(f"{name} has document {twice} twice; a document counts once: remove its copies")
    finite = np.isfinite(table["nll"])
    if not finite.all():
        wrong = table.index[~finite][0]
        raise CertificateError(
            f"{name} has loss {table['nll'][wrong]} on document {wrong}; find out why, evaluate again"
        )
    return table.sort_index()


def _check_pairs(name: str, base: pd.DataFrame, other: pd.DataFrame) -> None:
    shared = base.index.intersection(other.index)
    if len(shared) != len(base) or len(shared) != len(other):
        raise CertificateError(
            f"{name} shares {len(shared)} of its {len(other)} documents with the {len(base)} of the baseline; "
            "evaluate both on the same dataset, split and number of samples"
        )
    for column, fix in (("tokens", "use one tokenizer and equal windows"), ("group", "use one dataset")):
        if (base[column] != other[column]).any():
            wrong = base.index[base[column] != other[column]][0]
            raise CertificateError(f"{name} has other {column} than the baseline on document {wrong}; {fix}")


def _check(
    candidates: Mapping[str, Losses],
    config_sha256: Mapping[str, str],
    clip: float,
    level: float,
    limit: float,
    testing: str,
) -> None:
    if not candidates:
        raise CertificateError("there is no configuration to certify; give one or more besides the baseline")
    if missing := [name for name in candidates if name not in config_sha256]:
        raise CertificateError(f"configuration {missing[0]!r} has no hash; give config_sha256 for every candidate")
    if not (math.isfinite(clip) and 0 < limit < clip):
        raise CertificateError(f"limit is {limit} and clip {clip} nats per token; give 0 < limit < clip")
    if not 0 < level < 1:
        raise CertificateError(f"level is {level}; give a probability between 0 and 1, such as 0.95")
    if testing not in TESTS:
        raise CertificateError(f"testing is {testing!r}; give one of {', '.join(TESTS)}")
