import dataclasses
import json
import sys

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the harness is not installed (extra `eval`)")

from analysis.harness import evaluate, main
from analysis.harness_lm import HarnessLM
from analysis.quality import plain_runner, score
from analysis.text.corpus import Document
from analysis.text.encoding import encode
from models import Sampling
from varjax import VARConfig, VARModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|datasets|evaluate|sacrebleu|rouge_score).*")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The harness asks the machine for everything installed on it, at the end of every run."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
