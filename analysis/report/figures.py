"""Figures that several reports share, as PNG and PDF, readable in grayscale.

Letters: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from varjax.files import replacing
from varjax.step import TIERS

MARKERS = "os^Dv<>ph*"
_CAPTIONS = 1.2  # inches above and below panels
_LEAST = (5.2, 4.6)  # inches of a figure of panels, so that captions and the label at its side fit


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Save a figure as PNG (200 dpi) and PDF, each whole or not at all.

    Args:
        figure: the figure.
        folder: where to.
        name: stem of the two files.

    Returns:
        The two paths.
    """
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
    """Make a figure with axes, as pyplot's `subplots` does, but without a window and with nothing to close.

    Args:
        rows: of axes.
        columns: of axes.
        figsize: width and height in inches.
        layout: of matplotlib.
        options: of `matplotlib.figure.Figure.subplots`.

    Returns:
        The figure and its axes.
    """
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def panels(number: int, width: float = 3.0, height: float = 2.6, **shared: Any) -> tuple[Figure, list[Any]]:
    """Make a figure of panels that is about as wide as a page. The more panels, the smaller they are.

    Args:
        number: of panels.
        width: inches of a panel, if there are few.
        height: inches of a panel, if there are few.
        shared: options of `subplots`, such as `sharey=True`.

    Returns:
        The figure and the panels' axes.
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
        axis.tick_params(labelbottom=True)  # shared axes have labels in the last row only, which may not be full
    return figure, list(axes.flat[:number])


def shade(index: int, number: int) -> str:
    """Choose the gray of one of several lines.

    Args:
        index: of the line, from 0.
        number: of lines.

    Returns:
        A matplotlib color from black to light gray.
    """
    return str(0.7 * index / max(number - 1, 1))


def heat_map(axis: Any, values: np.ndarray, numbers: str = "", **settings: Any) -> Any:
    """Draw values as grays, dark for high ones.

    Args:
        axis: to draw on.
        values: [rows, columns]; NaN stays empty.
        numbers: format such as ".0%" for writing each value into its cell; "": none.
        settings: of matplotlib's `imshow`.

    Returns:
        The image, for a color bar.
    """
    image = axis.imshow(values, cmap="Greys", aspect="auto", interpolation="nearest", **settings)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            dark = np.isfinite(value) and image.norm(value) > 0.55
            text = format(value, numbers) if np.isfinite(value) else ""
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="1" if dark else "0")
    return image


def stacked_tiers(axis: Any, layers: Sequence[Mapping[str, float]]) -> None:
    """Draw the share of tokens that each tier decides, a bar per layer.

    Args:
        axis: to draw on.
        layers: shares by tier of each layer.
    """
    bottom = np.zeros(len(layers))
    for tier, gray in zip(TIERS, ("0.25", "0.6", "0.9"), strict=True):
        height = np.array([shares[tier] for shares in layers])
        axis.bar(range(len(layers)), height, bottom=bottom, color=gray, edgecolor="0", linewidth=0.4, label=tier)
        bottom += height
    axis.set(ylabel="share of the tokens", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1))


def quality_against_experts(series: Mapping[str, Sequence[tuple[float, float]]], budget: float, caption: str) -> Figure:
    """Draw the change in perplexity against the number of experts.

    Args:
        series: name -> points (experts per token and layer, relative change in perplexity).
        budget: the acceptable change, drawn as a line.
        caption: title, which says which documents were scored.

    Returns:
        The figure.
    """
    figure, axis = subplots(figsize=(5.2, 3.6))
    for index, (name, points) in enumerate(series.items()):
        experts, change = np.array(sorted(points)).T
        gray = str(0.6 * index / max(len(series) - 1, 1))
        line = "-" if len(points) > 1 else ""
        axis.plot(experts, 100 * change, line, color=gray, marker=MARKERS[index % len(MARKERS)], label=name)
    axis.axhline(100 * budget, color="0.6", linewidth=0.8, linestyle="--")
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.set(xlabel="experts run per token and layer", ylabel="change in perplexity [%]", title=caption)
    axis.legend(fontsize="small")
    return figure


def over_the_depth(layers: np.ndarray, most: int) -> np.ndarray:
    """Choose some layers, spread evenly over the depth.

    Args:
        layers: int [L].
        most: how many to choose at most.

    Returns:
        int [at most `most`].
    """
    return layers[np.unique(np.linspace(0, len(layers) - 1, most).round().astype(int))]
