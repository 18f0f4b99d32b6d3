"""VARModel on a tiny checkpoint: off is plain, on saves experts, nothing recompiles, foreign files are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varjax
from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from models import Sampling
from models.generation import GenerationDefaults
from varjax import LayerPolicy, VARConfig, VARModel, answersfile, build_table, load_table, statsfile
from varjax.affine import AffineMap
from varjax.errors import InputError
from varjax.model import load_statistics, routed_forward
from varjax.routing import CACHED
from varjax.tablefiles import TableFiles, answers_next_to

READING = {"batch_size": 4, "max_length": 16, "progress": False}
ANYTHING = 5.0  # nats, more than any entropy
CACHE_ONLY = LayerPolicy(experts_kept=1, frequency_threshold=10**9)  # no key is that frequent


@pytest.fixture(scope="module")
def stats_path(tmp_path_factory, saved_model, documents):
    """Statistics of orders 1 and 2 with the answers beside them."""
    path = tmp_path_factory.mktemp("phase1") / "routing_stats.parquet"
    keys = choose_keys(saved_model, documents, 16, KeySettings(orders=(1, 2), min_count=3))
    stats = collect(saved_model, documents, keys, **READING)
    answers = collect_answers(saved_model, documents, stats.keys, (0, 1), **READING)
    meta = {"fingerprint": saved_model.fingerprint, "model": "tiny"}
    statsfile.write(path, stats, meta)
    meta |= {"statistics": statsfile.identity(path)}
    answersfile.write(path.with_name("routing_stats.answers.safetensors"), answers, meta)
    return path


def config(stats_path, **overrides) -> VARConfig:
    """Every key of three occurrences answers; one expert kept, the other's answer added."""
    return VARConfig.from_routing_stats(
        stats_path, **({"frequency_threshold": 3, "entropy_threshold": ANYTHING} | overrides)
    )


def under_var(model, stats_path, wanted=None, **options) -> VARModel:
    wanted = wanted or config(stats_path)
    return VARModel(model, wanted, load_table(model, wanted, stats_path), **options)


@pytest.fixture
def ids(documents):
    return np.stack([document.ids[:16] for document in documents if len(document.ids) >= 16][:4])


@pytest.mark.optimized
def test_switched_off_is_bit_identical_to_the_plain_model(saved_model, ids):
    var_model = VARModel(saved_model, VARConfig(enable_var=False))
    out, state = var_model(ids, var_model.init())
    plain = saved_model(ids)
    assert state is None and out.plan is None
    np.testing.assert_array_equal(out.logits, plain.logits)
    np.testing.assert_array_equal(out.router_probs, plain.router_probs)
    np.testing.assert_array_equal(var_model.generate(ids, None, 8)[0], saved_model.generate(ids, 8)[0])


def test_disabled_is_the_plain_model_and_hands_the_state_on(saved_model, stats_path, ids):
    """Off in the middle of a text: the plain model's logits and tokens; on again: the plans of the whole text."""
    wanted = config(stats_path, default=LayerPolicy(ngram_orders=(1, 2)), cache_size=0)
    on = under_var(saved_model, stats_path, wanted)
    off = on.disabled()
    assert off.init() is None and off.model is saved_model and on.table is not None

    out, state = off(ids, on.init(len(ids)))
    plain = saved_model(ids)
    np.testing.assert_array_equal(out.logits, plain.logits)
    np.testing.assert_array_equal(out.router_probs, plain.router_probs)
    tokens, state = off.generate(ids, state, 8)
    np.testing.assert_array_equal(tokens, saved_model.generate(ids, 8)[0])
    assert not np.asarray(state.counters.tokens).any()

    whole, _ = on(ids, on.init(len(ids)))
    out, state = on.prefill(ids[:, :5], state, capacity=16)
    rows, one = [whole.plan.row[..., :5]], np.ones((len(ids), 1), bool)
    for position in range(5, 16):
        model = off if position in (6, 7, 8) else on
        out, state = model.advance(state, ids[:, position : position + 1], one, out.kv)
        rows.append(whole.plan.row[..., position : position + 1] if model is off else out.plan.row)
    np.testing.assert_array_equal(np.concatenate(rows, axis=-1), whole.plan.row)
    assert int(np.asarray(state.counters.tokens).sum()) == 2 * len(ids) * 13


