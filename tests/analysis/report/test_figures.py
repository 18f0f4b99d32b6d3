"""Figures are drawn for few and for many layers, say what they rest on, and are written whole."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from analysis.hypotheses import statistics_figures, trace_figures
from analysis.hypotheses.consistency import consistency
from analysis.hypotheses.criteria import coverage
from analysis.report.figures import heat_map, panels, quality_against_experts, save, subplots
from analysis.resampling import Measure
from varjax.stats import Moments, RoutingStats


def statistics(layers: int, rows: int = 40, experts: int = 8) -> RoutingStats:
    """Random routing; the last layer has no rows where there are several."""
    rng = np.random.default_rng(layers)
    empty = RoutingStats.empty(np.arange(rows)[:, None], (1,), layers, experts)
    count = np.broadcast_to(rng.geometric(0.02, rows), (layers, rows)).copy()
    if layers > 1:
        count[-1] = 0
    top1 = np.stack([rng.multinomial(one, np.full(experts, 1 / experts)) for one in count])
    entropy = np.where(count > 0, rng.uniform(0, 2, (layers, rows)), np.nan)
    entropy[0, 3] = np.nan
    return replace(
        empty,
        count=count,
        top1_counts=top1,
        sum_probs=top1.astype(float),
        entropy=Moments(entropy, empty.entropy.m2, entropy, entropy),
        tokens=int(count[0].sum()),
        documents=7,
    )


def words(figure) -> str:
    return " ".join(one.get_text() for one in figure.findobj(Text))


@pytest.mark.parametrize("layers", [1, 4, 24])
def test_figures_of_statistics(layers, tmp_path):
    stats = statistics(layers)
    figures = {
        "frequency": statistics_figures.frequency_against_entropy(stats),
        "entropy": statistics_figures.entropy_distribution(stats),
        "consistency": statistics_figures.consistency_by_decile(consistency(stats, samples=5), stats),
        "coverage": statistics_figures.fast_path_coverage(coverage(stats), stats),
        "experts": statistics_figures.token_experts(stats, {0: "a $x$ \n b"}),
    }
    for name, figure in figures.items():
        assert f"{stats.tokens:,} tokens, 7 documents" in words(figure), name
        width, height = figure.get_size_inches()
        assert 3 < width < 16 and 2 < height < 16
    assert len([axis for axis in figures["frequency"].axes if axis.get_visible()]) == layers
    assert "nats" in words(figures["frequency"]) and "nats" in words(figures["coverage"])
    for name, figure in figures.items():
        if layers == 4 or name == "experts":
            save(figure, tmp_path, name)
    assert (tmp_path / "experts.pdf").stat().st_size > 1000


def test_save_writes_png_and_pdf(tmp_path):
    figure = quality_against_experts({"policy": [(1.0, 0.01), (2.0, 0.0)]}, 0.01, "12 documents")
    written = save(figure, tmp_path, "frontier")
    assert [path.name for path in written] == ["frontier.png", "frontier.pdf"]
    assert written[0].read_bytes()[:4] == b"\x89PNG" and written[1].read_bytes()[:4] == b"%PDF"
    assert not pyplot.get_fignums()  # nobody else knows the figure: a notebook's backend is left as it is


@pytest.mark.parametrize(("number", "widest"), [(1, 5.2), (4, 12), (24, 13), (48, 20)])
def test_panels_fit_a_page(number, widest):
    figure, axes = panels(number)
    assert len(axes) == number and figure.get_size_inches()[0] <= widest


def test_heat_map_is_gray_and_leaves_the_unknown_empty():
    _, axis = subplots()
    image = heat_map(axis, np.array([[0.0, 1.0], [np.nan, 0.5]]), ".1f")
    assert image.get_cmap().name == "Greys"
    assert [one.get_text() for one in axis.texts] == ["0.0", "1.0", "", "0.5"]
    assert axis.texts[0].get_color() == "0" and axis.texts[1].get_color() == "1"


def test_a_measure_outside_its_own_interval_is_drawn():
    _, axis = subplots()
    one = np.full((1, 3), 0.5)
    missing = np.array([[0.5, np.nan, 0.4]])
    measure = Measure("m", "share", missing, one + 0.1, one + 0.2, one, one - 0.1, one + 0.1, one)
    trace_figures.against_null(axis, measure, 0)


@pytest.mark.parametrize(
    ("text", "label"),
    [(" the", "·the"), ("Ġthe", "Ġthe"), ("\n\t", "\\n\\t"), ("日", "\\u65e5"), ("▁a", "▁a"), ("$x$", "$x$")],
)
def test_tokens_become_labels_of_one_line(text, label):
    assert statistics_figures.readable(text) == label
