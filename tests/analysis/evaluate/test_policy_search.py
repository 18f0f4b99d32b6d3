import numpy as np
import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.evaluate.points import Subject
from analysis.evaluate.policy_search import Measured, search
from varjax.config import VARConfig

READING = {"batch_size": 4, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def collected(saved_model, even_documents):
    build = even_documents[:100]
    keys = choose_keys(saved_model, build, 16, KeySettings(orders=(1,), min_count=3))
    stats = collect(saved_model, build, keys, **READING)
    return stats, collect_answers(saved_model, build, stats.keys, (0, 1), **READING)


@pytest.fixture(scope="module")
def found(saved_model, even_documents, collected):
    def run(budget):
        return search(Subject(saved_model, *collected, VARConfig(), even_documents[100:], **READING), budget=budget)

    return run


def test_search_spends_the_budget_and_no_more(found):
    generous, strict = found(10.0), found(-1.0)
    assert generous.chosen.experts_per_token < 0.6  # unseen and special tokens, and experts that never spoke at a key
    assert strict.chosen == Measured((), 0.0, 2.0)
    assert all(policy is None for policy in map(strict.config.policy, range(2)))
    tight = found(0.002)
    assert tight.chosen.degradation <= 0.002
    assert generous.chosen.experts_per_token <= tight.chosen.experts_per_token
    assert len(generous.single) == sum(
        len({p.choices for p in generous.single if p.choices[0].layer == l}) for l in (0, 1)
    )


def test_the_config_that_was_chosen_does_what_was_measured(saved_model, even_documents, collected, found):
    """The search shares one table, and gives the layers that stay open a tolerance of 0."""
    from analysis.evaluate.losses import plain_runner, score, var_runner
    from varjax.model import VARModel
    from varjax.step import summary
    from varjax.table import build_table

    result = found(0.01)
    table = build_table(result.config, collected[0], collected[1], top_k=saved_model.config.top_k)
    var_model = VARModel(saved_model, result.config, table=table)
    scoring = {"documents": even_documents[100:], **READING}
    plain, _ = score(plain_runner(saved_model), None, **scoring)
    scores, state = score(var_runner(var_model), var_model.init(), **scoring)
    assert np.expm1(scores.nll_per_token - plain.nll_per_token) == pytest.approx(result.chosen.degradation, abs=1e-5)
    experts = summary(state.counters, saved_model.config.top_k)["experts_per_token"]
    assert experts == pytest.approx(result.chosen.experts_per_token, abs=1e-2)
    assert 0 < experts < 2
