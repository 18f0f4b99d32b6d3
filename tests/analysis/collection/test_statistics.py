import jax
import numpy as np
import pytest

from analysis.collection.answers import collect_answers
from analysis.collection.checkpoints import CheckpointMismatchError, Checkpoints, note, resumed
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.text.batches import batches
from analysis.text.encoded_corpus import EncodedCorpus
from models.experts import slot_outputs
from varjax.answers import Rule
from varjax.keys import ANY
from varjax.stats import merge

READING = {"batch_size": 4, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def keys(saved_model, documents):
    return choose_keys(saved_model, documents, 16, KeySettings(orders=(1, 2), min_count=3))


@pytest.fixture(scope="module")
def whole(saved_model, documents, keys):
    return collect(saved_model, documents, keys, **READING)


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
    arguments = (keys.keys[:20], (1,), [Rule(0, 0), Rule(1, 1)])
    uninterrupted = collect_answers(saved_model, documents, *arguments, **reading)
    with Checkpoints(tmp_path) as saved, pytest.raises(KeyboardInterrupt):
        collect_answers(saved_model, broken_off(documents, 100), *arguments, checkpoints=saved, **reading)
    with Checkpoints(tmp_path) as saved:
        assert saved.newest(uninterrupted)[0] > 0
        resumed_ones = collect_answers(saved_model, documents, *arguments, checkpoints=saved, **reading)
    jax.tree.map(np.testing.assert_array_equal, resumed_ones, uninterrupted)


def test_answers_equal_a_recount(saved_model, documents, keys, whole):
    key_row, rule = 2, Rule(layer=1, kept=1)
    ones = whole.keys[whole.row_orders == 1]
    answers = collect_answers(saved_model, documents, ones, (1,), [Rule(0, 0), rule], **READING)
    total, count = np.zeros(saved_model.config.hidden_size), 0
    for batch in batches(documents, 4, 16):
        out = saved_model.network.forward(
            saved_model.params, batch.ids, attention_mask=batch.mask, slot_outputs_of=(1,)
        )
        here = (batch.ids == ones[key_row, -1]) & batch.mask
        total += np.asarray(out.slot_outputs[0], np.float64)[here][:, 1].sum(0)  # the second slot is what is dropped
        count += int(here.sum())
    assert answers.count[1, key_row] == count
    np.testing.assert_allclose(answers.mean[1, key_row], total / count, rtol=1e-4, atol=1e-6)


def test_slot_outputs_are_the_layers_output(saved_model):
    x = jax.random.normal(jax.random.key(0), (7, saved_model.config.hidden_size))
    out = saved_model.network.forward(saved_model.params, jax.numpy.ones((1, 7), jax.numpy.int32))
    routing = jax.tree.map(lambda leaf: leaf[0, 0], out.routing)
    slots = slot_outputs(saved_model.engine, x, routing, saved_model.params["experts"][0])
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
        with Checkpoints(tmp_path) as saved, pytest.raises(KeyboardInterrupt):
            collect(saved_model, broken_off(documents, after), keys, checkpoints=saved, **reading)
    with Checkpoints(tmp_path) as saved:
        assert saved.newest(uninterrupted)[0] > 0
        resumed = collect(saved_model, documents, keys, checkpoints=saved, **reading)
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    with Checkpoints(tmp_path) as saved:
        assert saved.newest({"x": np.zeros(1), "n": 0}) is None
        saved.save(3, {"x": np.arange(3.0) / 3, "n": 5})
    with Checkpoints(tmp_path) as saved:
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
