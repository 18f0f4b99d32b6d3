"""What answers leave unexplained, where it is known: planted means, planted noise, planted maps."""

import dataclasses

import numpy as np
import pytest

from analysis.questions.answer_quality import QUESTION, layer_quality
from varjax.affine import Maps
from varjax.answers import Answers
from varjax.keys import ANY
from varjax.routing import NO_ANSWER

COUNT, HIDDEN = 1000, 8


def planted(noise, spread):
    """One expert in layer 3; means of 4 token ids that are `spread` apart in a dimension, noise of a variance."""
    keys = np.array([[ANY, token] for token in range(4)], np.int32)
    answers = Answers.empty(keys, (3,), 1, HIDDEN)
    mean = np.zeros((1, 5, HIDDEN))
    mean[0, 1:, 0] = spread * np.array([-1.5, -0.5, 0.5, 1.5])
    count = np.array([[4 * COUNT, *[COUNT] * 4]])
    between = np.square(mean[0, 1:, 0]).mean()
    m2 = np.array([[4 * COUNT * (noise + between), *[COUNT * noise] * 4]], float)
    return dataclasses.replace(answers, mean=mean, count=count, mass=count.astype(float), m2=m2)


def test_the_share_is_that_of_the_noise():
    found = layer_quality(planted(noise=2.0, spread=2.0), 3, shrinkage=1.0)
    between = 4 * np.square([-1.5, -0.5, 0.5, 1.5]).mean()
    assert found.unexplained[0] == pytest.approx(1.0, rel=1e-2)  # the mean over all tokens is 0
    assert found.unexplained[1] == pytest.approx(2 / (2 + between), rel=1e-2)
    assert found.left_by_map is None


def test_a_pair_that_never_spoke_does_not_count():
    answers = planted(noise=2.0, spread=2.0)
    entry = answers.entry.copy()
    entry[0, 1] = NO_ANSWER
    assert layer_quality(dataclasses.replace(answers, entry=entry), 3, 1.0).unexplained[1] < 1


def test_the_section_says_what_the_map_leaves():
    answers = planted(noise=2.0, spread=2.0)
    maps = Maps(
        *(np.zeros(shape, np.float32) for shape in ((1, HIDDEN, 2), (1, 1, 2, 2), (1, 2, HIDDEN))), np.array([[0.25]])
    )
    affine = dataclasses.replace(answers, maps=maps, inputs=answers.mean)
    finding = QUESTION.answer(affine)
    (section,) = finding.sections
    assert "maps of rank 2 leave 25% of the deviation" in section.outcome
    assert [column.name for column in section.tables[0].columns][-1] == "left by the map"
    assert finding.result["answers"][0].left_by_map == 0.25
    (constant,) = QUESTION.answer(answers).sections
    assert "map" not in constant.outcome
    for one in (section, constant):
        one.figures[0].draw()
