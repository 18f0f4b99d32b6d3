"""A certificate in words and in a table, for people who are no statisticians."""

from __future__ import annotations

import math
import textwrap

from analysis.certificate import MIN_DOCUMENTS, Certificate, Configuration

_WIDTH = 110  # characters of a line of words


def text(certificate: Certificate) -> str:
    """The table of configurations, the paragraph, and the hashes of model, data and configurations."""
    names = max(13, *(len(one.name) for one in certificate.configurations))
    heads = ("all tokens", "documents", "at most", "limit", "clipped")
    lines = [
        f"Certificate at {certificate.level:.4g} confidence: increase of perplexity on {certificate.documents:,} "
        f"documents, {certificate.tokens:,} tokens",
        f"{'configuration':{names}}" + "".join(f"{head:>12}" for head in heads) + "   certified",
    ]
    for one in certificate.configurations:
        increases = (one.overall.pooled, one.overall.mean, one.overall.bound, certificate.limit)
        cells = [f"{_percent(nats, '+'):>12}" for nats in increases]
        verdict = "yes" if one.certified else "no"
        lines.append(f"{one.name:{names}}{''.join(cells)}{one.overall.clipped:>12.1%}   {verdict}")
        if len(one.groups) > 1:
            lines.append(f"  {_groups(one)}")
    lines += ["", *textwrap.wrap(paragraph(certificate), _WIDTH), ""]
    hashes = {"model": certificate.model_sha256, "data": certificate.data_sha256}
    hashes |= {one.name: one.sha256 for one in certificate.configurations}
    return "\n".join(lines + [f"{name:{names}}  {sha256}" for name, sha256 in hashes.items()])


def paragraph(certificate: Certificate) -> str:
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
    return " ".join(words)


def _sample(certificate: Certificate) -> str:
    """Which text the bound is about."""
    if certificate.drawn == "hash":
        return (
            "The documents are a sample of the corpus, drawn by a hash of their text; the bound is about that corpus "
            "and text of its kind."
        )
    if certificate.drawn == "first":
        return (
            f"The documents are the first {certificate.documents + certificate.unscored:,} of the split, not a random "
            "sample: the bound is about text that these stand for, and about the corpus only if its order means "
            "nothing."
        )
    return (
        "If the documents are a random sample of a corpus, the bound is about that corpus and text of its kind; how "
        "they were drawn is not known here."
    )


def _dependent(certificate: Certificate) -> list[str]:
    """A warning where the certificate's assumption fails."""
    named = ", ".join(one.name for one in certificate.configurations if one.cached)
    if not named:
        return []
    return [
        f"Take care: {named} ran with a cached tier, whose documents depend on those before, so the bound is not "
        "guaranteed there; evaluate with cache_size=0."
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
    words = f"groups: {within} of {len(one.groups)} bounded within the limit"
    if bounds:
        worst = max(bounds, key=lambda name: bounds[name])
        words += f"; highest bound {worst}, {_percent(bounds[worst], '+')}"
    small = len(one.groups) - len(bounds)
    return words + (f"; {small} not certified, under {MIN_DOCUMENTS} documents" if small else "")


def _percent(nats: float | None, sign: str = "") -> str:
    """An increase of log perplexity as one of perplexity."""
    return "–" if nats is None else f"{math.expm1(nats):{sign}.2%}"
