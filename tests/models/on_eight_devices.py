"""What must hold on eight devices; `test_mesh.py` runs this file in a process that has them.

One tiny Mixtral is the measure of every mesh: its logits, the state that VAR makes of them, statistics, parameters.
"""

import dataclasses
import functools
import math
import re
import shutil
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.text.encoding import Encoded
from benchmarks.device_memory import abstract_params, bytes_per_device, compile_decode
from models import Model, MoEConfig, load_model, placement, weights
from models.config import read_config
from models.decoder import forward
from models.experts import _pallas_engine, divided, get_engine
from models.generation import _next
from models.parameters import EXPERT_AXES, init_params, param_shardings, prepare
from models.placement import MeshError, Placement, make_mesh
from models.weights import save_params
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.affine import Maps
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
MESHES = ("data=1,model=8", "data=2,model=4", "data=8,model=1")
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


def with_var(model: Model, collected, cache_size: int = 64) -> VARModel:
    """One expert kept and the answers added where a token or bigram is known; what is confident is remembered."""
    config = VARConfig(
        frequency_threshold=5,
        entropy_threshold=5.0,
        confidence_threshold=0.3,
        context_window_size=2,
        cache_size=cache_size,
        default=LayerPolicy(experts_kept=1, ngram_orders=(1, 2)),
    )
    stats, answers = collected
    return VARModel(model, config, table=build_for(model, config, stats, answers), clock=lambda: 0.0)


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
    tokens, active = np.asarray(var.state.counters.tokens), np.asarray(var.state.counters.active)
    assert (tokens.sum(axis=0) > 0).all()
    assert active.sum() < 0.9 * CONFIG.top_k * tokens.sum()
    assert np.abs(plain.prefill - var.prefill).max() > 1e-2


def test_statistics_and_answers_are_those_of_one_device(load, documents, collected):
    (stats, answers), (alone, answers_alone) = collected_by(load("data=2,model=4"), documents), collected
    for name in ("keys", "count", "top1_counts"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(alone, name))
    np.testing.assert_allclose(stats.entropy.mean, alone.entropy.mean, **CLOSE)
    np.testing.assert_array_equal(answers.count, answers_alone.count)
    np.testing.assert_allclose(answers.mean, answers_alone.mean, rtol=1e-5, atol=1e-5)


# --- what crosses the wire -------------------------------------------------------------------------------------------

_COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def exchanged(compiled: Any) -> dict[str, int]:
    """Numbers that each device gets from exchanges, by their kind."""
    found: dict[str, int] = {}
    for shapes, kind, _ in _COLLECTIVE.findall(compiled.as_text()):
        sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", shapes)]
        found[kind] = found.get(kind, 0) + sum(sizes)
    return found


def random_model(shape: str | None, **fields) -> Model:
    """Of one layer, unless `fields` say otherwise; None: on one device."""
    config, engine = dataclasses.replace(CONFIG, **{"num_layers": 1} | fields), get_engine()
    placement = Placement.of(config, make_mesh(shape) if shape else None)
    params = init_params(config, jax.random.key(0))
    if shape:
        params = jax.device_put(params, param_shardings(config, placement))
    return Model(config, prepare(params, engine), engine, "random", "", placement=placement)


def compiled_forward(model: Model, batch: int = BATCH) -> Any:
    own = {"config": model.config, "engine": model.engine, "placement": model.placement}
    return forward.lower(model.params, jnp.zeros((batch, LENGTH), jnp.int32), **own).compile()


def test_a_layer_exchanges_two_sums_of_its_tokens_and_no_weight():
    ours = BATCH // 2 * LENGTH * CONFIG.hidden_size
    assert exchanged(compiled_forward(random_model("data=2,model=4"))) == {"all-reduce": (1 + 2) * ours}  # 1: embedding


def test_sequences_on_devices_of_their_own_exchange_nothing():
    assert exchanged(compiled_forward(random_model("data=8"))) == {}


