"""What must hold on eight devices; `test_mesh.py` runs this file in a process that has them.

One tiny Mixtral is the measure of every mesh: its logits, the state that VAR makes of them, statistics, parameters.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.text.encoding import Encoded
from models import Model, MoEConfig, load_model, placement
from models.decoder import forward, init_params
from models.experts import slot_outputs
from models.placement import MeshError, Placement, make_mesh
from models.weights import save_params
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.model import build_for, routed_forward
from varjax.routing import Routing

CONFIG = MoEConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    num_experts=4,
    top_k=2,
    rope_theta=1e4,
    eos_token_id=None,
    initializer_range=0.3,
)
MESHES = ("data=1,model=8", "data=2,model=4", "data=4,model=2", "data=8,model=1")
BATCH, LENGTH, DECODED = 8, 12, 2
READING: dict[str, Any] = {"batch_size": 2, "max_length": 16, "progress": False}
CLOSE = {"rtol": 0, "atol": 1e-5}

assert jax.device_count() == 8, "give XLA_FLAGS=--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    save_params(folder, init_params(CONFIG, jax.random.key(0)), CONFIG)
    return folder


@pytest.fixture(scope="module")
def alone(directory) -> Model:
    """On one device."""
    return load_model(directory)


@pytest.fixture(scope="module")
def load(directory):
    """`load(mesh)`: the same checkpoint on eight devices, loaded once for each mesh."""
    return functools.lru_cache(lambda shape: load_model(directory, mesh=make_mesh(shape)))


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    """int32 [B, T + DECODED]: some tokens are frequent, and what is decoded came before."""
    drawn = np.random.default_rng(1).integers(3, 35, (BATCH, LENGTH + DECODED)).astype(np.int32)
    drawn[:, LENGTH - 1 :] = drawn[:, 3 : 4 + DECODED]
    return drawn


@pytest.fixture(scope="module")
def documents(texts) -> list[Encoded]:
    return [Encoded(text, str(number), "", words=1, bytes=1) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def collected(alone, documents):
    """Keys, statistics and answers of one device."""
    return collected_by(dataclasses.replace(alone, placement=Placement.of(CONFIG, make_mesh("data=1"))), documents)


def collected_by(model: Model, documents: list[Encoded]) -> tuple:
    keys = choose_keys(model, documents, 16, KeySettings((1, 2), min_count=3))
    stats = collect(model, documents, keys, **READING)
    return stats, collect_answers(model, documents, stats.keys, range(CONFIG.num_layers), **READING)


def with_var(model: Model, collected) -> VARModel:
    """One expert kept and the answers added where a token or bigram is known; what is confident is remembered."""
    config = VARConfig(
        frequency_threshold=5,
        entropy_threshold=5.0,
        confidence_threshold=0.3,
        context_window_size=2,
        cache_size=64,
        default=LayerPolicy(kept=1, orders=(1, 2)),
    )
    stats, answers = collected
    return VARModel(model, config, table=build_for(model, stats, config, answers), clock=lambda: 0.0)


class Run(NamedTuple):
    """A prefill and some steps of decoding."""

    prefill: np.ndarray  # float32 [B, T, V]
    decode: np.ndarray  # float32 [B, DECODED, V]
    state: Any


def run(model: Model, texts: np.ndarray, var_model: VARModel | None = None) -> Run:
    """The plain model, or under VAR."""
    kv, state = model.empty_cache(*texts.shape), var_model and var_model.init(len(texts))
    logits = []
    for start, end in [(0, LENGTH), *((at, at + 1) for at in range(LENGTH, texts.shape[1]))]:
        ids, mask = model.check_inputs(texts[:, start:end])
        options = {"kv": kv, "last_logits_only": start > 0}
        if var_model is None:
            out = model.network.forward(model.params, ids, attention_mask=mask, **options)
        else:
            out, state = var_model.advance(state, ids, mask, **options)
        kv = out.kv
        logits.append(np.asarray(out.logits))
    return Run(logits[0], np.concatenate(logits[1:], axis=1), jax.tree.map(np.asarray, state))


@pytest.fixture(scope="module")
def runs_alone(alone, texts, collected) -> tuple[Run, Run]:
    return run(alone, texts), run(alone, texts, with_var(alone, collected))


@pytest.mark.parametrize("shape", MESHES)
def test_logits_are_those_of_one_device_and_nothing_compiles_twice(load, texts, collected, runs_alone, shape):
    model = load(shape)
    var_model = with_var(model, collected)
    for alone, programs, options in zip(runs_alone, (forward, routed_forward), ((), (var_model,)), strict=True):
        before = programs._cache_size()
        found = run(model, texts, *options)
        assert programs._cache_size() == before + 2  # the prefill, and the step of decoding
        np.testing.assert_allclose(found.prefill, alone.prefill, **CLOSE)
        np.testing.assert_allclose(found.decode, alone.decode, **CLOSE)
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **CLOSE), found.state, alone.state)
        run(model, texts, *options)
        assert programs._cache_size() == before + 2


def test_the_measure_is_one_of_all_tiers(runs_alone):
    """Tokens of every tier, fewer experts than the plain model, other logits: else the test above would show little."""
    plain, var = runs_alone
    counters = var.state.counters
    assert (counters.tokens.sum(axis=0) > 0).all()
    assert counters.active.sum() < 0.9 * CONFIG.top_k * counters.tokens.sum()
    assert np.abs(plain.prefill - var.prefill).max() > 1e-2


@pytest.mark.parametrize("shape", MESHES)
def test_statistics_and_answers_are_those_of_one_device(load, documents, collected, shape):
    (stats, answers), (alone, answers_alone) = collected_by(load(shape), documents), collected
    for name in ("keys", "count", "top1_counts"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(alone, name))
    np.testing.assert_allclose(stats.entropy.mean, alone.entropy.mean, **CLOSE)
    np.testing.assert_array_equal(answers.count, answers_alone.count)
    np.testing.assert_allclose(answers.mean, answers_alone.mean, **CLOSE)