def test_a_forgotten_state_is_no_switch(saved_model, stats_path, ids):
    var_model = under_var(saved_model, stats_path)
    calls = (
        lambda: var_model(ids, None),
        lambda: var_model.prefill(ids, None, capacity=20),
        lambda: var_model.generate(ids, None, 8),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"VAR is on but state is None; begin with var_model\.init\(batch_size\)"):
            call()


def test_a_prefill_of_texts_that_end_in_padding_is_refused(saved_model, stats_path, ids):
    var_model, mask = under_var(saved_model, stats_path), np.ones(ids.shape)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="ends in padding; pad on the left"):
        var_model.prefill(ids, var_model.init(len(ids)), 20, attention_mask=mask)


@pytest.mark.parametrize("new", [-100, 0, 2.5, True])
def test_a_number_of_tokens_that_cannot_be_leaves_the_state_as_it_was(saved_model, stats_path, ids, new):
    var_model = under_var(saved_model, stats_path)
    state = var_model.init(len(ids))
    with pytest.raises(InputError, match=rf"max_new_tokens={new}; expected an integer of at least 1"):
        var_model.generate(ids, state, new)
    with pytest.raises(InputError, match=r"input_ids holds .* to 300"):
        var_model.generate(ids + 300 - ids.max(), state, 2)
    assert var_model.generate(ids, state, 2)[0].shape == (len(ids), ids.shape[1] + 2)


@pytest.mark.parametrize("batch", [0, -1, 1.5, None])
def test_a_batch_of_no_texts_is_refused(saved_model, stats_path, batch):
    with pytest.raises(InputError, match=rf"batch_size={batch}; expected an integer of at least 1"):
        under_var(saved_model, stats_path).init(batch)


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [(15, ": expected at least the 16 positions"), (-1, "; expected an integer"), (20.5, "; expected an integer")],
)
def test_a_cache_that_the_texts_do_not_fit_is_refused(saved_model, stats_path, ids, capacity, expected):
    var_model = under_var(saved_model, stats_path)
    with pytest.raises(InputError, match=f"capacity={capacity}{expected}"):
        var_model.prefill(ids, var_model.init(len(ids)), capacity)


def test_nothing_planned_equals_the_plain_model(saved_model, stats_path, ids):
    nothing = config(stats_path, frequency_threshold=10**9, confidence_threshold=1.0)
    var_model = under_var(saved_model, stats_path, nothing)
    out, state = var_model(ids, var_model.init(len(ids)))
    # Another program, so equal to rounding; the routing is the same function of the same probabilities.
    np.testing.assert_allclose(out.logits, saved_model(ids).logits, rtol=1e-4, atol=1e-5)
    assert "100.0%" in var_model.summary(state)


def test_planned_tokens_run_fewer_experts_and_answers_help(saved_model, stats_path, ids):
    plain = saved_model(ids).logits
    error, experts = {}, {}
    for name, policy in {
        "look-up only": LayerPolicy(experts_kept=0),
        "one": LayerPolicy(experts_kept=1),
        "one, nothing added": LayerPolicy(experts_kept=1, use_answers=False),
        "one of every token": LayerPolicy(experts_kept=1, ngram_orders=(0,)),
        "tolerant": LayerPolicy(experts_kept=None, tolerance=1e9),
        "strict": LayerPolicy(experts_kept=None, tolerance=1e-9),
    }.items():
        var_model = under_var(saved_model, stats_path, config(stats_path, default=policy, cache_size=0))
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
        var_model = under_var(
            saved_model, stats_path, config(stats_path, default=LayerPolicy(experts_kept=0), cache_size=0, **overrides)
        )
        return np.asarray(var_model(ids, var_model.init(len(ids)))[0].logits)

    full, plain = logits(), np.asarray(saved_model(ids).logits)
    loss = np.square(logits(answer_dtype=dtype) - full).mean()
    assert 0 < loss < 1e-2 * np.square(full - plain).mean()


