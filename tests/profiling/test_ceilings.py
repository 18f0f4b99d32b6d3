"""Ceilings are positive and ordered by gross factors; how high they are is the machine's affair."""

import dataclasses
import json

import pytest

from profiling.ceilings import DTYPES, measure


@pytest.fixture(scope="module")
def found():
    return measure(quick=True, repeats=3)


def test_every_figure_is_positive_and_inside_its_interval(found):
    assert {(one.kind, one.dtype) for one in found.figures if one.kind == "product"} == {
        ("product", dtype) for dtype in DTYPES
    }
    for one in found.figures:
        assert 0 < one.low <= one.value <= one.high, one


def test_a_large_product_is_far_quicker_per_operation_than_a_matrix_times_a_vector(found):
    assert found.best("product", name="square") > 1.5 * found.best("product", name="matrix-vector")


def test_one_more_kernel_costs_less_than_a_call(found):
    assert found.kernel < found.call < 0.05


def test_what_is_shown_and_what_becomes_json_name_every_figure(found):
    assert len(str(found).splitlines()) == 1 + len(found.figures)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["figures"][0]["kind"] == "product"


def test_a_figure_that_was_not_measured_is_named(found):
    with pytest.raises(ValueError, match="float8"):
        found.best("product", dtype="float8")