def test_a_weight_that_is_brought_together_would_be_seen():
    model = random_model("model=8")
    expert = model.params["experts"][0][0]["gate"]
    bring = jax.jit(model.placement.whole).lower(expert).compile()
    assert exchanged(bring) == {"all-gather": expert.size}


def test_under_a_plan_devices_also_learn_what_was_routed(collected):
    model = random_model("data=2,model=4", num_layers=CONFIG.num_layers)
    var_model = with_var(model, collected, cache_size=0)
    ids, mask = model.check_inputs(np.zeros((BATCH, LENGTH), np.int32))
    arguments = (model.params, var_model.table, var_model.init(BATCH), ids, mask, np.int32(0), var_model.settings)
    found = exchanged(routed_forward.lower(*arguments, kv=None, network=model.network).compile())
    ours = BATCH // 2 * LENGTH * CONFIG.hidden_size
    routing = CONFIG.num_layers * BATCH * LENGTH * (CONFIG.num_experts + 2 * CONFIG.top_k)
    assert found == {"all-reduce": (1 + 2 * CONFIG.num_layers) * ours, "all-gather": routing}


# --- what a mesh divides, and what not -------------------------------------------------------------------------------

FAMILIES = {
    "olmoe": {"query_key_norm": "projection", "clip_qkv": 1.0, "normalize_top_k": False},
    "qwen3_moe": {"query_key_norm": "head", "attention_bias": True, "num_kv_heads": 2},  # 2 heads on 4 devices: whole
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_and_layers_without_experts(texts, family):
    fields = {"family": family, "dense_layers": (1,), "dense_size": 16, **FAMILIES[family]}
    alone, model = random_model(None, **fields), random_model("data=2,model=4", **fields)
    np.testing.assert_allclose(model(texts).logits, alone(texts).logits, **CLOSE)
    over = "model" if family == "olmoe" else None
    assert model.empty_cache(BATCH, LENGTH).keys[0].sharding.spec == PartitionSpec("data", over, None, None)


def test_one_text_on_a_mesh_made_for_several(texts):
    """Every place along `data` runs it, but for the experts of a prefill, whose tokens are divided."""
    alone, model = random_model(None), random_model("data=2,model=4")
    np.testing.assert_array_equal(*(one.generate(texts[:1], 3)[0] for one in (alone, model)))


def test_texts_go_on_as_on_one_device(texts):
    """Several dispatches, with padding on the left; the second one compiles nothing."""
    alone, model = random_model(None), random_model("data=2,model=4")
    mask = np.ones_like(texts)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "tokens_per_dispatch": 3}
    expected = alone.generate(texts, 4, **options)[0]
    np.testing.assert_array_equal(model.generate(texts, 4, **options)[0], expected)
    compiled = _next._cache_size()
    longer = model.generate(texts, 10, **options)[0]
    assert _next._cache_size() == compiled
    np.testing.assert_array_equal(longer[:, : expected.shape[1]], expected)


def test_gradients_are_those_of_one_device(texts):
    """Of the engine alone: in the tokens, their weights and the experts."""
    rng = np.random.default_rng(2)
    alone, model = random_model(None), random_model("data=2,model=4")
    x = jnp.asarray(rng.normal(size=(24, CONFIG.hidden_size)), jnp.float32)
    experts = jnp.asarray(rng.integers(0, CONFIG.num_experts + 1, (24, 2)), jnp.int32)
    weights = jnp.asarray(rng.random((24, 2)), jnp.float32)

    def gradients(model: Model) -> Any:
        engine = divided(model.engine, model.placement, CONFIG.num_experts, EXPERT_AXES)

        def objective(x, weights, params):
            return (engine.apply(x, Routing(experts, weights), params) * x[::-1]).sum()

        return jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(x, weights, model.params["experts"][0])

    ours, theirs = gradients(model), gradients(alone)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), ours, theirs)


