"""A certificate in words, in tables and in a figure, for people who are no statisticians."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.evaluate.certificate import MIN_DOCUMENTS, Bound, Certificate, Configuration
from analysis.report.figures import subplots
from analysis.report.report import Column, Report, ReportFigure, Section, Table

NAME = "certificate_bounds"
NOTE = ReportFigure(
    NAME,
    "What was measured, and what is certain",
    "Dots: the mean increase over documents. Bars reach up to the bound that holds with the stated confidence; what "
    "ends left of the dashed line is within the limit. Groups are those of the first configuration, the highest bound "
    "first.",
    f"A wide bar says that there are few documents, not that the loss is high. Groups of fewer than {MIN_DOCUMENTS} "
    "documents have no bound and are not drawn.",
)
_GROUPS = 30  # in the figure, the highest bounds first


def report(certificate: Certificate, facts: Sequence[tuple[str, str]] = ()) -> Report:
    """The verdict, the table of configurations and their groups, and the hashes of model, data and configurations.

    Args:
        facts: what else is known of the data.
    """
    tried, passed = certificate.configurations, certificate.certified
    hashes = {"model": certificate.model_sha256, "data": certificate.data_sha256}
    hashes |= {one.name: one.sha256 for one in tried}
    section = Section(
        "certificate",
        f"Does perplexity rise by no more than {_percent(certificate.limit)}?",
        _verdict(certificate),
        f"{len(passed)} of {len(tried)} certified at {certificate.level:.4g} confidence; at most "
        + ", ".join(f"{_percent(one.overall.bound, '+')} ({one.name})" for one in tried),
        tuple(sentences(certificate)) + tuple(_groups(one) for one in tried if len(one.groups) > 1),
        (
            Table(
                "Increase of perplexity",
                _COLUMNS,
                tuple((*_row(one.name, one.overall), one.certified) for one in tried),
            ),
            *(
                Table(
                    f"Groups of {one.name}",
                    _COLUMNS[:-1],
                    tuple(_row(name, group) for name, group in one.groups.items()),
                )
                for one in tried
                if len(one.groups) > 1
            ),
        ),
        (NOTE,),
    )
    documents = f"{certificate.documents:,}, {certificate.tokens:,} tokens"
    return Report("Certificate of the loss", (("documents", documents), *facts, *hashes.items()), (), (section,))


def _verdict(certificate: Certificate) -> str:
    """What ran with a cached tier is not guaranteed, whatever its bound says (`_dependent`)."""
    passed = [one for one in certificate.configurations if one.certified]
    if all(one.cached for one in passed):
        return "not testable" if passed else "FAIL"
    return "PASS"


def figure(certificate: Certificate) -> Figure:
    """Means and bounds of the configurations, and of the groups of the first one."""
    first = certificate.configurations[0]
    rows = [(one.name, one.overall) for one in certificate.configurations]
    bounded = [(name, group) for name, group in first.groups.items() if group.bound is not None]
    if len(first.groups) > 1:
        rows += sorted(bounded, key=lambda row: row[1].bound or 0.0, reverse=True)[:_GROUPS]
    means = [100 * math.expm1(one.mean) for _, one in rows]
    ends = [100 * math.expm1(one.bound) if one.bound is not None else math.nan for _, one in rows]
    drawn, axis = subplots(figsize=(6.4, 1.6 + 0.24 * len(rows)))
    axis.hlines(range(len(rows)), means, ends, color="0.5")
    axis.plot(means, range(len(rows)), "o", color="0", markersize=4)
    axis.axvline(100 * math.expm1(certificate.limit), color="0.4", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"increase of perplexity [%], up to the bound at {certificate.level:.4g} confidence")
    return drawn


def sentences(certificate: Certificate) -> list[str]:
    """What is certified, what that covers, what it does not, and what a tighter bound would take."""
    error = f"{100 * (1 - certificate.level):.2g}%"
    limit = _percent(certificate.limit)
    if certificate.certified:
        verdict = (
            f"Certified: {', '.join(certificate.certified)}. On text like the calibration documents perplexity rises "
            f"by no more than {limit} on average; the chance of any wrong entry in this list was at most {error}."
        )
    else:
        verdict = (
            f"Certified: none. These documents do not show, at an error of {error}, that perplexity rises by no more "
            f"than {limit} on average, which is no proof that it rises by more."
        )
    procedure = {
        "fixed_sequence": "The configurations were tested in the order of the table, up to the first failure.",
        "holm": "The configurations were tested together (Holm).",
    }[certificate.testing]
    words = [
        verdict,
        *([procedure] if len(certificate.configurations) > 1 else []),
        f'The column "at most" is a bound for a configuration named beforehand; such a bound is too low in at most '
        f"{error} of all calibrations. At the same error the bounds of one configuration's groups hold together.",
        'Covered: the (geometric) mean over documents, each counted once however long; "all tokens" weighs them by '
        f"length and is an estimate without guarantee. A document's change counts as {certificate.clip:g} nats per "
        f"token ({_percent(certificate.clip)}) at most: how many were clipped is in the table, what they cost beyond "
        f"that is not covered. {_sample(certificate)}",
        "Not covered: text of other kinds; any single document; text that the model writes itself, because here it "
        "reads given text and its prediction of each next token is scored; answers, other tasks and speed; another "
        "model or configuration than those named by hash; a cache that carries over from document to document, because "
        "documents are taken as independent.",
        *_dependent(certificate),
        *(_more_documents(one) for one in certificate.configurations),
    ]
    if certificate.unscored:
        words.append(f"Left out for having no scored token: {certificate.unscored} documents.")
    return words


def _sample(certificate: Certificate) -> str:
    """Which text the bound is about, by what was recorded when the documents were drawn."""
    drawn = certificate.drawn
    if drawn is None:
        return (
            "If the documents are a random sample of a corpus, the bound is about that corpus and text of its kind; "
            "how they were drawn was not recorded."
        )
    which = f"the first {drawn.read:,}" if drawn.cut else f"all {drawn.read:,}"
    by = "in the order of their texts' hashes" if drawn.order == "hash" else "as the source lists them"
    until = f" (cut at a number of {' and of '.join(drawn.cut)})" if drawn.cut else ""
    short = (
        f" Texts of fewer than two tokens were left out ({drawn.short:,}); the bound is not about them."
        if drawn.short
        else ""
    )
    if drawn.sampled:
        return (
            f"The documents are {which} of the split {by}{until}: a sample of the corpus, drawn by a hash of their "
            f"text. The bound is about that corpus and text of its kind.{short}"
        )
    return (
        f"The documents are {which} of the split {by}{until}, not a random sample: the bound is about text that these "
        f"stand for, and about the corpus only if its order means nothing.{short}"
    )


def _dependent(certificate: Certificate) -> list[str]:
    """A warning where the certificate's assumption fails."""
    named = ", ".join(one.name for one in certificate.configurations if one.cached)
    if not named:
        return []
    return [
        f"Take care: {named} ran with a cached tier that all documents shared, so a document depends on those before, "
        "and the bound is not guaranteed there; evaluate without --shared_cache."
    ]


