"""What the questions about routing statistics share: which token ids a test uses, figures by layer, verdicts, tables.

Letters: L layers, R rows (keys of order 1, which are token ids), n rows of a test. Intervals and p values are
two-sided, at 95 %.

A statistics file knows keys, not documents. So intervals treat token ids as independent draws; where shares are of
occurrences, their effective number (Kish: the square of the summed weights over the sum of squares) is used.
Occurrences in a document depend on each other, so these intervals are too narrow rather than too wide. Where the
documents are known, `over_documents` replaces them.

A key with NaN among the figures that a test needs is left out of that test alone, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.questions.data import RoutingData
from analysis.questions.drawn import LayerDraws, interval
from analysis.report.report import Column, Table
from varjax.stats import RoutingStats

ALPHA = 0.05  # of p values, after Holm's correction over layers
MIN_KEYS = 10  # token ids that a test needs
Z95 = 1.959963984540054  # of the normal distribution, 97.5 %
SHARE = ".1%"  # how tables print shares
NARROW_ENDS = "A share near 0 or 100 % hardly changes between draws, so its interval is too narrow."
_NAMED = 5  # keys that are named where some were left out


class LayerValues(NamedTuple):
    """A figure of each layer with its 95 % interval; NaN where a layer cannot be tested."""

    value: np.ndarray  # float64 [L, ...]
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class UsedIds:
    """The token ids that a test uses in each layer."""

    rows: tuple[np.ndarray, ...]  # per layer int64 [n]
    left_out: tuple[np.ndarray, ...]  # per layer int64, rows with NaN among the figures needed
    untestable: tuple[str, ...]  # per layer why nothing can be said, or ""

    @property
    def testable(self) -> np.ndarray:
        """bool [L]: the layers that can be tested."""
        return np.array([not reason for reason in self.untestable], bool)

    @property
    def number(self) -> np.ndarray:
        """int64 [L]: how many ids are used."""
        return np.array([len(rows) for rows in self.rows], np.int64)

    def words(self, data: RoutingData, figure: str, what: str = "left out of this test alone") -> list[str]:
        """Say which layers cannot be tested, and which ids were left out.

        Args:
            data: with the names of token ids.
            figure: what the ids have NaN for.
            what: happens to them.

        Returns:
            Paragraphs.
        """
        said = []
        for reason in dict.fromkeys(reason for reason in self.untestable if reason):
            layers = [str(layer) for layer, one in enumerate(self.untestable) if one == reason]
            where = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
            if len(layers) == len(self.untestable) > 1:
                where = "every layer"
            said.append(f"Not testable, {where}: {reason}.")
        keys = list(dict.fromkeys(int(row) for rows in self.left_out for row in rows))
        if keys:
            number, layers_with = sum(map(len, self.left_out)), sum(len(rows) > 0 for rows in self.left_out)
            named = ", ".join(map(data.name_of, keys[:_NAMED])) + (", …" if len(keys) > _NAMED else "")
            where = f"{layers_with} of {len(self.left_out)} layers"
            said.append(f"{number:,} rows without a known {figure} in {where}, {what}: {named}.")
        return said


def figure_of(stats: RoutingStats, name: str) -> np.ndarray:
    """Look up a figure of every key.

    Args:
        stats: the statistics.
        name: `entropy` or `confidence` (means), or `consistency`.

    Returns:
        float64 [L, R], NaN where it is not known.
    """
    if name == "consistency":  # a key without any first choice has no consistency in the file
        return np.where(stats.top1_counts.any(axis=-1), stats.routing_consistency, np.nan)
    return getattr(stats, name).mean


def used_ids(stats: RoutingStats, name: str, least: int = MIN_KEYS) -> UsedIds:
    """Select the token ids of every layer that have a figure.

    Args:
        stats: the statistics.
        name: of the figure, as in `figure_of`.
        least: ids that the test needs.

    Returns:
        The ids, and why layers cannot be tested.
    """
    figure = figure_of(stats, name)
    used, left_out, untestable = [], [], []
    for layer, count in enumerate(stats.count):
        seen = np.flatnonzero((stats.row_orders == 1) & (count > 0))
        missing = np.isnan(figure[layer, seen])
        used.append(seen[~missing])
        left_out.append(seen[missing])
        reason = ""
        if not len(seen):
            missed = stats.count.any() and not count.any()
            reason = (
                "not captured: it has no rows, though other layers have" if missed else "no rows of single token ids"
            )
        elif len(used[-1]) < least:
            with_figure = f" with a known {name}" if missing.any() else ""
            reason = f"{len(used[-1])} of {len(seen)} token ids{with_figure}, at least {least} needed"
        untestable.append(reason)
    return UsedIds(tuple(used), tuple(left_out), tuple(untestable))


def wilson(share: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute Wilson's 95 % interval of shares (1927).

    `scipy.stats.binomtest` has it for whole counts only, and effective numbers of draws are fractions.

    Args:
        share: float64 [...].
        number: of draws, effective ones too, [...].

    Returns:
        Low and high [...].
    """
    z2 = Z95**2 / number
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * np.sqrt(share * (1 - share) / number + z2 / (4 * number))
    return np.clip(middle - half, 0, share), np.clip(middle + half, share, 1)  # rounding at 0 and 1


