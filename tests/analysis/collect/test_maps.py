"""Affine answers of a model, from the pass to the model under VAR."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from analysis.checkpoints import Checkpoints
from analysis.collect.maps import first_tokens, with_maps
from analysis.collect.passes import Share
from analysis.collect.run import CollectSettings, analyze
from analysis.collect.statistics import KeySettings
from analysis.text.encoded_corpus import EncodedCorpus
from varjax import InputError, LayerPolicy, VARConfig, VARModel, answersfile, fitting
from varjax.checksums import write_safetensors
from varjax.model import build_for
from varjax.table import with_policies

READING = {"batch_size": 20, "max_length": 16, "progress": False}
RANK = 12


@pytest.fixture(scope="module")
def known(even_documents):
    """The documents that the statistics were collected from."""
    return even_documents[:-40]


def test_mean_inputs_change_no_mean_output(collected, with_inputs):
    for name in ("keys", "entry", "mean", "mass", "m2", "count"):
        np.testing.assert_array_equal(getattr(with_inputs, name), getattr(collected.answers, name))
    assert with_inputs.inputs.shape == with_inputs.mean.shape and with_inputs.inputs.any()


def errors(model, collected, answers):
    """The relative error of every layer's output at tokens that the table knows, without any expert running."""
    policy = LayerPolicy(experts_kept=0, ngram_orders=(1, 2), entropy_threshold=10.0)
    config = VARConfig(frequency_threshold=1, cache_size=0, default=policy)
    table = build_for(model, config, collected.stats, answers)
    var_model = VARModel(model, config, table)
    ids = np.stack([document.ids[:16] for document in collected.held_out[20:]])
    plan = var_model(ids, var_model.init(len(ids)))[0].plan
    audit = np.flatnonzero(np.asarray(plan.tier[0]).ravel() == 0).astype(np.int32)
    out = model.network.forward(var_model.model.params, jax.numpy.asarray(ids), plan=plan, audit=audit)
    return np.asarray(out.audit)


def test_affine_answers_are_nearer_to_unseen_outputs(saved_model, collected, with_inputs, affine):
    """A random model with small weights is nearly linear."""
    assert affine.maps.unexplained.mean() < 0.8
    before, after = (errors(saved_model, collected, answers) for answers in (with_inputs, affine))
    assert (np.median(after, axis=1) < 0.95 * np.median(before, axis=1)).all()


def test_a_resumed_fit_is_bit_for_bit_that_of_one_run(saved_model, with_inputs, affine, known, collected, tmp_path):
    def broken_off():
        yield from known[:100]
        raise KeyboardInterrupt

    reading = {**READING, "save_tokens": 700}
    given = (collected.held_out[:20], RANK, 1.0)
    whole = with_maps(saved_model, with_inputs, known, *given, **reading)
    with pytest.raises(KeyboardInterrupt):
        with_maps(saved_model, with_inputs, broken_off(), *given, checkpoints=Checkpoints(tmp_path), **reading)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    resumed = with_maps(saved_model, with_inputs, known, *given, checkpoints=Checkpoints(tmp_path), **reading)
    jax.tree.map(np.testing.assert_array_equal, resumed.maps, whole.maps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), resumed.maps.unexplained, affine.maps.unexplained
    )


def test_moments_absorbed_while_the_device_goes_on_are_those_absorbed_in_turn(
    saved_model, with_inputs, known, collected, monkeypatch
):
    reading, given = {**READING, "save_tokens": 700}, (collected.held_out[:20], RANK, 1.0)
    meanwhile = with_maps(saved_model, with_inputs, known, *given, **reading)
    monkeypatch.setattr(fitting, "emptied", None)
    in_turn = with_maps(saved_model, with_inputs, known, *given, **reading)
    jax.tree.map(np.testing.assert_array_equal, meanwhile.maps, in_turn.maps)


def test_a_finished_part_of_several_keeps_its_maps_when_it_is_resumed(saved_model, even_corpus, tmp_path):
    """Such as after an error in the report, before the checkpoints are removed."""
    texts = [
        EncodedCorpus(str(even_corpus), None, limit, saved_model.tokenizer, saved_model.config) for limit in (60, 20)
    ]
    small = CollectSettings(KeySettings((1,), 3), None, (1,), 5, answer_rank=4, batch_size=20, max_length=16)
    run = partial(analyze, saved_model, texts[0], tmp_path, small, held_out=texts[1], progress=False)
    assert run(share=Share(1, 2)) is None
    read = []
    for _ in range(2):
        run(share=Share(0, 2))
        read.append(answersfile.read(tmp_path / "routing_stats.answers.safetensors")[0])
    assert read[0].affine.any()
    jax.tree.map(np.testing.assert_array_equal, read[1].maps, read[0].maps)


def test_an_impossible_rank_is_refused_before_anything_is_collected(saved_model, even_corpus, tmp_path):
    corpus = EncodedCorpus(str(even_corpus), None, None, saved_model.tokenizer, saved_model.config)
    hidden = saved_model.config.hidden_size
    for rank, memory, said in ((hidden + 1, 1 << 30, f"at most the hidden size, {hidden}"), (9, 5_000, "allow more")):
        settings = CollectSettings(answer_rank=rank, answer_bytes=memory)
        with pytest.raises(InputError, match=said):
            analyze(saved_model, corpus, tmp_path, settings, held_out=corpus)
    assert not list(tmp_path.iterdir())