def test_second_step_compiles_nothing_and_policies_share_it(saved_model, stats_path, ids):
    stats, answers = load_statistics(saved_model, TableFiles.find(stats_path))

    def step(policy):
        wanted = config(stats_path, default=policy)
        table = build_table(wanted, stats, answers, top_k=2, keep_shapes=True)
        var_model = VARModel(saved_model, wanted, table=table)
        state = var_model.init(len(ids))
        for _ in range(2):
            _, state = var_model(ids, state)

    step(LayerPolicy(experts_kept=1))
    compiled = routed_forward._cache_size()
    step(LayerPolicy(experts_kept=0))
    step(LayerPolicy(experts_kept=1, use_answers=False, renormalize=True))
    step(LayerPolicy(experts_kept=None, tolerance=0.1, ngram_orders=(0, 2)))
    assert routed_forward._cache_size() == compiled


def test_generation_threads_the_state(saved_model, stats_path, ids):
    model = dataclasses.replace(saved_model, generation_defaults=GenerationDefaults(None, (), None))  # no text ends
    nothing = under_var(model, stats_path, config(stats_path, frequency_threshold=10**9, cache_size=0))
    plain, _ = model.generate(ids, 8)
    tokens, state = nothing.generate(ids, nothing.init(len(ids)), max_new_tokens=8)
    np.testing.assert_array_equal(tokens, plain)
    # 16 tokens of the prompt and 7 of the 8 new ones went through both layers.
    assert int(np.asarray(state.counters.tokens).sum()) == 2 * len(ids) * (16 + 7)

    var_model = under_var(model, stats_path)
    sampled = [
        var_model.generate(ids, var_model.init(len(ids)), 8, sampling=Sampling(temperature=1.0, seed=1))[0]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*sampled)


def test_texts_of_different_lengths_go_on_as_each_alone_under_var(saved_model, stats_path, documents):
    """Without the cached tier, which the texts share. What ran and was counted is the same, too."""
    wanted = config(stats_path, cache_size=0, default=LayerPolicy(ngram_orders=(1, 2)))
    ids, mask = np.zeros((2, 3, 11), np.int32)
    texts = [document.ids[:length] for document, length in zip(documents, (11, 3, 7), strict=False)]
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1

    def ending(end_ids):
        defaults = GenerationDefaults(None, end_ids, None)
        var_model = under_var(dataclasses.replace(saved_model, generation_defaults=defaults), stats_path, wanted)
        return var_model, *var_model.generate(ids, var_model.init(3), 12, attention_mask=mask)

    endless = ending(())[1]
    var_model, together, state = ending((int(endless[0, 13]), int(endless[2, 17])))
    counted, lengths = np.zeros((2, 3), int), set()
    for row, text in enumerate(texts):
        alone, own = var_model.generate(text[None], var_model.init(1), 12)
        new = alone[0, len(text) :]
        np.testing.assert_array_equal(together[row, 11 : 11 + len(new)], new)
        counted = counted + np.asarray(own.counters.tokens)
        lengths.add(len(new))
    np.testing.assert_array_equal(state.counters.tokens, counted)
    assert len(lengths) > 1  # some ended early


@pytest.mark.parametrize("cache_size", [0, 64])
def test_tokens_of_one_dispatch_are_those_of_one_dispatch_each(saved_model, stats_path, ids, cache_size):
    """With left padding, and texts that end early. The final state is the same as well."""
    mask = np.ones_like(ids)
    mask[0, :5] = 0

    def written(end_ids, several):
        defaults, times = GenerationDefaults(None, end_ids, None), iter(np.arange(0, 900, 0.3))
        model = dataclasses.replace(saved_model, generation_defaults=defaults)
        wanted = config(stats_path, cache_size=cache_size, cache_ttl_seconds=1.0)  # four steps
        var_model = under_var(model, stats_path, wanted)
        options = {"attention_mask": mask, "clock": lambda: next(times), "tokens_per_dispatch": several}
        return var_model.generate(ids, var_model.init(len(ids)), 20, **options)

    endless, _ = written((), 16)
    ends = tuple({int(endless[0, ids.shape[1] + 3]), int(endless[1, ids.shape[1] + 9])})
    (one, state), (many, behind) = (written(ends, several) for several in (1, 16))
    np.testing.assert_array_equal(one, many)
    assert one.shape[1] <= endless.shape[1] and (one != endless[:, : one.shape[1]]).any()
    jax.tree.map(np.testing.assert_array_equal, state, behind)