def over_documents(
    data: RoutingData, values: LayerValues, statistic: Callable[[LayerDraws], np.ndarray], least: float = 0.0
) -> LayerValues:
    """Replace intervals by those of a bootstrap over documents, where the documents are known.

    Args:
        data: what the values were computed from.
        values: [L, ...].
        statistic: the same figure of one layer in a block of draws, float64 [B, ...].
        least: the smallest possible value; the largest is 1.

    Returns:
        The same values, with other intervals if the documents are known.
    """
    if data.draws is None:
        return values
    return LayerValues(values.value, *interval(values.value, data.draws.by_layer(statistic), least, 1))


def interval_words(data: RoutingData, otherwise: str, *if_drawn: str) -> list[str]:
    """Describe the intervals of a section.

    Args:
        data: which the section is about.
        otherwise: what the intervals are where documents are not known.
        if_drawn: what else a reader must know where documents are drawn.

    Returns:
        Paragraphs.
    """
    if data.draws is None:
        return [f"{otherwise} (token ids as if independent: documents are not known)."]
    if data.draws.documents < 2:
        return ["No intervals: they draw documents, and there is only one."]
    return [
        f"95 % intervals from {data.draws.samples} bootstrap draws of the {data.draws.documents:,} documents: the "
        "percentiles, shifted so that the draws' mean is the figure.",
        *if_drawn,
    ]


def admitted_words(stats: RoutingStats) -> list[str]:
    """Say which share of all occurrences the token ids that are keys cover, the others being too rare for a key."""
    if not stats.tokens or 1 not in stats.ngram_orders:
        return []
    absent = sum(int(stats.absent[at]) for at, order in enumerate(stats.ngram_orders) if order == 1)
    return [f"Token ids are those that are keys; they cover {1 - absent / stats.tokens:.1%} of all occurrences."]


def verdict_by_layer(
    data: RoutingData, used: UsedIds, passed: np.ndarray, criterion: str, fails_are_valid: bool = False
) -> tuple[str, str, list[str]]:
    """Judge a criterion on gate entropy that every layer that can be tested must pass.

    Args:
        data: with the kind of entropy; of the chosen experts' entropy no layer can pass.
        used: the layers that can be tested.
        passed: bool [L].
        criterion: in words.
        fails_are_valid: a layer with too much entropy fails even where the entropy is a lower bound.

    Returns:
        The verdict, the outcome in words, and the verdict of each layer.
    """
    kind = data.entropy
    by_layer = []
    for holds, reason in zip(passed, used.untestable, strict=True):
        withheld = bool(kind.no_verdict) and (holds or not fails_are_valid)
        by_layer.append("not testable" if reason or withheld else "PASS" if holds else "FAIL")
    missing = by_layer.count("not testable")
    outcome = f"{criterion}: {by_layer.count('PASS')} of {len(by_layer)} layers{not_testable(missing)}"
    if kind.no_verdict:
        outcome += f"; {kind.no_verdict}"
    verdict = "not testable" if missing == len(by_layer) else "FAIL" if "FAIL" in by_layer else "PASS"
    return verdict, outcome, by_layer


def not_testable(missing: int) -> str:
    """Mention the number of layers that cannot be tested, if there are any."""
    return f" ({missing} not testable)" if missing else ""


def layer_table(
    title: str,
    columns: Sequence[tuple[str, str]],
    figures: Sequence[np.ndarray],
    used: UsedIds | None = None,
    verdicts: Sequence[str] = (),
) -> Table:
    """Make a table with a line per layer.

    Args:
        title: of the table.
        columns: name and number format of each figure.
        figures: [L] each.
        used: adds how many ids were used and left out.
        verdicts: of each layer, if there are any.

    Returns:
        The table.
    """
    heading = [Column("layer"), *(Column(*one) for one in columns)]
    cells: list[Sequence[object]] = [np.asarray(one).tolist() for one in figures]
    if used is not None:
        heading += [Column("ids", ","), Column("left out", ",")]
        cells += [used.number.tolist(), [len(rows) for rows in used.left_out]]
    if verdicts:
        heading.append(Column("verdict"))
        cells.append(verdicts)
    return Table(title, tuple(heading), tuple((layer, *row) for layer, row in enumerate(zip(*cells, strict=True))))


def size(stats: RoutingStats) -> str:
    """Say how many tokens and documents statistics rest on."""
    documents = f"{stats.documents:,} documents" if stats.documents else "documents not known"
    return f"{stats.tokens:,} tokens, {documents}"
