"""A certificate: how much loss a configuration adds at most, with a stated confidence.

Letters: N documents, K configurations, G groups of enough documents, alpha = 1 - level.

A baseline and K configurations score the same calibration documents. A document's increase is its added loss over its
scored tokens: nats per token, the log of the ratio of its two perplexities. Increases are clipped to [-clip, clip],
because without a limit no finite sample bounds a mean. The bound (`varjax.bounds.upper_bound`) is on the mean over
documents, each counted once; exp(mean) - 1 is the increase in perplexity, as a geometric mean over documents. It holds
for every N, provided that documents are independent draws from the population that the certificate is about, and that
the loss of one does not depend on those before it, as it does with a shared cached tier. Even without any spread a
bound stays about 1.1 clip log(1 / alpha) / N above the mean: choose a small clip, and choose it before looking.

Three statements, each of which fails in at most alpha of all calibrations:

- the overall bound of a configuration that was named beforehand;
- all its group bounds together (each at alpha / G);
- no certified configuration exceeds `limit` (Learn-then-Test, Angelopoulos et al. 2021, arXiv 2110.01052), which alone
  covers a configuration that was picked by its result. "fixed_sequence" tests at alpha in the given order and stops at
  the first that fails; the order, most certain first, comes from other documents. "holm" needs no order and is less
  powerful.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.comparison import Result, check_pair
from analysis.evaluate.losses import Losses, LossesError, paired
from analysis.report.figures import subplots
from analysis.report.provenance import hash_json
from analysis.report.report import Column, Report, ReportFigure, Section, Table
from analysis.resampling import holm
from analysis.text.encoding import Drawn
from varjax.bounds import documents_needed, p_value, upper_bound

LIMIT = math.log1p(MAX_DEGRADATION)  # nats per token
CLIP = 0.2  # nats per token, of a document's increase: its perplexity rises by 22%
HELD_OUT = ("calibrate", "test")  # splits that neither make a table nor choose a policy
MIN_DOCUMENTS = 20  # a certificate of fewer is refused, and a group of fewer has no bound

Testing = Literal["fixed_sequence", "holm"]
TESTS: Mapping[Testing, Callable[[np.ndarray], np.ndarray]] = {  # p values, corrected: certified are those up to alpha
    "fixed_sequence": np.maximum.accumulate,
    "holm": holm,
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The increase in loss over a set of documents."""

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
    """What is known about one configuration."""

    name: str
    sha256: str
    p: float  # p-value of "its mean increase exceeds the limit"
    certified: bool  # by the procedure of the certificate
    cached: bool  # a cached tier carried over, so that its documents depended on each other
    overall: Bound
    groups: dict[str, Bound]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The result and everything that it depends on; `analysis.report.provenance.write_json` writes it."""

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
        """The names of the certified configurations."""
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
    """Bound each candidate's increase in loss over the baseline, and certify those that stay within the limit.

    The order of the documents does not matter. `clip`, `level`, `limit`, `testing`, `seed` and the order of the
    candidates have to be chosen without these losses.

    Args:
        baseline: of the plain model.
        candidates: by name, in the order in which "fixed_sequence" tests them.
        clip: nats per token, above `limit`; 0.2 is a document whose perplexity rises by 22%.
        model_sha256: of the model.
        config_sha256: of every candidate, as `VARConfig.digest` makes it.
        level: the confidence of each of the three statements above.
        limit: nats per token; the default is a perplexity 1% higher.
        testing: the procedure for several candidates.
        seed: of the order in which the bound takes the documents.
        drawn: how the documents came out of their split; None: that was not recorded.
        cached: the candidates that ran with a cached tier which all documents shared.

    Returns:
        The certificate.

    Raises:
        LossesError: as `analysis.evaluate.losses.paired`, fewer than MIN_DOCUMENTS documents, no candidate, a
            candidate without hash, or settings out of their range.
    """
    _check(candidates, config_sha256, clip, level, limit, testing)
    pairs = {name: paired(baseline, losses, ("the baseline", name)).sort_index() for name, losses in candidates.items()}
    base = next(iter(pairs.values()))
    scored = (base["tokens"] > 0).to_numpy()
    increases = {name: pair["added"].to_numpy()[scored] for name, pair in pairs.items()}
    documents = base[scored]
    if len(documents) < MIN_DOCUMENTS:
        raise LossesError(
            f"{len(documents)} documents have a scored token; a certificate needs {MIN_DOCUMENTS}, a useful one "
            "some hundreds: evaluate more documents of the calibration split"
        )

    tokens, group = documents["tokens"].to_numpy(), documents["group"].to_numpy()
    sizes = documents["group"].value_counts().sort_index()
    group_level = 1 - (1 - level) / max(1, int((sizes >= MIN_DOCUMENTS).sum()))

    def bounded(increase: np.ndarray, chosen: Any, at: float) -> Bound:
        return _bound(increase[chosen], tokens[chosen], clip, at, limit, seed)

    p = [
        p_value(np.clip(increase / tokens, -clip, clip), limit, -clip, clip, level, seed=seed)
        for increase in increases.values()
    ]
    passed = TESTS[testing](np.array(p)) <= 1 - level
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
                p=value,
                certified=bool(certified),
                cached=name in cached,
                overall=bounded(increase, slice(None), level),
                groups={one: bounded(increase, group == one, group_level) for one in sizes.index},
            )
            for (name, increase), value, certified in zip(increases.items(), p, passed, strict=True)
        ),
    )


def certify_results(baseline: Result, candidates: Mapping[str, Result], **settings: Any) -> Certificate:
    """Certify evaluations in files, which name model and configuration themselves.

    Args:
        baseline: of the plain model.
        candidates: under VAR, by name.
        settings: the other arguments of `certify`.

    Returns:
        The certificate.

    Raises:
        LossesError: as `certify` and `analysis.evaluate.comparison.check_pair`, and where a file lacks its hashes, is
            of another mode than its place in the arguments asks for, or holds documents that made or chose
            configurations (all but `HELD_OUT`).
    """
    origins = {name: result.fields.get("provenance", {}) for name, result in candidates.items()}
    for result in (baseline, *candidates.values()):
        _check_result(baseline, result)
    # A result that does not say so is of a version in which all documents shared one cache.
    shared = {name: (one.fields.get("cached_tier") or {}).get("shared", True) for name, one in candidates.items()}
    sizes = {name: origin.get("config", {}).get("cache_size", 0) for name, origin in origins.items()}
    made = baseline.fields["provenance"]
    return certify(
        baseline.losses,
        {name: result.losses for name, result in candidates.items()},
        model_sha256=made["model"]["fingerprint"],
        config_sha256={name: origin["config_sha256"] for name, origin in origins.items()},
        drawn=Drawn.of(made["data"]),
        cached=[name for name, size in sizes.items() if size > 0 and shared[name]],
        **settings,
    )


def _check_result(baseline: Result, result: Result) -> None:
    origin = result.fields.get("provenance", {})
    if origin.get("model", {}).get("fingerprint") is None or "config_sha256" not in origin:
        raise LossesError(f"{result.path} names no model and configuration; evaluate again with this version")
    mode, expected = result.fields.get("mode"), "baseline" if result is baseline else "var"
    if mode != expected:
        raise LossesError(
            f"{result.path} is of mode {mode!r}, expected {expected!r}; give the baseline first, then the results "
            "under VAR"
        )
    check_pair(baseline, result)
    split = origin.get("data", {}).get("split")
    if split not in HELD_OUT:
        of = "all splits, some of which" if split is None else f"the split {split!r}, which"
        raise LossesError(
            f"{result.path} is of {of} made or chose configurations; evaluate on {' or '.join(map(repr, HELD_OUT))}"
        )


def _bound(increase: np.ndarray, tokens: np.ndarray, clip: float, level: float, limit: float, seed: int) -> Bound:
    """The bound for documents whose loss rose by `increase` nats in all, over `tokens`."""
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


def _check(
    candidates: Collection[str], hashes: Collection[str], clip: float, level: float, limit: float, testing: str
) -> None:
    if not candidates:
        raise LossesError("there is no configuration to certify; give one or more in addition to the baseline")
    if missing := [name for name in candidates if name not in hashes]:
        raise LossesError(f"configuration {missing[0]!r} has no hash; give config_sha256 for every candidate")
    if not (math.isfinite(clip) and 0 < limit < clip):
        raise LossesError(f"limit is {limit} and clip {clip} nats per token; give 0 < limit < clip")
    if not 0 < level < 1:
        raise LossesError(f"level is {level}; give a probability between 0 and 1, such as 0.95")
    if testing not in TESTS:
        raise LossesError(f"testing is {testing!r}; give one of {', '.join(TESTS)}")


def report(certificate: Certificate, facts: Sequence[tuple[str, str]] = ()) -> Report:
    """Report the verdict, the bounds of configurations and groups, and the hashes of model, data and configurations.

    Args:
        certificate: of one or more configurations.
        facts: what else is known about the data.

    Returns:
        The report. Its verdict is "not testable" where every certified configuration ran with a shared cached tier.
    """
    tried = certificate.configurations
    independent = [not one.cached for one in tried if one.certified]
    verdict = ("PASS" if any(independent) else "not testable") if independent else "FAIL"
    hashes = {"model": certificate.model_sha256, "data": certificate.data_sha256}
    hashes |= {one.name: one.sha256 for one in tried}
    grouped = [one for one in tried if len(one.groups) > 1]
    rows = [(*_row(one.name, one.overall), one.certified) for one in tried]
    tables = [Table("Increase in perplexity", _COLUMNS, tuple(rows))]
    for one in grouped:
        rows = [_row(name, group) for name, group in one.groups.items()]
        tables.append(Table(f"Groups of {one.name}", _COLUMNS[:-1], tuple(rows)))
    figure = ReportFigure(
        "certificate_bounds",
        "Measured means and certified bounds",
        "Dots: the mean increase in perplexity over documents. Bars reach up to the bound that holds with the stated "
        "confidence; a bar that ends left of the dashed line is within the limit. Below the configurations: groups of "
        "documents under the first configuration, those with the highest bounds first.",
        f"A wide bar means few documents, not a high loss. Groups of fewer than {MIN_DOCUMENTS} documents have no "
        "bound and are not drawn.",
        partial(_draw, certificate),
    )
    section = Section(
        "certificate",
        f"Does perplexity rise by no more than {_percent(certificate.limit)}?",
        verdict,
        f"{len(certificate.certified)} of {len(tried)} certified at {certificate.level:.4g} confidence; at most "
        + ", ".join(f"{_percent(one.overall.bound, '+')} ({one.name})" for one in tried),
        (*sentences(certificate), *map(_groups, grouped)),
        tuple(tables),
        (figure,),
        f"at most {_percent(tried[0].overall.bound, '+')}" if len(tried) == 1 else "",
    )
    documents = f"{certificate.documents:,}, {certificate.tokens:,} tokens"
    return Report("Certificate of the loss", (("documents", documents), *facts, *hashes.items()), (), (section,))


def sentences(certificate: Certificate) -> list[str]:
    """Say what is certified, what that covers and does not cover, and what a tighter bound would take.

    Args:
        certificate: of one or more configurations.

    Returns:
        Paragraphs in plain English.
    """
    error, limit = f"{100 * (1 - certificate.level):.2g}%", _percent(certificate.limit)
    verdict = (
        f"Certified: none. At an error of {error} these documents do not show that perplexity rises by no more than "
        f"{limit} on average; that does not prove that it rises by more."
    )
    if certificate.certified:
        verdict = (
            f"Certified: {', '.join(certificate.certified)}. On text like the calibration documents perplexity rises "
            f"by no more than {limit} on average; the chance of any wrong entry in this list was at most {error}."
        )
    if len(certificate.configurations) > 1:
        verdict += {
            "fixed_sequence": " The configurations were tested in the order of the table, up to the first failure.",
            "holm": " The configurations were tested together (Holm).",
        }[certificate.testing]
    words = [
        verdict,
        f'"At most" bounds a configuration that was named beforehand; such a bound is too low in at most {error} of '
        "all calibrations. At the same error the bounds of one configuration's groups hold together.",
        'Covered: the geometric mean over documents, each counted once; "all tokens" weighs them by length and is an '
        f"estimate without guarantee. A document's change counts as {certificate.clip:g} nats per token "
        f"({_percent(certificate.clip)}) at most. {_sample(certificate)}",
        "Not covered: text of other kinds; any single document; text that the model writes itself; other tasks and "
        "speed; another model or configuration than those named by hash; a cache that carries over from document to "
        "document.",
        *map(_more_documents, certificate.configurations),
    ]
    if dependent := ", ".join(one.name for one in certificate.configurations if one.cached):
        words.append(
            f"Take care: {dependent} ran with a cached tier that all documents shared, so documents depend on each "
            "other and the bound is not guaranteed; evaluate without --shared_cache."
        )
    if certificate.unscored:
        words.append(f"Left out because they have no scored token: {certificate.unscored} documents.")
    return words


def _sample(certificate: Certificate) -> str:
    """Which text the bound is about, by what was recorded when the documents were drawn."""
    drawn = certificate.drawn
    if drawn is None:
        return (
            "If the documents are a random sample of a corpus, the bound is about that corpus; how they were drawn was "
            "not recorded."
        )
    which = f"the first {drawn.read:,}" if drawn.cut else f"all {drawn.read:,}"
    by = "in the order of their texts' hashes" if drawn.order == "hash" else "as the source lists them"
    until = f" (cut at a number of {' and of '.join(drawn.cut)})" if drawn.cut else ""
    about = (
        "a sample of the corpus, drawn by a hash of their text. The bound is about that corpus and text of its kind."
        if drawn.sampled
        else "not a random sample: the bound is about text like these, and about the corpus only if its order is "
        "random."
    )
    short = f" Texts of fewer than two tokens were left out ({drawn.short:,})." if drawn.short else ""
    joint = ":" if drawn.sampled else ","
    return f"The documents are {which} of the split {by}{until}{joint} {about}{short}"


def _more_documents(one: Configuration) -> str:
    """How many calibration documents a better bound takes."""
    bound = one.overall
    if bound.needed_for_limit is None:
        words = "the measured mean is above the limit; more documents are not expected to certify it"
    elif not bound.within_limit:
        words = f"about {bound.needed_for_limit:,} documents would bring its bound to the limit"
    elif bound.needed_for_half is None:
        words = "its bound is as low as the measured mean"
    else:
        words = f"about {bound.needed_for_half:,} documents would halve the bound's distance from the mean"
    return f"{one.name}: {words}."


def _groups(one: Configuration) -> str:
    bounds = {name: group.bound for name, group in one.groups.items() if group.bound is not None}
    within = sum(group.within_limit for group in one.groups.values())
    words = f"{one.name}, groups: {within} of {len(one.groups)} bounded within the limit"
    if bounds:
        worst = max(bounds, key=lambda name: bounds[name])
        words += f"; highest bound {worst}, {_percent(bounds[worst], '+')}"
    small = len(one.groups) - len(bounds)
    return words + (f"; {small} not certified, under {MIN_DOCUMENTS} documents" if small else "")


def _draw(certificate: Certificate) -> Figure:
    """Means and bounds of the configurations, and of up to 30 groups of the first one."""
    first = certificate.configurations[0]
    rows = [(one.name, one.overall) for one in certificate.configurations]
    bounded = [(name, group) for name, group in first.groups.items() if group.bound is not None]
    if len(first.groups) > 1:
        rows += sorted(bounded, key=lambda row: row[1].bound or 0.0, reverse=True)[:30]
    means = [100 * math.expm1(one.mean) for _, one in rows]
    ends = [100 * math.expm1(one.bound) if one.bound is not None else math.nan for _, one in rows]
    drawn, axis = subplots(figsize=(6.4, 1.6 + 0.24 * len(rows)))
    axis.hlines(range(len(rows)), means, ends, color="0.5")
    axis.plot(means, range(len(rows)), "o", color="0", markersize=4)
    axis.axvline(100 * math.expm1(certificate.limit), color="0.4", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"increase in perplexity [%], up to the bound at {certificate.level:.4g} confidence")
    return drawn


def _percent(nats: float | None, sign: str = "") -> str:
    """An increase in log perplexity as one of perplexity."""
    return "–" if nats is None else f"{math.expm1(nats):{sign}.2%}"


def _row(name: str, one: Bound) -> tuple[str | float | None, ...]:
    increases = (math.nan if nats is None else math.expm1(nats) for nats in (one.pooled, one.mean, one.bound))
    return (name, one.documents, one.tokens, *increases, one.clipped)


_COLUMNS = (
    *(Column(""), Column("documents", ","), Column("tokens", ",")),
    *(Column(name, "+.2%") for name in ("all tokens", "mean", "at most")),
    *(Column("clipped", ".1%"), Column("certified")),
)
