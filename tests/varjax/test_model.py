"""VARModel on a tiny checkpoint: off is plain, on saves experts, nothing recompiles, foreign files are refused."""

import dataclasses

import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.statistics import KeySettings, choose_keys, collect
from models import Sampling
from varjax import LayerPolicy, VARConfig, VARModel, answersfile, statsfile
from varjax.model import routed_forward

READING = {"batch_size": 4, "max_length": 16, "progress": False}
ANYTHING = 5.0  # nats, more than any entropy


@pytest.fixture(scope="module")
def stats_path(tmp_path_factory, saved_model, documents):
    """Statistics of orders 1 and 2 with the answers beside them."""
    path = tmp_path_factory.mktemp("phase1") / "routing_stats.parquet"
    keys = choose_keys(saved_model, documents, 16, KeySettings(orders=(1, 2), min_count=3))
    stats = collect(saved_model, documents, keys, **READING)
    answers = collect_answers(saved_model, documents, stats.keys, (0, 1), **READING)
    meta = {"fingerprint": saved_model.fingerprint, "model": "tiny"}
    statsfile.write(path, stats, meta)
    answersfile.write(path.with_name("routing_stats.residuals.safetensors"), answers, meta)
    return path


def config(stats_path, **overrides) -> VARConfig:
    """Every key of three occurrences answers; one expert kept, the other's answer added."""
    return VARConfig.from_routing_stats(
        stats_path, **({"frequency_threshold": 3, "entropy_threshold": ANYTHING} | overrides)
    )


@pytest.fixture
def ids(documents):
    return np.stack([document.ids[:16] for document in documents if len(document.ids) >= 16][:4])


def test_switched_off_is_bit_identical_to_the_plain_model(saved_model, ids):
    var_model = VARModel(saved_model, VARConfig(enable_var=False))
    out, state = var_model(ids, var_model.init())
    plain = saved_model(ids)
    assert state is None and out.plan is None
    np.testing.assert_array_equal(out.logits, plain.logits)
    np.testing.assert_array_equal(out.router_probs, plain.router_probs)


def test_nothing_planned_equals_the_plain_model(saved_model, stats_path, ids):
    nothing = config(stats_path, frequency_threshold=10**9, confidence_threshold=1.0)
    var_model = VARModel(saved_model, nothing)
    out, state = var_model(ids, var_model.init(len(ids)))
    # Another program, so equal to rounding; the routing is the same function of the same probabilities.
    np.testing.assert_allclose(out.logits, saved_model(ids).logits, rtol=1e-4, atol=1e-5)
    assert "100.0%" in var_model.summary(state)


def test_planned_tokens_run_fewer_experts_and_answers_help(saved_model, stats_path, ids):
    plain = saved_model(ids).logits
    error, experts = {}, {}
    for name, policy in {
        "look-up only": LayerPolicy(kept=0),
        "one": LayerPolicy(kept=1),
        "one, nothing added": LayerPolicy(kept=1, residual=False),
        "one of every token": LayerPolicy(kept=1, orders=(0,)),
        "tolerant": LayerPolicy(kept=None, tolerance=1e9),
        "strict": LayerPolicy(kept=None, tolerance=1e-9),
    }.items():
        var_model = VARModel(saved_model, config(stats_path, default=policy, cache_size=0))
        out, _ = var_model(ids, var_model.init(len(ids)))
        planned = np.asarray(out.plan.tier) == 0
        used = np.asarray(out.routing.experts) < saved_model.config.num_experts
        experts[name] = used.sum(-1)[planned]
        error[name] = float(np.square(out.logits - plain).mean())
    # An expert that never spoke at a key has no answer there, and runs.
    assert experts["look-up only"].mean() < 0.2 and 0.9 < experts["one"].mean() < 1.1
    assert (experts["one, nothing added"] == 1).all() and (experts["strict"] == 2).all()
    np.testing.assert_array_equal(experts["tolerant"], experts["look-up only"])
    assert len(experts["one of every token"]) > len(experts["one"])
    assert error["strict"] < 1e-8 and error["tolerant"] == pytest.approx(error["look-up only"], rel=1e-6)
    assert error["one"] < error["one, nothing added"]  # even a random model's second expert has a mean


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_answers_in_fewer_bytes_change_little(saved_model, stats_path, ids, dtype):
    def logits(**overrides):
        var_model = VARModel(saved_model, config(stats_path, default=LayerPolicy(kept=0), cache_size=0, **overrides))
        return np.asarray(var_model(ids, var_model.init(len(ids)))[0].logits)

    full, plain = logits(), np.asarray(saved_model(ids).logits)
    loss = np.square(logits(answer_dtype=dtype) - full).mean()
    assert 0 < loss < 1e-2 * np.square(full - plain).mean()


