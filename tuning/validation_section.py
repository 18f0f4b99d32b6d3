"""What a validation says, for people: the published criteria, every repeat, and the presets beside them."""

from __future__ import annotations

from analysis.evaluation import certificate_report
from analysis.reports.report import Column, Section, Table
from tuning.validation import MIN_SPEEDUP, SPREAD, Validated, Validation

NAME = "validation"


def section(found: Validation) -> Section:
    """The chosen configuration against the criteria; FAIL where none is certified or any criterion is missed."""
    limit, chosen = found.limit, found.chosen
    if chosen is None:
        closest = min((one for one in found.certificate.configurations), key=lambda one: one.p)
        outcome = (
            f"no configuration is certified to cost at most {limit:+.2%}; the nearest is {closest.name}, at most "
            f"{_percent(closest.overall.perplexity_bound)}"
        )
        return Section(NAME, _TITLE, "FAIL", outcome, _words(found), (_results(found), _repeats(found)))
    rows = _criteria(found, chosen)
    passed = all(row[3] == "PASS" for row in rows)
    outcome = (
        f"{chosen.name}: {chosen.speedup:.2f}x, perplexity {chosen.degradation.value:+.2%} "
        f"[{chosen.degradation.low:+.2%}, {chosen.degradation.high:+.2%}], {chosen.experts_per_token:.2f} experts per "
        f"token; {sum(row[3] == 'PASS' for row in rows)} of {len(rows)} criteria hold"
    )
    columns = (Column("criterion"), Column("bound"), Column("value"), Column("verdict"))
    criteria = Table(f"The criteria, for {chosen.name}, the fastest that is certified", columns, rows)
    tables = (criteria, _results(found), _repeats(found))
    return Section(NAME, _TITLE, "PASS" if passed else "FAIL", outcome, _words(found), tables)


_TITLE = "Does it hold on documents that the search never saw?"


def _criteria(found: Validation, chosen: Validated) -> tuple[tuple[str, str, str, str], ...]:
    (bound,) = (one.overall for one in found.certificate.configurations if one.name == chosen.name)
    preset, limit = found.best_preset, found.limit
    speeds = [one.speedup for one in chosen.repeats]
    losses = [one.degradation.value for one in chosen.repeats]
    if preset is None:
        against, beaten = f"no preset is within {limit:+.2%}", True
    else:
        against, beaten = f"{preset.name}: {preset.speedup:.2f}x", chosen.speedup > preset.speedup
    level = f"{found.certificate.level:.0%}"
    rows = (
        (
            "degradation, test documents",
            f"< {limit:.2%}",
            f"{chosen.degradation.value:+.2%}",
            chosen.degradation.value < limit,
        ),
        (f"degradation, certified at {level}", f"<= {limit:.2%}", _percent(bound.perplexity_bound), bound.within_limit),
        ("speed-up", f"> {MIN_SPEEDUP}x", f"{chosen.speedup:.2f}x", chosen.speedup > MIN_SPEEDUP),
        (
            f"consistent over {len(speeds)} repeats",
            f"same verdicts, within {SPREAD:.0%}",
            f"{min(speeds):.2f}x to {max(speeds):.2f}x, {min(losses):+.2%} to {max(losses):+.2%}",
            chosen.consistent(limit),
        ),
        ("faster than every preset within the limit", against, f"{chosen.speedup:.2f}x", beaten),
    )
    return tuple((name, bound, value, "PASS" if good else "FAIL") for name, bound, value, good in rows)


def _results(found: Validation) -> Table:
    columns = (
        *(Column("configuration"), Column("speed-up", ".2f"), Column("experts", ".2f")),
        *(Column("perplexity", "+.2%"), Column("low", "+.2%"), Column("high", "+.2%")),
        *(Column("certified at most", "+.2%"), Column("certified"), Column("consistent")),
    )
    bounds = {one.name: one.overall.perplexity_bound for one in found.certificate.configurations}

    def row(one: Validated) -> tuple[str | float | bool | None, ...]:
        change = one.degradation
        certified = one.name in found.certificate.certified if one.searched else None
        return (
            *(one.name, one.speedup, one.experts_per_token, change.value, change.low, change.high),
            *(bounds.get(one.name), certified, one.consistent(found.limit)),
        )

    return Table("In the order of testing, then the presets", columns, tuple(map(row, found.configurations)))


def _repeats(found: Validation) -> Table:
    phases = list(found.configurations[0].repeats[0].speedups)
    columns = (
        *(Column("configuration"), Column("repeat"), Column("documents", ",d")),
        *(Column("perplexity", "+.2%"), Column("low", "+.2%"), Column("high", "+.2%")),
        *(Column(f"{phase}{end}", ".2f") for phase in phases for end in ("", " low", " high")),
    )
    rows = []
    for one in found.configurations:
        for number, repeat in enumerate(one.repeats, 1):
            ratios = [repeat.speedups[phase] for phase in phases]
            times = [value for ratio in ratios for value in (ratio.value, ratio.low, ratio.high)]
            change = repeat.degradation
            rows.append((one.name, number, repeat.documents, change.value, change.low, change.high, *times))
    return Table("Every repeat: other documents, another order of timing", columns, tuple(rows))


def _words(found: Validation) -> tuple[str, ...]:
    return (
        *certificate_report.sentences(found.certificate),
        "Speed-ups are measured against the plain model in the same run, paired; a configuration's is the geometric "
        "mean of its phases, prefill of a whole batch and decode of one sequence.",
        "The presets are neither searched nor certified: they show what thresholds alone give.",
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2%}"