def test_affine_answers_are_read_as_they_were_written(affine, with_inputs, tmp_path):
    path = tmp_path / "some.answers.safetensors"
    for one in (affine, with_inputs):
        answersfile.write(path, one, {})
        again, _ = answersfile.read(path)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again, one)
        assert (again.maps is None) == (one.maps is None)


def test_a_file_that_lacks_a_part_of_the_maps_is_refused(affine, tmp_path):
    path = tmp_path / "some.answers.safetensors"
    answersfile.write(path, affine, {})
    with safe_open(path, framework="numpy") as file:
        meta = file.metadata()
    tensors = load_file(path)
    del tensors["mix"]
    write_safetensors(path, tensors, {"varjax": meta["varjax"]})
    with pytest.raises(InputError, match="the tensors mix are missing"):
        answersfile.read(path)


def test_the_first_tokens_of_a_text(known):
    taken = list(first_tokens(known, 40))
    assert sum(len(one.ids) for one in taken) >= 40 > sum(len(one.ids) for one in taken[:-1])


def test_tables_of_any_policy_have_the_same_shapes(saved_model, collected, affine):
    shapes = []
    for tolerance in (0.1, 0.4):
        policy = LayerPolicy(experts_kept=None, tolerance=tolerance, ngram_orders=(0, 1), entropy_threshold=10.0)
        config = VARConfig(frequency_threshold=1, default=policy, answer_dtype="int8")
        table = build_for(saved_model, config, collected.stats, affine, keep_shapes=True)
        shapes.append(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), table))
        known = table.answers[0]
        assert known.affine.center.shape == (len(known.answers), RANK)
        assert known.affine.read.dtype == "bfloat16" and known.answers.dtype == "int8"
    assert shapes[0] == shapes[1]


def test_other_policies_change_a_table_as_if_it_were_built_for_them(saved_model, collected, affine, with_inputs):
    configs = []
    for order, tolerance in ((0, 0.1), (1, 0.4)):
        policy = LayerPolicy(experts_kept=None, tolerance=tolerance, ngram_orders=(order,), entropy_threshold=10.0)
        configs.append(VARConfig(frequency_threshold=1, default=policy))
    tables = [build_for(saved_model, config, collected.stats, affine, keep_shapes=True) for config in configs]
    changed = with_policies(tables[0], configs[1], collected.stats, affine)
    jax.tree.map(np.testing.assert_array_equal, changed, tables[1])
    assert not np.array_equal(tables[0].eligible, tables[1].eligible)
    without = build_for(saved_model, configs[0], collected.stats, with_inputs, keep_shapes=True)
    for table, given, said in (
        (tables[0], with_inputs, "12, those given of rank 0"),
        (without, affine, "0, those given"),
    ):
        with pytest.raises(InputError, match=f"the table's have maps of rank {said}"):
            with_policies(table, configs[1], collected.stats, given)


def test_order_0_answers_every_token_but_the_first_with_affine_answers(saved_model, collected, affine):
    """No key of order 1 or 2 lacks an answer, because that of order 0 stands in."""
    policy = LayerPolicy(experts_kept=0, ngram_orders=(0, 1, 2), entropy_threshold=10.0)
    config = VARConfig(frequency_threshold=1, cache_size=0, default=policy)
    var_model = VARModel(saved_model, config, build_for(saved_model, config, collected.stats, affine))
    out, _ = var_model(np.stack([one.ids[:16] for one in collected.held_out]), var_model.init(40))
    assert affine.useful_orders == (0, 1, 2) and collected.answers.useful_orders == (1, 2)
    dropped = np.asarray(out.routing.experts) == saved_model.config.num_experts
    assert dropped[:, :, 1:].all() and not dropped[:, :, 0].any()  # the first token of a text is left to the router


def test_a_maps_layer_that_adds_nothing_has_none(saved_model, collected, affine):
    silent = dataclasses.replace(affine.maps, mix=affine.maps.mix * np.array([0, 1], np.float32)[:, None, None, None])
    answers = dataclasses.replace(affine, maps=silent)
    table = build_for(saved_model, VARConfig(frequency_threshold=1), collected.stats, answers)
    assert [known.affine is None for known in table.answers] == [True, False]


def test_maps_fit_the_memory(saved_model, with_inputs, affine, known, collected):
    """Half of the directions: nearly as much is explained; too little memory for the rank is an error."""
    hidden, experts = saved_model.config.hidden_size, saved_model.config.num_experts
    memory = 4 * 2 * experts * (hidden // 2) * (hidden // 2 + hidden)
    given = (saved_model, with_inputs, known, collected.held_out[:20], 6, 1.0)
    few = with_maps(*given, memory, **READING)
    assert few.maps.read.shape == (2, hidden, 6)
    assert affine.maps.unexplained.mean() < few.maps.unexplained.mean() < 0.95
    with pytest.raises(InputError, match=r"rank=6 of the maps: the memory of 0\.00 GiB holds the sums of rank 1"):
        with_maps(*given, 1, **READING)
