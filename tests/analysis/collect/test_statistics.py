from concurrent.futures import Future

import jax
import numpy as np
import pytest

from analysis.checkpoints import CheckpointMismatchError, Checkpoints, note, resumed
from analysis.collect import answers as collecting
from analysis.collect.answers import collect_answers
from analysis.collect.passes import Devices, PassSums
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.text.batches import batches
from analysis.text.encoded_corpus import EncodedCorpus
from models.experts import expert_outputs
from varjax.answers import Answers, absorb, emptied, init, update
from varjax.keys import ANY
from varjax.routing import NO_ANSWER
from varjax.stats import merge

READING = {"batch_size": 4, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def keys(saved_model, documents):
    return choose_keys(saved_model, documents, 16, KeySettings(orders=(1, 2), min_count=3))


@pytest.fixture(scope="module")
def whole(saved_model, documents, keys):
    return collect(saved_model, documents, keys, **READING)


@pytest.fixture(scope="module")
def answers(saved_model, documents, whole):
    """Of the second layer, at every key."""
    return collect_answers(saved_model, documents, whole.keys, (1,), **READING)


def occurrences(model, documents, key):
    """(row, position, gate probabilities [L, E]) of every occurrence of a key, one window at a time."""
    ids = [int(i) for i in key if i != ANY]
    for batch in batches(documents, 4, 16):
        out = model(batch.ids, batch.mask)
        for row, end in zip(*np.nonzero(batch.mask), strict=True):
            start = end + 1 - len(ids)
            if start >= 0 and batch.ids[row, start : end + 1].tolist() == ids:
                yield np.asarray(out.router_probs[:, row, end], np.float64)


def broken_off(documents, after):
    for index, document in enumerate(documents):
        if index == after:
            raise KeyboardInterrupt
        yield document


def test_statistics_equal_a_recount(saved_model, documents, keys, whole):
    first_bigram = int(np.argmax(whole.row_orders == 2))
    for row in (0, 5, first_bigram):
        probs = np.stack(list(occurrences(saved_model, documents, keys.keys[row])), axis=1)  # [L, n, E]
        entropy = -(probs * np.log(probs)).sum(-1)
        assert (whole.count[:, row] == probs.shape[1]).all()
        np.testing.assert_allclose(whole.entropy.mean[:, row], entropy.mean(1), rtol=1e-5)
        np.testing.assert_allclose(whole.std_entropy[:, row], entropy.std(1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(whole.entropy.max[:, row], entropy.max(1), rtol=1e-5)
        np.testing.assert_allclose(whole.mean_probs[:, row], probs.mean(1), rtol=1e-5, atol=1e-7)


def test_parts_merged_equal_the_whole(saved_model, documents, keys, whole):
    halves = [collect(saved_model, part, keys, **READING) for part in (documents[:70], documents[70:])]
    merged = merge(*halves)
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_array_equal(merged.top1_counts, whole.top1_counts)
    np.testing.assert_allclose(merged.entropy.mean, whole.entropy.mean, rtol=1e-5)
    np.testing.assert_allclose(merged.entropy.m2, whole.entropy.m2, rtol=1e-3, atol=1e-6)
    assert (merged.tokens, merged.documents) == (whole.tokens, whole.documents)


def test_special_tokens_do_not_count(saved_model, documents, whole):
    specials = sum(int(np.isin(d.ids, saved_model.config.special_token_ids).sum()) for d in documents)
    assert specials == len(documents)  # the begin id of each
    assert whole.tokens == sum(len(d.ids) for d in documents) - specials
    assert not np.isin(whole.keys[:, -1], saved_model.config.special_token_ids).any()


def test_resumed_answers_are_bit_for_bit_those_of_one_run(saved_model, documents, keys, tmp_path):
    reading = {**READING, "save_tokens": 700}
    arguments = (keys.keys, (1,))
    uninterrupted = collect_answers(saved_model, documents, *arguments, **reading)
    saved = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        collect_answers(saved_model, broken_off(documents, 100), *arguments, checkpoints=saved, **reading)
    saved = Checkpoints(tmp_path)
    assert saved.newest(uninterrupted)[0] > 0
    resumed_ones = collect_answers(saved_model, documents, *arguments, checkpoints=saved, **reading)
    jax.tree.map(np.testing.assert_array_equal, resumed_ones, uninterrupted)


def test_answers_absorbed_while_the_device_goes_on_are_those_absorbed_in_turn(
    saved_model, documents, keys, monkeypatch
):
    reading, begun = {**READING, "save_tokens": 700}, []
    arguments = (saved_model, documents, keys.keys, (0, 1))
    begin = Devices.begin
    monkeypatch.setattr(Devices, "begin", lambda *given: begun.append(1) or begin(*given))
    meanwhile = collect_answers(*arguments, inputs=True, **reading)
    assert len(begun) == 1
    monkeypatch.setattr(collecting.answers, "emptied", None)
    in_turn = collect_answers(*arguments, inputs=True, **reading)
    assert len(begun) > 3
    jax.tree.map(np.testing.assert_array_equal, meanwhile, in_turn)


def test_an_emptied_window_takes_the_memory_of_the_one_before(saved_model, documents, whole):
    """Both at a time may be more than the device has."""
    empty = Answers.empty(whole.keys, (0, 1), saved_model.config.num_experts, saved_model.config.hidden_size)
    sums = PassSums("", init, update, absorb, empty.ngram_orders, empty.layers, True, emptied)
    devices = Devices(saved_model, empty.keys, sums)
    devices.begin(empty)
    batch = next(batches(documents, 4, 16))
    old = devices.add(batch.ids, batch.mask)
    kept = jax.tree.map(np.copy, devices.take())  # views of them would keep the memory of a CPU
    devices.again(Future())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert any(leaf.any() for leaf in jax.tree.leaves(kept))


def test_an_error_of_the_host_ends_the_pass(saved_model, documents, keys, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(collecting.answers, "absorb", fail)
    with pytest.raises(OSError, match="no space"):
        collect_answers(saved_model, documents, keys.keys, (0,), **{**READING, "save_tokens": 700})


def test_answers_equal_a_recount(saved_model, documents, whole, answers):
    outputs, weights, experts, ids, before = [], [], [], [], []
    for batch in batches(documents, 4, 16):
        out = saved_model.network.forward(
            saved_model.params, batch.ids, attention_mask=batch.mask, recorded_layers=(1,)
        )
        real = batch.mask & ~np.isin(batch.ids, saved_model.config.special_token_ids)
        past = np.pad(np.where(batch.mask, batch.ids, -9)[:, :-1], ((0, 0), (1, 0)), constant_values=-9)
        parts = (out.recorded[0].outputs, out.routing.weights[1], out.routing.experts[1], batch.ids, past)
        for column, part in zip((outputs, weights, experts, ids, before), parts, strict=True):
            column.append(np.asarray(part)[real])
    outputs, weights, experts, ids, before = map(np.concatenate, (outputs, weights, experts, ids, before))

    place = {tuple(key): row for row, key in enumerate(answers.keys.tolist())}
    bigram = whole.keys[np.argmax(whole.row_orders == 2)]
    for key in ([ANY, ANY], whole.keys[2], bigram):
        here = np.all([(i == ANY) | (i == column) for i, column in zip(key, (before, ids), strict=True)], axis=0)
        for expert in range(saved_model.config.num_experts):
            w = weights[here][experts[here] == expert].astype(np.float64)
            output = outputs[here][experts[here] == expert].astype(np.float64)
            n = answers.entry[0, place[tuple(key)], expert]
            assert (n == NO_ANSWER) == (len(w) == 0)
            if len(w) == 0:
                continue
            mean = (w[:, None] * output).sum(0) / np.square(w).sum()
            assert answers.count[0, n] == len(w)
            np.testing.assert_allclose(answers.mass[0, n], np.square(w).sum(), rtol=1e-5)
            np.testing.assert_allclose(answers.mean[0, n], mean, rtol=1e-4, atol=1e-5)
            spread = np.square(output - w[:, None] * mean).sum()
            np.testing.assert_allclose(answers.m2[0, n], spread, rtol=1e-3, atol=1e-6)


def test_answers_of_all_tokens_need_no_other_key(saved_model, documents, keys, answers):
    alone = collect_answers(saved_model, documents, keys.keys[:0], (1,), **READING)
    ours, theirs = alone.entry[0, 0], answers.entry[0, 0]
    np.testing.assert_array_equal(alone.count[0, ours], answers.count[0, theirs])
    np.testing.assert_allclose(alone.mean[0, ours], answers.mean[0, theirs], rtol=1e-6, atol=1e-7)


def test_expert_outputs_are_the_layers_output(saved_model):
    x = jax.random.normal(jax.random.key(0), (7, saved_model.config.hidden_size))
    out = saved_model.network.forward(saved_model.params, jax.numpy.ones((1, 7), jax.numpy.int32))
    routing = jax.tree.map(lambda leaf: leaf[0, 0], out.routing)
    slots = expert_outputs(saved_model.engine, x, routing, saved_model.params["experts"][0])
    together = saved_model.engine.apply(x, routing, saved_model.params["experts"][0])
    np.testing.assert_allclose(slots.sum(1), together, rtol=1e-5, atol=1e-6)


def test_chosen_layers_equal_those_of_the_whole(saved_model, documents, keys, whole):
    one = collect(saved_model, documents, keys, layers=(1,), **READING)
    np.testing.assert_array_equal(one.count[1], whole.count[1])
    np.testing.assert_array_equal(one.sum_probs[1], whole.sum_probs[1])
    assert not one.count[0].any() and np.isnan(one.entropy.mean[0]).all()


def test_a_stream_that_is_read_anew_equals_a_list(saved_model, documents, corpus_file, keys, whole):
    corpus = EncodedCorpus(str(corpus_file), None, None, saved_model.tokenizer, saved_model.config)
    settings = KeySettings(orders=(1, 2), min_count=3)
    np.testing.assert_array_equal(choose_keys(saved_model, corpus, 16, settings).keys, keys.keys)
    streamed = collect(saved_model, corpus, keys, **READING)
    np.testing.assert_array_equal(streamed.sum_probs, whole.sum_probs)
    assert streamed.documents == len(documents) == corpus.about["documents"]
    assert corpus.about["tokens"] == sum(len(document.ids) for document in documents)


def test_resumed_statistics_are_bit_for_bit_those_of_one_run(saved_model, documents, keys, tmp_path):
    reading = {**READING, "save_tokens": 700}
    uninterrupted = collect(saved_model, documents, keys, **reading)

    for after in (60, 100):
        saved = Checkpoints(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            collect(saved_model, broken_off(documents, after), keys, checkpoints=saved, **reading)
    saved = Checkpoints(tmp_path)
    assert saved.newest(uninterrupted)[0] > 0
    resumed = collect(saved_model, documents, keys, checkpoints=saved, **reading)
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = Checkpoints(tmp_path)
    assert saved.newest({"x": np.zeros(1), "n": 0}) is None
    saved.save(3, {"x": np.arange(3.0) / 3, "n": 5})
    saved = Checkpoints(tmp_path)
    step, value = saved.newest({"x": np.zeros(1), "n": 0})
    assert (step, value["n"]) == (3, 5)
    np.testing.assert_array_equal(value["x"], np.arange(3.0) / 3)


def test_checkpoints_of_another_run_are_refused_by_what_differs(tmp_path):
    path = tmp_path / "run.json"
    run = {"data": "a", "settings": {"orders": (1, 2), "min_count": 5}}
    assert resumed(path, run) is None
    note(path, run, {"documents": 7})
    assert resumed(path, run) == {"documents": 7}
    with pytest.raises(CheckpointMismatchError, match=r"with settings\.min_count = 5 \(here 6\); .*--output"):
        resumed(path, {"data": "a", "settings": {"orders": (1, 2), "min_count": 6}})


def test_no_frequent_context_is_one_clear_error(saved_model, documents):
    with pytest.raises(ValueError, match="lower min_count"):
        choose_keys(saved_model, documents[:2], 16, KeySettings(min_count=1000))
