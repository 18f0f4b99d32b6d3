"""The library under JAX's stricter settings: 64-bit types, no promotion of ranks, no transfer that nobody asked for.

A part of the suite runs in a process of its own under the first two.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import varjax
from analysis.evaluate.losses import INDEPENDENT, Caching, score, var_runner
from models import Sampling, load_model
from varjax import VARConfig, VARModel

TESTS = Path(__file__).resolve().parent
PART = (
    "varjax/test_statefile.py::test_what_goes_on_after_loading_equals_never_having_stopped",
    "varjax/test_step.py::test_counters_pass_the_end_of_their_words_and_go_on",
    "varjax/test_step.py::test_what_was_learned_with_confidence_is_remembered_with_enough_experts",
    "varjax/test_table.py::test_order_0_plans_known_and_unknown_tokens_alike_but_no_padding",
    "varjax/test_table.py::test_layers_with_outliers_leave_the_first_token_open",
    "varjax/test_routing.py::test_what_is_not_known_runs",
    "varjax/test_affine.py",
    "test_settings.py::test_a_model_generates_under_var",
)


def run_all(saved_model, var_model, ids) -> np.ndarray:
    """Plain and under VAR: a call, sampling, greedy decoding, a report; returns the ids that greedy decoding gave."""
    saved_model(ids)
    saved_model.generate(ids, 3, sampling=Sampling(temperature=0.7, top_k=5, top_p=0.9))
    out, state = var_model(ids, var_model.init(len(ids)))
    assert out.logits.dtype == np.float32 and out.routing.experts.dtype == np.int32
    tokens, state = var_model.generate(ids, state, 3)
    assert tokens.dtype == np.int32 and var_model.report(state)["tokens"] > 0
    return tokens


@pytest.fixture(params=["constant", "affine"])
def var_model(small_var_models, request):
    """With a cached tier as well."""
    small = small_var_models[request.param]
    config = VARConfig(**vars(small.config) | {"cache_size": 8, "confidence_threshold": 0.3})
    return VARModel(small.model, config, table=small.table)


def test_a_model_generates_under_var(saved_model, var_model, even_documents):
    """What the processes below run under their settings."""
    ids = np.stack([one.ids for one in even_documents[:2]])
    assert run_all(saved_model, var_model, ids).shape == (2, 19)


def test_a_part_of_the_suite_passes_under_stricter_settings():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / one) for one in PART)],
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_transfers_are_explicit(model_directory, saved_model, var_model, even_documents, tmp_path):
    """Loading, calls, decoding, a state through a file, a plan by hand, the losses of documents."""
    ids = np.stack([one.ids for one in even_documents[:2]])
    expected = run_all(saved_model, var_model, ids)
    with jax.transfer_guard("disallow"):
        load_model(model_directory)
        np.testing.assert_array_equal(run_all(saved_model, var_model, ids), expected)
        state = var_model.init(2)
        var_model.save(tmp_path, state)
        _, state = var_model(ids, var_model.load(tmp_path))
        now = jax.device_put(np.int32(0))
        jax.jit(varjax.plan)(var_model.table, state, jax.device_put(ids), now, var_model.settings)
        for caching in (INDEPENDENT, Caching(shared=True)):  # of two windows each
            state, reading = caching.init(var_model, 4), {"batch_size": 4, "max_length": 8, "progress": False}
            score(var_runner(var_model, caching), state, even_documents[:4], **reading)
