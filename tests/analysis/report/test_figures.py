"""Figures fit a page and are written whole."""

import numpy as np
import pytest
from matplotlib import pyplot

from analysis.report.figures import heat_map, panels, quality_against_experts, save, subplots


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