def test_stacked_weights_are_divided_too():
    """The engine for GPUs, interpreted."""
    rng, engine = np.random.default_rng(3), _pallas_engine(interpret=True)
    placement, params = random_model("data=2,model=4").placement, init_params(CONFIG, jax.random.key(0))
    layer = jax.device_put(params, param_shardings(CONFIG, placement))["experts"][0]
    several = divided(engine, placement, CONFIG.num_experts, EXPERT_AXES)
    x = jnp.asarray(rng.normal(size=(6, CONFIG.hidden_size)), jnp.float32)
    experts = jnp.asarray(rng.integers(0, CONFIG.num_experts + 1, (6, 2)), jnp.int32)
    routing = Routing(experts, jnp.asarray(rng.random((6, 2)), jnp.float32))
    stacked = several.prepare(layer)
    assert stacked["down"].sharding.shard_shape(stacked["down"].shape)[1] == CONFIG.intermediate_size // 4
    alone = get_engine("reference")
    expected = alone.apply(x, routing, alone.prepare(params["experts"][0]))
    np.testing.assert_allclose(jax.jit(several.apply)(x, routing, stacked), expected, **CLOSE)


def test_slots_and_audits(texts):
    """The outputs of slots and the audit of some tokens, padding among the texts."""
    mask = np.arange(LENGTH) < np.arange(5, 5 + BATCH)[:, None]
    found = []
    for model in (random_model(None), random_model("data=2,model=4")):
        ids, real = model.check_inputs(texts[:, :LENGTH], mask)
        audit = jnp.array([3, 40, -1], jnp.int32)
        out = model.network.forward(model.params, ids, attention_mask=real, recorded_layers=(0,), audit=audit)
        found.append((out.recorded, out.routing, out.audit))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **CLOSE), *found)


@pytest.fixture(scope="module")
def affine(collected) -> tuple:
    """The statistics and answers of one device, with maps of rank 3."""
    (stats, answers), rng = collected, np.random.default_rng(4)
    layers, experts, width, rank = CONFIG.num_layers, CONFIG.num_experts, CONFIG.hidden_size, 3
    maps = Maps(
        read=rng.normal(size=(layers, width, rank)).astype(np.float32),
        mix=rng.normal(0, 0.05, (layers, experts, rank, rank)).astype(np.float32),
        write=np.stack([np.linalg.qr(rng.normal(size=(width, rank)))[0].T for _ in range(layers)]).astype(np.float32),
        unexplained=np.full((layers, experts), 0.5),
    )
    inputs = rng.normal(size=answers.mean.shape).astype(np.float32)
    return stats, dataclasses.replace(answers, inputs=inputs, maps=maps)


@pytest.mark.parametrize("divided_answers", [False, True])
def test_affine_answers_are_those_of_one_device(
    load, alone, texts, collected, affine, runs_alone, divided_answers, monkeypatch
):
    """The maps are whole on every device, also next to answers of which a device has a part."""
    if divided_answers:
        monkeypatch.setattr(placement, "REPLICATED_ANSWERS", 100)
    model = load("data=2,model=4")
    var_model, constant = with_var(model, affine), with_var(model, collected)
    known = var_model.table.answers[0]
    assert known.answers.sharding.is_fully_replicated != divided_answers
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(known.affine))
    found, expected = run(model, texts, var_model), run(alone, texts, with_var(alone, affine))
    np.testing.assert_allclose(found.prefill, expected.prefill, **CLOSE)
    np.testing.assert_allclose(found.decode, expected.decode, **CLOSE)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **CLOSE), found.state, expected.state)
    assert np.abs(expected.prefill - runs_alone[1].prefill).max() > 1e-3  # the maps do something
    ids, mask = model.check_inputs(texts[:, :LENGTH])
    sums = []
    for one in (constant, var_model):
        arguments = (model.params, one.table, one.init(BATCH), ids, mask, np.int32(0), one.settings)
        sums.append(exchanged(routed_forward.lower(*arguments, kv=None, network=model.network).compile()))
    assert sums[0] == sums[1]


