"""What the questions about routing statistics share: the token ids of a test, values by layer, verdicts, tables.

Letters: L layers, R rows (keys of order 1, which are token ids), n rows of a test. Intervals and p values are
two-sided, at 95%.

A statistics file knows keys, not documents. So intervals treat token ids as independent draws; where shares are of
occurrences, their effective number (Kish: the square of the summed weights over the sum of squares) is used.
Occurrences in a document depend on each other, so these intervals are too narrow rather than too wide. Where the
documents are known, `over_documents` replaces them.

A key with NaN among the figures that a test needs is left out of that test alone, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.questions.data import RoutingData
from analysis.questions.drawn import LayerDraws, interval
from analysis.report.report import Column, Table
from varjax.stats import RoutingStats

ALPHA = 0.05  # of p values, after Holm's correction over layers
MIN_KEYS = 10  # token ids that a test needs
Z95 = 1.959963984540054  # of the normal distribution, 97.5%
SHARE = ".1%"  # how tables print shares
WILSON = (
    "Wilson intervals; for occurrences with the effective number of ids, too narrow where few ids have most of them."
)
NARROW_ENDS = "A share near 0 or 100% hardly changes between draws, so its interval is too narrow."
_NAMED = 5  # keys that are named where some were left out


class Values(NamedTuple):
    """A figure of each layer with its 95% interval; NaN where a layer cannot be tested."""

    value: np.ndarray  # float64 [L, ...]
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class UsedIds:
    """The token ids that a test uses in each layer."""

    rows: list[np.ndarray]  # per layer int64 [n]
    left_out: list[np.ndarray]  # per layer int64, rows with NaN among the figures needed
    untestable: list[str]  # per layer why nothing can be said, or ""

    @property
    def testable(self) -> np.ndarray:
        """The layers that can be tested, bool [L]."""
        return np.array([not reason for reason in self.untestable], bool)

    @property
    def number(self) -> np.ndarray:
        """How many ids are used, int64 [L]."""
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
        said, number = [], len(self.rows)
        for reason in dict.fromkeys(filter(None, self.untestable)):
            layers = [str(layer) for layer, one in enumerate(self.untestable) if one == reason]
            where = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
            said.append(f"Not testable, {'every layer' if len(layers) == number > 1 else where}: {reason}.")
        if keys := list(dict.fromkeys(np.concatenate(self.left_out).tolist())):
            layers_with = sum(len(rows) > 0 for rows in self.left_out)
            named = ", ".join(map(data.name_of, keys[:_NAMED])) + (", …" if len(keys) > _NAMED else "")
            rows = f"{sum(map(len, self.left_out)):,} rows without a known {figure}"
            said.append(f"{rows} in {layers_with} of {number} layers, {what}: {named}.")
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
    used = UsedIds([], [], [])
    for count, figure in zip(stats.count, figure_of(stats, name), strict=True):
        seen = np.flatnonzero((stats.row_orders == 1) & (count > 0))
        known = ~np.isnan(figure[seen])
        used.rows.append(seen[known])
        used.left_out.append(seen[~known])
        reason = ""
        if not len(seen):
            missed = stats.count.any() and not count.any()
            reason = "not captured: no rows, unlike other layers" if missed else "no rows of single token ids"
        elif known.sum() < least:
            with_figure = "" if known.all() else f" with a known {name}"
            reason = f"{known.sum()} of {len(seen)} token ids{with_figure}, at least {least} needed"
        used.untestable.append(reason)
    return used


def wilson(share: np.ndarray, number: np.ndarray) -> Values:
    """Compute Wilson's 95% interval of shares (1927).

    `scipy.stats.binomtest` has it for whole counts only, and effective numbers of draws are fractions.

    Args:
        share: float64 [L, ...].
        number: of draws, effective ones too, of a shape that broadcasts with it.

    Returns:
        The shares with their intervals.
    """
    z2 = Z95**2 / number
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * np.sqrt(share * (1 - share) / number + z2 / (4 * number))
    return Values(share, np.clip(middle - half, 0, share), np.clip(middle + half, share, 1))  # rounding at 0 and 1


def over_documents(
    data: RoutingData, values: Values, statistic: Callable[[LayerDraws], np.ndarray], least: float = 0.0
) -> Values:
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
    return Values(values.value, *interval(values.value, data.draws.by_layer(statistic), least, 1))


def verdict(
    data: RoutingData, used: UsedIds, passed: np.ndarray, criterion: str, fails_are_valid: bool = False
) -> tuple[str, str, list[str]]:
    """Judge a criterion on gate entropy that every layer that can be tested must pass.

    Args:
        data: with the kind of entropy; where it is a lower bound, no layer can pass.
        used: the layers that can be tested.
        passed: bool [L].
        criterion: in words.
        fails_are_valid: a layer with too much entropy fails even where the entropy is a lower bound.

    Returns:
        The verdict, the outcome in words, and the verdict of each layer.
    """
    why = data.entropy.no_verdict
    layers = [
        "not testable" if reason or (why and (holds or not fails_are_valid)) else "PASS" if holds else "FAIL"
        for holds, reason in zip(passed, used.untestable, strict=True)
    ]
    missing = layers.count("not testable")
    outcome = f"{criterion}: {layers.count('PASS')} of {len(layers)} layers{not_testable(missing)}{why and f'; {why}'}"
    return "not testable" if missing == len(layers) else "FAIL" if "FAIL" in layers else "PASS", outcome, layers


def not_testable(missing: int) -> str:
    """Mention the number of layers that cannot be tested, if there are any."""
    return f" ({missing} not testable)" if missing else ""


def table(
    title: str,
    figures: Mapping[str, tuple[np.ndarray, str]],
    used: UsedIds | None = None,
    verdicts: Sequence[str] = (),
) -> Table:
    """Make a table with a line per layer.

    Args:
        title: of the table.
        figures: by the name of the column, values [L] and their number format.
        used: adds how many ids were used and left out.
        verdicts: of each layer, if there are any.

    Returns:
        The table.
    """
    columns = {name: (values.tolist(), form) for name, (values, form) in figures.items()}
    if used is not None:
        columns |= {"ids": (used.number.tolist(), ","), "left out": ([len(rows) for rows in used.left_out], ",")}
    if verdicts:
        columns["verdict"] = (list(verdicts), "")
    lines = zip(*(values for values, _ in columns.values()), strict=True)
    heading = (Column("layer"), *(Column(name, form) for name, (_, form) in columns.items()))
    return Table(title, heading, tuple((layer, *line) for layer, line in enumerate(lines)))


def size(stats: RoutingStats) -> str:
    """Say how many tokens and documents statistics rest on."""
    documents = f"{stats.documents:,} documents" if stats.documents else "documents not known"
    return f"{stats.tokens:,} tokens, {documents}"