def _more_documents(one: Configuration) -> str:
    """How much calibration text a better bound takes, in one sentence."""
    bound = one.overall
    if bound.needed_for_limit is None:
        return f"{one.name}: the measured mean is above the limit; more documents are not expected to certify it."
    if not bound.within_limit:
        return f"{one.name}: about {bound.needed_for_limit:,} documents would bring its bound to the limit."
    if bound.needed_for_half is None:
        return f"{one.name}: its bound is as low as the measured mean."
    return f"{one.name}: about {bound.needed_for_half:,} documents would halve the bound's distance from the mean."


def _groups(one: Configuration) -> str:
    bounds = {name: group.bound for name, group in one.groups.items() if group.bound is not None}
    within = sum(group.within_limit for group in one.groups.values())
    words = f"{one.name}, groups: {within} of {len(one.groups)} bounded within the limit"
    if bounds:
        worst = max(bounds, key=lambda name: bounds[name])
        words += f"; highest bound {worst}, {_percent(bounds[worst], '+')}"
    small = len(one.groups) - len(bounds)
    return words + (f"; {small} not certified, under {MIN_DOCUMENTS} documents" if small else "")


def _percent(nats: float | None, sign: str = "") -> str:
    """An increase of log perplexity as one of perplexity."""
    return "–" if nats is None else f"{math.expm1(nats):{sign}.2%}"


def _row(name: str, one: Bound) -> tuple[str | float | None, ...]:
    increases = (math.nan if nats is None else math.expm1(nats) for nats in (one.pooled, one.mean, one.bound))
    return (name, one.documents, one.tokens, *increases, one.clipped)


_COLUMNS = (
    *(Column(""), Column("documents", ","), Column("tokens", ",")),
    *(Column(name, "+.2%") for name in ("all tokens", "mean", "at most")),
    *(Column("clipped", ".1%"), Column("certified")),
)