def test_second_step_compiles_nothing_and_policies_share_it(saved_model, stats_path, ids):
    from varjax.model import read_files
    from varjax.table import build

    stats, answers = read_files(saved_model, config(stats_path))

    def step(policy):
        wanted = config(stats_path, default=policy)
        table = build(stats, wanted, 2, answers, keep_shapes=True)
        var_model = VARModel(saved_model, wanted, table=table)
        state = var_model.init(len(ids))
        for _ in range(2):
            _, state = var_model(ids, state)

    step(LayerPolicy(kept=1))
    compiled = routed_forward._cache_size()
    step(LayerPolicy(kept=0))
    step(LayerPolicy(kept=1, residual=False, renormalise=True))
    step(LayerPolicy(kept=None, tolerance=0.1, orders=(0, 2)))
    assert routed_forward._cache_size() == compiled


def test_generation_threads_the_state(saved_model, stats_path, ids):
    model = dataclasses.replace(saved_model, config=dataclasses.replace(saved_model.config, eos_token_id=None))
    nothing = VARModel(model, config(stats_path, frequency_threshold=10**9, cache_size=0))
    plain, _ = model.generate(ids, 8)
    tokens, state = nothing.generate(ids, nothing.init(len(ids)), max_new_tokens=8)
    np.testing.assert_array_equal(tokens, plain)
    # 16 tokens of the prompt and 7 of the 8 new ones went through both layers.
    assert int(state.counters.tokens.sum()) == 2 * len(ids) * (16 + 7)

    var_model = VARModel(model, config(stats_path))
    sampled = [
        var_model.generate(ids, var_model.init(len(ids)), 8, sampling=Sampling(temperature=1.0, seed=1))[0]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*sampled)


def test_decoding_sees_the_same_contexts_as_the_whole_text(saved_model, stats_path, ids):
    """Token by token through the cache, bigram keys included, equals one call."""
    whole = VARModel(saved_model, config(stats_path, cache_size=0, default=LayerPolicy(orders=(1, 2))))
    out, _ = whole(ids, whole.init(len(ids)))
    kv, state = saved_model.empty_cache(len(ids), 16), whole.init(len(ids))
    one = np.ones((len(ids), 1), bool)
    for position in range(16):
        step, state = whole.advance(state, ids[:, position : position + 1], one, kv)
        kv = step.kv
        np.testing.assert_array_equal(step.plan.row[..., 0], out.plan.row[..., position])
        np.testing.assert_allclose(step.logits[:, 0], out.logits[:, position], rtol=1e-4, atol=1e-4)


def test_files_of_another_model_are_refused(saved_model, stats_path):
    other = dataclasses.replace(saved_model, fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"routing_stats\.parquet: fingerprint .* is of another model"):
        VARModel(other, config(stats_path))


def test_a_config_without_statistics_says_so(saved_model):
    with pytest.raises(ValueError, match="routing_stats is not set"):
        VARModel(saved_model, VARConfig())


def test_answers_are_found_beside_the_statistics(stats_path):
    assert config(stats_path).residuals == str(stats_path.with_name("routing_stats.residuals.safetensors"))
