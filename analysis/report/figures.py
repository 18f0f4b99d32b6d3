"""Figures that the phases share, as PNG and PDF, readable in grayscale.

Letters: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from varjax.files import replacing
from varjax.step import TIERS

MARKERS = "os^Dv<>ph*"
_CAPTIONS = 1.2  # inches above and below panels
_LEAST = (5.2, 4.6)  # inches of a figure of panels; captions, and the label at its side, must fit


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """`folder/name.png` (200 dpi) and `.pdf`, each whole or not at all."""
    written = []
    for kind in ("png", "pdf"):
        path = folder / f"{name}.{kind}"
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight")
        written.append(path)
    return written


def subplots(
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float] | None = None,
    layout: Literal["constrained"] | None = None,
    **options: Any,
) -> tuple[Figure, Any]:
    """As pyplot's function of that name, but nobody else knows the figure: no window, and nothing to be closed."""
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def panels(number: int, width: float = 3.0, height: float = 2.6, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure with so many panels, about as wide as a page, and their axes; more panels are smaller ones.

    Args:
        width: inches of a panel, if there are few.
        height: inches of a panel, if there are few.
        shared: passed on to `subplots`, such as `sharey=True`.
    """
    rows = max(1, round(math.sqrt(number / 1.5)))
    columns = math.ceil(number / rows)
    scale = 1.0 if columns <= 4 else max(4 / columns, 0.55)
    figure, axes = subplots(
        rows,
        columns,
        figsize=(max(width * scale * columns, _LEAST[0]), max(height * scale * rows + _CAPTIONS, _LEAST[1])),
        squeeze=False,
        **shared,
    )
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.tick_params(labelsize=max(10 * scale, 6))
        axis.title.set_fontsize(max(11 * scale, 7))
    for axis in axes.flat[max(number - columns, 0) : number]:
        axis.tick_params(labelbottom=True)  # shared axes have labels in the last row alone, which may not be full
    return figure, list(axes.flat[:number])


def shade(index: int, number: int) -> str:
    """A gray from black to light for one of a number of lines."""
    return str(0.7 * index / max(number - 1, 1))


def heat_map(axis: Any, values: np.ndarray, numbers: str = "", **settings: Any) -> Any:
    """Values [rows, columns] as grays, dark is high; with `numbers`, such as ".0%", each cell says its value."""
    image = axis.imshow(values, cmap="Greys", aspect="auto", interpolation="nearest", **settings)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            dark = np.isfinite(value) and image.norm(value) > 0.55
            said = format(value, numbers) if np.isfinite(value) else ""
            axis.text(column, row, said, ha="center", va="center", fontsize=7, color="1" if dark else "0")
    return image


def stacked_tiers(axis: Any, layers: Sequence[Mapping[str, float]]) -> None:
    """Bars of who decides: of each layer the shares by tier, fast first."""
    bottom = np.zeros(len(layers))
    for tier, gray in zip(TIERS, ("0.25", "0.6", "0.9"), strict=True):
        height = np.array([shares[tier] for shares in layers])
        axis.bar(range(len(layers)), height, bottom=bottom, color=gray, edgecolor="0", linewidth=0.4, label=tier)
        bottom += height
    axis.set(ylabel="share of the tokens", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1))


def quality_against_experts(
    series: Mapping[str, Sequence[tuple[float, float]]], budget: float, caption: str, dots: Collection[str] = ()
) -> Figure:
    """What fewer experts cost.

    Args:
        series: name -> points (experts per token and layer, relative change of perplexity).
        budget: the change that is still acceptable, drawn as a line.
        caption: which documents were scored.
        dots: names of series that no line joins, for their points do not follow from each other.
    """
    figure, axis = subplots(figsize=(5.2, 3.6))
    for index, (name, points) in enumerate(series.items()):
        experts, change = np.array(sorted(points)).T
        gray = str(0.6 * index / max(len(series) - 1, 1))
        line = "-" if len(points) > 1 and name not in dots else ""
        axis.plot(experts, 100 * change, line, color=gray, marker=MARKERS[index % len(MARKERS)], label=name)
    axis.axhline(100 * budget, color="0.6", linewidth=0.8, linestyle="--")
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.set(xlabel="experts run per token and layer", ylabel="change of perplexity [%]", title=caption)
    axis.legend(fontsize="small")
    return figure


def over_the_depth(layers: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the layers, spread evenly over the depth."""
    return layers[np.unique(np.linspace(0, len(layers) - 1, most).round().astype(int))]