def test_a_large_table_is_divided(load, texts, collected, runs_alone, monkeypatch):
    monkeypatch.setattr(placement, "REPLICATED_ANSWERS", 100)
    model = load("data=2,model=4")
    var_model = with_var(model, collected)
    answers = var_model.table.answers[0].answers
    assert answers.sharding.shard_shape(answers.shape) == (len(answers), CONFIG.hidden_size // 4)
    ids, mask = model.check_inputs(texts[:, :LENGTH])
    out, _ = var_model.advance(var_model.init(BATCH), ids, mask, model.empty_cache(*texts.shape))
    np.testing.assert_allclose(out.logits, runs_alone[1].prefill, **CLOSE)


def test_what_cannot_be_divided_is_refused():
    config = dataclasses.replace(CONFIG, num_heads=6, num_kv_heads=3, intermediate_size=20)
    with pytest.raises(MeshError, match=r"model=4 does not divide num_heads=6 of this model; give it a divisor of 2"):
        Placement.of(config, make_mesh("data=2,model=4"))
    with pytest.raises(MeshError, match=r"data=4,model=4' needs 16 devices, there are 8"):
        make_mesh("data=4,model=4")


@pytest.mark.parametrize("shape", ["", "model=0", "data=2,data=4", "data=2;model=4", "pipeline=2"])
def test_what_is_no_mesh_is_refused(shape):
    with pytest.raises(MeshError, match=r"expected something like data=2,model=4"):
        make_mesh(shape)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_each_device_gets_its_slices_and_only_these_are_read(directory, alone, monkeypatch):
    whole, read = [], []

    class Slices:
        """What `safe_open` gives, noting what is asked of it."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            whole.append(name) if name == "get_tensor" else None
            return getattr(self.file, name)

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    class Slice(Slices):
        def __getitem__(self, index):
            part = self.file[index]
            if isinstance(index, tuple):  # of a device; the fingerprint is taken in blocks of rows
                read.append(part.size)
            return part

    opened = weights._open

    @contextmanager
    def noting(file):
        with opened(file) as tensors:
            yield Slices(tensors)

    monkeypatch.setattr(weights, "_open", noting)
    model = load_model(directory, mesh=make_mesh("data=2,model=4"))
    leaves = jax.tree.leaves(model.params)
    parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    times = [1 if leaf.is_fully_replicated else 8 for leaf in leaves]
    assert sorted(read) == sorted(part for part, number in zip(parts, times, strict=True) for _ in range(number))
    assert not whole
    assert sum(parts) < 0.3 * sum(leaf.size for leaf in leaves)
    assert model.fingerprint == alone.fingerprint
    jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)


def test_stacked_experts_are_read_slice_by_slice_too(directory, alone, tmp_path):
    tensors = load_file(directory / "model.safetensors")
    for layer in range(CONFIG.num_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            np.stack([tensors.pop(f"{prefix}.{expert}.{name}.weight") for expert in range(CONFIG.num_experts)])
            for name in ("w1", "w2", "w3")
        )
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    model = load_model(tmp_path, mesh=make_mesh("data=2,model=4"))
    assert model.fingerprint == alone.fingerprint
    jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)


# --- real sizes ------------------------------------------------------------------------------------------------------


def test_mixtral_on_eight_devices_has_an_eighth_on_each(shared_data):
    """By its shapes, and as XLA compiled a step of decoding; through 2 layers of the 32, which are all alike."""
    config = read_config(shared_data / "mixtral" / "config.json")
    placement = Placement.of(config, make_mesh("model=8"))
    parameters = abstract_params(config, placement, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 46_702_792_704
    whole = sum(2 * leaf.size for leaf in jax.tree.leaves(parameters) if leaf.sharding.is_fully_replicated)
    expected = 46_702_792_704 * 2 / 8 + whole
    assert bytes_per_device(parameters) == pytest.approx(expected, rel=0.05)

    config = dataclasses.replace(config, num_layers=2)
    compiled = compile_decode(config, placement, jnp.bfloat16, batch=1, capacity=128)
    expected = bytes_per_device(abstract_params(config, placement, jnp.bfloat16))
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(expected, rel=0.01)
    sums = 1 + 2 * config.depth  # the embedding, and attention and experts of each layer
    assert exchanged(compiled) == {"all-reduce": sums * config.hidden_size, "all-gather": config.vocab_size}