def test_the_second_step_of_decoding_compiles_nothing(saved_model, stats_path, ids):
    for size in (0, 64):
        var_model = under_var(saved_model, stats_path, config(stats_path, cache_size=size))
        out, state = var_model.prefill(ids, var_model.init(len(ids)), capacity=20)
        compiled = None
        for position in range(4):
            token = ids[:, position : position + 1]
            out, state = var_model.advance(state, token, np.ones(token.shape, bool), out.kv, last_logits_only=True)
            assert compiled in (None, routed_forward._cache_size())
            compiled = routed_forward._cache_size()


def test_a_report_is_the_summary_as_json(saved_model, stats_path, ids):
    var_model = under_var(saved_model, stats_path, config(stats_path, layers={1: CACHE_ONLY}, confidence_threshold=0.3))
    state = var_model.init(len(ids))
    for _ in range(2):
        _, state = var_model(ids, state)
    report = var_model.report(state)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["enabled"] and report["tokens"] == 2 * 2 * ids.size and len(report["layers"]) == 2
    contexts = {tuple(row[at - 3 : at + 1]) for row in ids.tolist() for at in range(3, 16)}
    assert 0 < report["cache"]["held"] <= len(contexts) and report["cache"]["size"] == 1000
    for name in ("fast", "cached", "learned"):
        assert report["tiers"][name] > 0
        assert f"{report['layers'][1]['tiers'][name]:.1%}" in var_model.summary(state).splitlines()[2]
    off = var_model.disabled()
    assert off.report(None) == {"enabled": False} and "switched off" in off.summary(None)
    assert off.report(state) == report | {"enabled": False}


def test_a_saved_state_belongs_to_its_model_and_goes_on(saved_model, stats_path, ids, tmp_path):
    wanted = config(stats_path, layers={1: CACHE_ONLY}, confidence_threshold=0.3)
    clock = [0.0]
    var_model = under_var(saved_model, stats_path, wanted, clock=lambda: clock[0])
    _, state = var_model(ids, var_model.init(len(ids)))
    var_model.save(tmp_path, state)
    out, state = var_model(ids, state)
    assert (np.asarray(out.plan.tier) == CACHED).any()

    clock[0] = 1e6  # another process starts much later, and nothing has aged
    again = VARModel(saved_model, wanted, table=var_model.table, clock=lambda: clock[0])
    loaded, loaded_state = again(ids, again.load(tmp_path))
    np.testing.assert_array_equal(loaded.plan.tier, out.plan.tier)
    np.testing.assert_array_equal(loaded.logits, out.logits)
    assert again.report(loaded_state) == var_model.report(state)

    other = VARModel(dataclasses.replace(saved_model, fingerprint="0" * 64), wanted, table=var_model.table)
    with pytest.raises(ValueError, match=r"fingerprint is .* begin with a new state"):
        other.load(tmp_path)
    with pytest.raises(ValueError, match=r"cache_size is 1000 \(here 8\)"):
        VARModel(saved_model, dataclasses.replace(wanted, cache_size=8), table=var_model.table).load(tmp_path)
    with pytest.raises(ValueError, match="VAR is switched off"):
        var_model.disabled().load(tmp_path)
    with pytest.raises(InputError, match=r"a cache for each sequence \(shared_cache=False\)"):
        var_model.save(tmp_path / "own", var_model.init(2, shared_cache=False))
    assert not (tmp_path / "own").exists()


def test_decoding_sees_the_same_contexts_as_the_whole_text(saved_model, stats_path, ids):
    """Token by token through the cache, bigram keys included, equals one call."""
    whole = under_var(
        saved_model, stats_path, config(stats_path, cache_size=0, default=LayerPolicy(ngram_orders=(1, 2)))
    )
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
        under_var(other, stats_path)


def test_a_table_of_another_model_is_refused(saved_model, stats_path):
    wanted = config(stats_path)
    table = load_table(saved_model, wanted, stats_path)
    for changes in ({"num_layers": 3}, {"num_experts": 9}, {"top_k": 1}):
        other = dataclasses.replace(saved_model, config=dataclasses.replace(saved_model.config, **changes))
        with pytest.raises(ValueError, match=r"the table has \(layers, .*\) \(2, .*, the model \(.*; build"):
            VARModel(other, wanted, table=table)


