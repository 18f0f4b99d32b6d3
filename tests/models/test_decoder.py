"""The decoder against itself (cache, padding, open plan) and, under a plan, against slow NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import with_methods
from models.parameters import init_params
from varjax.routing import CACHED, FAST, LEARNED, NO_ANSWER, NO_ROW, LayerAnswers, LayerRules, Plan, Routing

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("window", [None, 4])
def test_prefill_and_decode_equal_the_whole_forward(make_model, padded_texts, window):
    check_pieces(make_model(sliding_window=window), padded_texts)


def test_prefill_and_decode_equal_the_whole_forward_in_other_families(make_model, padded_texts, family_fields):
    check_pieces(make_model(**family_fields), padded_texts)


def check_pieces(model, padded_texts) -> None:
    ids, mask = padded_texts("left")
    whole = model(ids, mask)
    kv = model.empty_cache(*ids.shape)
    parts, start = [], 0
    for length in (6, 1, 1, 1, 1, 1):
        piece = slice(start, start + length)
        out = model.network.forward(model.params, jnp.asarray(ids[:, piece]), attention_mask=mask[:, piece], kv=kv)
        parts.append(out)
        kv, start = out.kv, start + length
    real = mask.astype(bool)
    logits = jnp.concatenate([out.logits for out in parts], axis=1)
    probs = jnp.concatenate([out.router_probs for out in parts], axis=2)
    np.testing.assert_allclose(logits[real], whole.logits[real], **CLOSE)
    np.testing.assert_allclose(probs[:, real], whole.router_probs[:, real], **CLOSE)
    assert int(kv.length) == ids.shape[1]
    np.testing.assert_array_equal(kv.mask, real)


def test_last_logits_only_computes_the_same_last_logits(tiny_model, padded_texts):
    ids, mask = padded_texts("left")
    last = tiny_model.network.forward(tiny_model.params, jnp.asarray(ids), attention_mask=mask, last_logits_only=True)
    assert last.logits.shape == (3, 1, tiny_model.config.vocab_size)
    np.testing.assert_allclose(last.logits[:, 0], tiny_model(ids, mask).logits[:, -1], **CLOSE)


def test_padding_changes_nothing_and_runs_nothing(tiny_model, padded_texts):
    ids, mask = padded_texts("left")
    text = ids[1][mask[1] == 1]
    alone = tiny_model(text[None])
    for side in ("left", "right"):
        ids, mask = padded_texts(side)
        ids = np.where(mask == 1, ids, 7)  # whatever ids the padding has
        together, real = tiny_model(ids, mask), mask == 1
        np.testing.assert_allclose(together.logits[1, real[1]], alone.logits[0], **CLOSE)
        np.testing.assert_allclose(together.router_probs[:, 1, real[1]], alone.router_probs[:, 0], **CLOSE)
        np.testing.assert_array_equal(together.routing.experts[:, 1, real[1]], alone.routing.experts[:, 0])
        np.testing.assert_array_equal(together.routing.experts[:, ~real], tiny_model.config.num_experts)
        np.testing.assert_array_equal(together.routing.weights[:, ~real], 0)


@pytest.mark.optimized
def test_an_open_plan_is_the_plain_model_bit_for_bit(tiny_model, padded_texts):
    check_open_plan(tiny_model, padded_texts)


@pytest.mark.optimized
def test_an_open_plan_is_the_plain_model_bit_for_bit_in_other_families(make_model, padded_texts, family_fields):
    check_open_plan(make_model(**family_fields), padded_texts)


def check_open_plan(model, padded_texts) -> None:
    ids, mask = padded_texts("left")
    forward = functools.partial(model.network.forward, model.params, jnp.asarray(ids), attention_mask=mask)
    plain, opened = forward(), forward(plan=open_plan(model, ids))
    jax.tree.map(np.testing.assert_array_equal, plain, opened)


def open_plan(model, ids) -> Plan:
    config = model.config
    return Plan.open(config.num_layers, *ids.shape, config.top_k, config.num_experts)


def test_routing_is_numbered_over_the_layers_with_experts(make_model, family_fields):
    model = make_model(**family_fields)
    config, ids = model.config, np.arange(6)[None]
    assert (config.depth, config.num_layers, len(model.params["experts"])) == (3, 2, 2)
    plain = model(ids)
    assert plain.router_probs.shape == (2, 1, 6, config.num_experts)
    last = jnp.array([False, True])[:, None, None]
    opened = open_plan(model, ids)
    emptied = dataclasses.replace(
        opened, tier=jnp.where(last, FAST, opened.tier), experts_kept=jnp.where(last, 0, opened.experts_kept)
    )
    emptied = model.network.forward(model.params, jnp.asarray(ids), plan=emptied)
    np.testing.assert_array_equal(emptied.routing.experts[0], plain.routing.experts[0])
    np.testing.assert_array_equal(emptied.routing.experts[1], config.num_experts)
    place = config.expert_layers[1]  # without its experts the layer is its attention only
    silent = jax.tree.map(lambda leaf: leaf, model.params)
    silent["experts"][1] = jax.tree.map(jnp.zeros_like, silent["experts"][1])
    assert place not in config.dense_layers
    np.testing.assert_allclose(emptied.logits, model.network.forward(silent, jnp.asarray(ids)).logits, **CLOSE)


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_and_the_audit_follow_the_gate_divided_or_not(make_model, normalize):
    model = make_model(normalize_top_k=normalize)
    ids = jnp.arange(6)[None]
    out = model.network.forward(model.params, ids, plan=open_plan(model, ids), audit=jnp.arange(6))
    best = -np.sort(-np.asarray(out.router_probs), axis=-1)[..., : model.config.top_k]
    expected = best / best.sum(-1, keepdims=True) if normalize else best
    np.testing.assert_allclose(out.routing.weights, expected, rtol=1e-6)
    np.testing.assert_allclose(out.audit, 0, atol=1e-5)


# --- under a plan ----------------------------------------------------------------------------------------------------

ROWS, ANSWERS = 5, 11


@pytest.fixture(scope="module")
def planned(make_model, padded_texts):
    """A model of 3 layers, each with rules of its own, a random plan and answers; ids without padding."""
    model = make_model(num_layers=3)
    config = model.config
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (2, 9), dtype=np.int32)
    shape = (config.num_layers, *ids.shape)
    experts = np.argsort(rng.random((*shape, config.num_experts)))[..., : config.top_k]
    plan = Plan(
        tier=jnp.asarray(rng.choice([FAST, CACHED, LEARNED], shape), jnp.int8),
        experts_kept=jnp.asarray(rng.integers(0, config.top_k + 1, shape), jnp.int8),
        row=jnp.asarray(rng.integers(NO_ROW, ROWS, shape), jnp.int32),
        routing=Routing(
            jnp.asarray(experts, jnp.int32), jnp.asarray(rng.dirichlet(np.ones(config.top_k), shape), jnp.float32)
        ),
        rules=LayerRules(
            gate_ratio=jnp.array([0.0, 0.8, 0.0], jnp.float32),
            gate_mass=jnp.array([jnp.inf, jnp.inf, 0.6], jnp.float32),
            tolerance=jnp.array([0.4, 0.0, 0.0], jnp.float32),
            use_answers=jnp.array([True, True, False]),
            renormalize=jnp.zeros(3, bool),
            choice_from_table=jnp.array([False, False, True]),
            weights_from_table=jnp.array([False, False, True]),
        ),
    )
    answers = tuple(
        LayerAnswers(
            entry=jnp.asarray(rng.integers(NO_ANSWER, ANSWERS, (ROWS, config.num_experts)), jnp.int32),
            deviation=jnp.asarray(rng.random(ANSWERS), jnp.float32),
            answers=jnp.asarray(rng.normal(size=(ANSWERS, config.hidden_size)), jnp.float32),
            scale=None,
        )
        for _ in range(3)
    )
    return model, ids, plan, answers


def test_a_plan_does_what_it_says(planned):
    model, ids, plan, answers = planned
    wanted = (0, 2)
    out = model.network.forward(
        model.params, jnp.asarray(ids), plan=dataclasses.replace(plan, answers=answers), recorded_layers=wanted
    )
    for row in range(len(ids)):
        of_row = jax.tree.map(lambda leaf, row=row: leaf[:, row] if leaf.ndim > 1 else leaf, plan)
        logits, experts, weights, slots = slow_forward(model, ids[row], of_row, answers)
        np.testing.assert_array_equal(out.routing.experts[:, row], experts)
        np.testing.assert_allclose(out.routing.weights[:, row], weights, **CLOSE)
        for layer, record in zip(wanted, out.recorded, strict=True):
            np.testing.assert_allclose(record.outputs[row], slots[layer], rtol=0, atol=1e-4)
        np.testing.assert_allclose(out.logits[row], logits, rtol=0, atol=2e-4)
    active = np.asarray(out.routing.experts) < model.config.num_experts
    assert 0 < active.sum() < active.size  # something was dropped, something was not
    silent = tuple(dataclasses.replace(one, answers=jnp.zeros_like(one.answers)) for one in answers)
    without = model.network.forward(
        model.params, jnp.asarray(ids), plan=dataclasses.replace(plan, answers=silent), recorded_layers=wanted
    )
    assert np.abs(out.logits - without.logits).max() > 0.1  # answers made a difference


def test_the_experts_of_a_recorded_layer_run_once_and_their_record_is_what_the_layer_did(planned):
    model, ids, _, _ = planned
    calls, recorded = [], (0, 2)

    def apply(x, routing, params):
        calls.append(x.shape)
        return model.engine.apply(x, routing, params)

    engine = dataclasses.replace(model.engine, apply=apply)
    network = dataclasses.replace(model.network, engine=engine)
    out = network.forward(model.params, jnp.asarray(ids), recorded_layers=recorded)
    assert len(calls) == model.config.num_layers == len(recorded) + 1
    plain = model.network.forward(model.params, jnp.asarray(ids))
    assert plain.recorded == ()
    np.testing.assert_allclose(out.logits, plain.logits, **CLOSE)
    for layer, record in zip(recorded, out.recorded, strict=True):
        probs = jax.nn.softmax(record.inputs @ model.params["decoder"]["layers"][layer]["gate"]["kernel"], axis=-1)
        np.testing.assert_allclose(probs, out.router_probs[layer], **CLOSE)
        flat = jax.tree.map(lambda leaf, layer=layer: leaf[layer].reshape(-1, leaf.shape[-1]), out.routing)
        inputs = record.inputs.reshape(len(flat.experts), -1)
        whole = model.engine.apply(inputs, flat, model.params["experts"][layer])
        np.testing.assert_allclose(record.outputs.sum(2).reshape(whole.shape), whole, **CLOSE)


def slow_forward(model, ids, plan, answers):
    """One text, one token and one slot at a time where the plan is concerned; float64 throughout.

    Returns logits [T, V]; experts, weights [L, T, K] and slot outputs [L, T, K, D] of what ran.
    """
    config = model.config
    params = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), model.params)
    decoder, length = params["decoder"], len(ids)
    shape = (config.num_layers, length, config.top_k)
    experts, weights = np.full(shape, config.num_experts), np.zeros(shape)
    slots = np.zeros((*shape, config.hidden_size))
    x = decoder["embed"]["embedding"][ids]
    for index in range(config.num_layers):
        layer = decoder["layers"][index]
        x = x + slow_attention(slow_norm(x, layer["input_norm"], config), layer["attention"], config)
        inputs = slow_norm(x, layer["expert_norm"], config)
        for token in range(length):
            chosen = slow_slots(inputs[token] @ layer["gate"]["kernel"], plan, answers[index], index, token)
            for slot, (expert, weight, answer) in enumerate(chosen):
                if expert is None:
                    if answer != NO_ANSWER:
                        x[token] += weight * np.asarray(answers[index].answers[answer], np.float64)
                    continue
                gate, up, down = (params["experts"][index][expert][name] for name in ("gate", "up", "down"))
                inner = inputs[token] @ gate
                output = (inner / (1 + np.exp(-inner)) * (inputs[token] @ up)) @ down
                experts[index, token, slot], weights[index, token, slot] = expert, weight
                slots[index, token, slot] = weight * output
            x[token] += slots[index, token].sum(0)
    return slow_norm(x, decoder["norm"], config) @ decoder["head"]["kernel"], experts, weights, slots


def slow_slots(logits, plan, known, index, token):
    """(expert, weight, answer) of each slot of one token; expert None where nothing runs."""
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    k = plan.routing.experts.shape[-1]
    best = np.argsort(-probs)[:k]
    chosen = list(zip(best.tolist(), probs[best] / probs[best].sum(), strict=True))
    if plan.tier[index, token] == LEARNED:
        return [(*slot, NO_ANSWER) for slot in chosen]
    rules = jax.tree.map(lambda leaf: leaf[index].item(), plan.rules)
    if rules.choice_from_table:  # and the weights too, in this plan
        chosen = list(
            zip(plan.routing.experts[index, token].tolist(), plan.routing.weights[index, token].tolist(), strict=True)
        )
    row, kept, reached, slots = int(plan.row[index, token]), int(plan.experts_kept[index, token]), 0.0, []
    for slot, (expert, weight) in enumerate(chosen):
        looked_up = rules.use_answers and row != NO_ROW
        answer = int(known.entry[row, expert]) if looked_up else NO_ANSWER
        runs = slot < kept and (slot == 0 or (weight >= rules.gate_ratio * chosen[0][1] and reached < rules.gate_mass))
        if answer != NO_ANSWER:
            runs = runs and weight * float(known.deviation[answer]) >= rules.tolerance
        runs = runs or (looked_up and answer == NO_ANSWER)
        reached += probs[expert]
        slots.append((expert if runs else None, weight, answer))
    return slots


def slow_norm(x, params, config):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * params["weight"]


def slow_attention(x, params, config):
    size, length = config.head_dim, len(x)
    per_group = config.num_heads // config.num_kv_heads
    queries, keys, values = (x @ params[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj"))
    frequencies = config.rope_theta ** (-np.arange(0, size, 2) / size)

    def turned(row, position):
        pairs = (row[: size // 2] + 1j * row[size // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    out = np.zeros(queries.shape)
    for head in range(config.num_heads):
        mine, group = slice(head * size, (head + 1) * size), head // per_group
        shared = slice(group * size, (group + 1) * size)
        for query in range(length):
            scores = np.array(
                [
                    turned(queries[query, mine], query) @ turned(keys[key, shared], key) / np.sqrt(size)
                    for key in range(query + 1)
                ]
            )
            shares = np.exp(scores - scores.max())
            out[query, mine] = shares / shares.sum() @ values[: query + 1, shared]
    return out @ params["o_proj"]["kernel"]


def test_the_gate_is_not_rounded_to_bfloat16(tiny_config):
    decoder = init_params(tiny_config, jax.random.key(0), jnp.bfloat16)["decoder"]
    gate = with_methods(tiny_config, decoder).layers[0].gate
    check_float32(gate, gate.kernel[...])


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_not_rounded_to_bfloat16(tiny_config, tied):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
    model = with_methods(config, init_params(config, jax.random.key(0), jnp.bfloat16)["decoder"])
    check_float32(model.logits, model.embed.embedding[...].T if tied else model.head.kernel[...])


def check_float32(layer, weights) -> None:
    """The product of bfloat16 weights and inputs has float32's precision, measured against float64."""
    x = jax.random.normal(jax.random.key(1), (50, len(weights)), jnp.bfloat16)
    exact, found = np.asarray(x, np.float64) @ np.asarray(weights, np.float64), layer(x)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0, atol=1e-5)
    assert found.dtype == np.float32
    assert np.abs(exact - np.asarray(exact, jnp.bfloat16).astype(float)).max() > 1e-3  # what rounding would cost
