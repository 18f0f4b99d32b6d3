"""What a validation says, for people: the published criteria, how the configuration was chosen, and every repeat."""

from __future__ import annotations

from analysis.evaluate import certificate
from analysis.report.report import Column, Section, Table
from tuning.validation import Judged, Validation

NAME = "validation"


def section(found: Validation) -> Section:
    """The chosen configuration against the criteria; FAIL where none is certified or any criterion is missed."""
    limit, chosen = found.limit, found.chosen
    if chosen is None:
        closest = min(found.certificate.configurations, key=lambda one: one.p)
        outcome = (
            f"no configuration is certified to cost at most {limit:+.2%}; the nearest is {closest.name}, at most "
            f"{_percent(closest.overall.perplexity_bound)}"
        )
        words = "Since none is certified, no test document was read: they can still judge another configuration."
        return Section(NAME, _TITLE, "FAIL", outcome, (words, *_words(found)), (_candidates(found),))
    rows = tuple((one.name, one.bound, one.measured, one.verdict) for one in found.criteria(chosen))
    outcome = (
        f"{chosen.name}: {chosen.speedup:.2f}x, perplexity {chosen.degradation.value:+.2%} "
        f"[{chosen.degradation.low:+.2%}, {chosen.degradation.high:+.2%}], {chosen.experts_per_token:.2f} experts per "
        f"token; {sum(row[3] == 'PASS' for row in rows)} of {len(rows)} criteria hold"
    )
    columns = (Column("criterion"), Column("bound"), Column("value"), Column("verdict"))
    criteria = Table(f"The criteria, for {chosen.name}, on the test documents", columns, rows)
    judged = (chosen, *found.presets)
    tables = (criteria, _candidates(found), _results(judged, limit), _repeats(judged))
    return Section(NAME, _TITLE, "PASS" if found.passed else "FAIL", outcome, _words(found), tables)


_TITLE = "Does it hold on documents that the search never saw?"


def _candidates(found: Validation) -> Table:
    phases = list(found.candidates[0].timed.speedups)
    columns = (
        *(Column("configuration"), Column("speed-up", ".2f"), *(Column(phase, ".2f") for phase in phases)),
        *(Column("experts", ".2f"), Column("certified at most", "+.2%"), Column("certified"), Column("judged")),
    )
    bounds = {one.name: one.overall.perplexity_bound for one in found.certificate.configurations}
    rows = tuple(
        (
            *(one.name, one.timed.speedup, *(one.timed.speedups[phase].value for phase in phases)),
            *(one.experts_per_token, bounds[one.name], one.name in found.certificate.certified),
            found.chosen is not None and one.name == found.chosen.name,
        )
        for one in found.candidates
    )
    return Table("What chose: the candidates on the calibrate documents, in the order of testing", columns, rows)


def _results(judged: tuple[Judged, ...], limit: float) -> Table:
    columns = (
        *(Column("configuration"), Column("speed-up", ".2f"), Column("experts", ".2f")),
        *(Column("perplexity", "+.2%"), Column("low", "+.2%"), Column("high", "+.2%")),
        Column("consistent"),
    )
    rows = tuple(
        (
            *(one.name, one.speedup, one.experts_per_token),
            *(one.degradation.value, one.degradation.low, one.degradation.high, one.consistent(limit)),
        )
        for one in judged
    )
    return Table("What was judged: the chosen configuration and the presets on the test documents", columns, rows)


def _repeats(judged: tuple[Judged, ...]) -> Table:
    phases = list(judged[0].repeats[0].timed.speedups)
    columns = (
        *(Column("configuration"), Column("repeat"), Column("documents", ",d")),
        *(Column("perplexity", "+.2%"), Column("low", "+.2%"), Column("high", "+.2%")),
        *(Column(f"{phase}{end}", ".2f") for phase in phases for end in ("", " low", " high")),
    )
    rows = []
    for one in judged:
        for number, repeat in enumerate(one.repeats, 1):
            ratios = [repeat.timed.speedups[phase] for phase in phases]
            times = [value for ratio in ratios for value in (ratio.value, ratio.low, ratio.high)]
            change = repeat.degradation
            rows.append((one.name, number, repeat.documents, change.value, change.low, change.high, *times))
    return Table("Every repeat: other documents, another order of timing", columns, tuple(rows))


def _words(found: Validation) -> tuple[str, ...]:
    return (
        *certificate.sentences(found.certificate),
        "The fastest certified candidate is chosen by timings on the calibrate documents. Those timings flatter it, "
        "for they chose it: the verdict uses only the test documents, on which nothing was chosen. The other "
        "candidates are not judged.",
        f"A criterion is met only where a one-sided limit at {found.level:.4g} confidence meets it, over the repeats "
        "for speed-ups and over the documents for losses. A FAIL may mean that the measurements vary too much: more "
        "repeats narrow the limit.",
        "Speed-ups are measured against the plain model in the same run, paired; a configuration's is the geometric "
        "mean of its phases, prefill of a whole batch and decode of one sequence.",
        "The presets are neither searched nor certified: they show what thresholds alone give.",
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2%}"