def test_a_table_of_another_hidden_size_is_refused(small_var_model):
    """By its answers or by their maps, whose layer is named."""
    model, config, table = small_var_model.model, small_var_model.config, small_var_model.table

    def refused(said, **changes):
        answers = (table.answers[0], dataclasses.replace(table.answers[1], **changes))
        with pytest.raises(InputError, match=said):
            VARModel(model, config, dataclasses.replace(table, answers=answers))

    wide = np.zeros((len(table.answers[1].answers), 30), np.float32)
    refused(r"in layer 1, answers 30 numbers, but the model's hidden size is 24; build it", answers=wide)
    center, mix = np.zeros((len(wide), 5)), np.zeros((5, 4, 5))
    for read, write, said in ((26, 24, "maps that read 26 numbers"), (24, 25, "maps that write 25 numbers")):
        maps = AffineMap(np.zeros((read, 5)), mix, np.zeros((5, write)), center, np.zeros(4))
        refused(f"in layer 1, {said}, but", affine=maps)


def test_a_missing_table_says_how_to_make_one(saved_model):
    with pytest.raises(InputError, match=r"VAR is on, but there is no table; make one with varjax\.load_table\("):
        VARModel(saved_model, VARConfig())
    with pytest.raises(InputError, match=r"table='stats\.parquet': expected a RouteTable; make one with .*load_table"):
        VARModel(saved_model, VARConfig(), "stats.parquet")


def test_a_plan_carries_the_answers_of_its_table(saved_model, stats_path, ids):
    var_model = under_var(
        saved_model, stats_path, config(stats_path, cache_size=0, default=LayerPolicy(experts_kept=0))
    )
    table, token_ids = var_model.table, jnp.asarray(ids)
    plan = varjax.plan(table, var_model.init(len(ids)), token_ids, 0.0, var_model.settings)
    assert all(ours.answers is theirs.answers for ours, theirs in zip(plan.answers, table.answers, strict=True))
    out = saved_model.network.forward(saved_model.params, token_ids, plan=plan)
    expected, _ = var_model(ids, var_model.init(len(ids)))
    np.testing.assert_array_equal(out.routing.experts, expected.routing.experts)
    assert (np.asarray(out.routing.experts) == saved_model.config.num_experts).any()
    again = saved_model.network.forward(saved_model.params, token_ids, plan=expected.plan)
    np.testing.assert_array_equal(again.logits, out.logits)


def test_states_and_caches_stay_valid_unless_they_are_given_up(saved_model, stats_path, ids):
    var_model, mask = under_var(saved_model, stats_path), np.ones((len(ids), 1), bool)

    def deleted(*trees):
        return [leaf.is_deleted() for leaf in jax.tree.leaves(trees)]

    start = var_model.init(len(ids))
    var_model(ids, start)
    first, state = var_model.prefill(ids, start, capacity=18)
    step = (state, ids[:, -1:], mask, first.kv, True)
    out, behind = var_model.advance(*step, now=0.0)
    var_model.generate(ids, start, 2)
    assert not any(deleted(start, state, first.kv))
    again, same = var_model.advance(*step, now=0.0, donate=True)
    np.testing.assert_array_equal(again.logits, out.logits)
    jax.tree.map(np.testing.assert_array_equal, same, behind)
    assert all(deleted(state, first.kv))
    var_model(ids, start, donate=True)
    assert any(deleted(start))


def test_a_digest_names_settings_and_files(saved_model, stats_path):
    var_model = under_var(saved_model, stats_path)
    assert var_model.digest == config(stats_path).digest(TableFiles.find(stats_path).digest())
    assert var_model.digest != under_var(saved_model, stats_path, config(stats_path, cache_size=3)).digest


def test_answers_of_other_statistics_build_no_table(saved_model, documents, stats_path, tmp_path):
    keys = choose_keys(saved_model, documents, 16, KeySettings(orders=(1, 2), min_count=3))
    other = tmp_path / "other.parquet"
    fewer = collect(saved_model, documents[:40], keys, **READING)
    statsfile.write(other, fewer, {"fingerprint": saved_model.fingerprint})
    with pytest.raises(ValueError, match=r"answers\.safetensors: these answers belong to other statistics"):
        load_table(saved_model, config(stats_path), other, answers_next_to(stats_path))
