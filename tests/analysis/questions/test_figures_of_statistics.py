"""Figures of routing statistics are drawn for few and for many layers, and say what they rest on."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text

from analysis.questions.consistency import _readable
from analysis.questions.data import RoutingData, Source
from analysis.questions.registry import ROUTING_QUESTIONS
from analysis.report.figures import save
from varjax.stats import Moments, RoutingStats

NAMES = ("frequency_entropy", "entropy_distribution", "routing_consistency", "token_experts", "fast_path_coverage")


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


@pytest.mark.parametrize("layers", [1, 9])
def test_figures_of_statistics(layers, tmp_path):
    stats = statistics(layers)
    data = RoutingData(Source(stats, {}, {0: "a $x$ \n b"}))
    sections = [section for question in ROUTING_QUESTIONS[:5] for section in question.answer(data).sections]
    figures = {figure.name: figure.draw() for section in sections for figure in section.figures}
    assert list(figures) == list(NAMES)
    for name, figure in figures.items():
        assert f"{stats.tokens:,} tokens, 7 documents" in words(figure), name
        width, height = figure.get_size_inches()
        assert 3 < width < 16 and 2 < height < 16
    assert len([axis for axis in figures["frequency_entropy"].axes if axis.get_visible()]) == layers
    assert "nats" in words(figures["frequency_entropy"]) and "nats" in words(figures["fast_path_coverage"])
    save(figures["token_experts"], tmp_path, "token_experts")
    assert (tmp_path / "token_experts.pdf").stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "label"),
    [(" the", "·the"), ("Ġthe", "Ġthe"), ("\n\t", "\\n\\t"), ("日", "\\u65e5"), ("▁a", "▁a"), ("$x$", "$x$")],
)
def test_tokens_become_labels_of_one_line(text, label):
    assert _readable(text) == label
