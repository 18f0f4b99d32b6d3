"""What an estimator cannot answer becomes a reason; what goes wrong in it reaches the user."""

import numpy as np
import pytest

from analysis import command
from analysis.hypotheses import trace_findings
from analysis.hypotheses.trace_findings import Settings, examine_trace
from tests.synthetic_traces import make_trace
from varjax.errors import InputError, NotTestableError

TRACE = make_trace(np.random.default_rng(0).permuted(np.tile(np.arange(4), (200, 2, 1)), axis=-1)[..., :2], 4)
SETTINGS = Settings(orders=(1,), permutations=0, samples=10)
ESTIMATORS = ("predictability", "conditional_entropy", "repetition", "load", "co_activation")


def numpys_own(*_, **__):
    np.zeros(2) + np.zeros(3)


def failing(raised):
    def estimator(*_, **__):
        raise raised("out of luck")

    return estimator


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("broken", "raised", "said"),
    [
        (numpys_own, ValueError, "could not be broadcast"),
        (failing(RuntimeError), RuntimeError, "out of luck"),
        (failing(InputError), InputError, "out of luck"),  # what was given is wrong, which is not a finding either
    ],
)
def test_a_fault_in_an_estimator_is_no_finding(monkeypatch, name, broken, raised, said):
    monkeypatch.setattr(trace_findings, name, broken)
    with pytest.raises(raised, match=said) as caught:
        examine_trace(TRACE, SETTINGS)
    assert caught.traceback[-1].name == broken.__name__


def test_a_fault_is_not_shortened_to_a_message(monkeypatch):
    monkeypatch.setattr(trace_findings, "load", numpys_own)
    with pytest.raises(ValueError, match="could not be broadcast"):  # and not SystemExit
        command.run(lambda: examine_trace(TRACE, SETTINGS))


def test_what_cannot_be_tested_becomes_its_reason(monkeypatch):
    monkeypatch.setattr(trace_findings, "load", failing(NotTestableError))
    found = examine_trace(TRACE, SETTINGS)
    assert found.load == "out of luck" and not isinstance(found.repetition, str)


def test_too_few_permutations_are_the_users_fault_and_no_finding():
    with pytest.raises(InputError, match="give 0 for no null, or at least"):
        examine_trace(TRACE, Settings(orders=(1,), permutations=3, samples=10))
