"""Statistics and answers of the tiny model, and a real trace, which several test files share."""

from typing import NamedTuple

import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.maps import with_maps
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.text.encoding import Encoded
from analysis.traces.importing import import_npz
from analysis.traces.trace import Trace
from varjax.answers import Answers
from varjax.stats import RoutingStats


@pytest.fixture(scope="session")
def real_trace(shared_data) -> Trace:
    """A trace of gpt-oss-20b."""
    return import_npz(shared_data / "traces" / "gpt_oss_20b.npz")


READING = {"batch_size": 20, "max_length": 16, "progress": False}


class Collected(NamedTuple):
    stats: RoutingStats  # orders 1 and 2
    answers: Answers  # of both layers
    held_out: list[Encoded]  # 40 documents of 16 tokens


@pytest.fixture(scope="session")
def collected(saved_model, even_documents) -> Collected:
    known, held_out = even_documents[:-40], even_documents[-40:]
    keys = choose_keys(saved_model, known, 16, KeySettings(orders=(1, 2), min_count=3))
    stats = collect(saved_model, known, keys, **READING)
    return Collected(stats, collect_answers(saved_model, known, stats.keys, range(2), **READING), held_out)


@pytest.fixture(scope="session")
def with_inputs(saved_model, collected, even_documents) -> Answers:
    """Those of `collected`, with the experts' mean inputs."""
    return collect_answers(saved_model, even_documents[:-40], collected.stats.keys, range(2), inputs=True, **READING)


@pytest.fixture(scope="session")
def affine(saved_model, collected, with_inputs, even_documents) -> Answers:
    """`with_inputs` with maps of rank 12, for which the first 20 held-out documents chose the ridge."""
    return with_maps(saved_model, with_inputs, even_documents[:-40], collected.held_out[:20], 12, 1.0, **READING)


@pytest.fixture(scope="session")
def affine_collected(collected, affine) -> Collected:
    """`collected` with affine answers."""
    return collected._replace(answers=affine)
