"""The bench's cases, and that it runs."""

import numpy as np
import pytest

from benchmarks.experts import cases, measure, print_table
from models.experts import get_engine


def test_cases_keep_what_they_say():
    found = cases(6, 16, 8, [4, 2.5, 0])
    assert list(found) == [8, 4, 2.5, 0]
    for m, routing in found.items():
        used = np.asarray(routing.experts) < 16
        assert used.sum() == 6 * m and set(used.sum(1)) <= {int(m), int(m + 0.5)}
        assert (np.asarray(routing.weights)[~used] == 0).all()
        assert all(len(set(row[row < 16])) == np.sum(row < 16) for row in np.asarray(routing.experts))
    assert list(cases(1, 16, 8, [4, 2.5])) == [8, 4]


def test_a_table_is_measured_and_printed(capsys):
    routings = cases(4, 3, 2, [1])
    seconds = measure(routings, 8, 6, 3, "float32", {"blocks": get_engine("blocks")}, repeats=2)
    assert set(seconds) == {"plain", "blocks/2.0", "blocks/1.0"}
    print_table(seconds, ["blocks"], routings, 3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["plain", "blocks", "blocks"]
    assert float(lines[2][-1]) == pytest.approx(1)
