import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from analysis.evaluate.losses import plain_runner, score
from analysis.text.corpus import Document, load_documents
from analysis.text.encoding import encode
from models import load_model
from models.model import REFERENCE

PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@pytest.fixture(scope="module")
def scores(saved_model, documents):
    return score(plain_runner(saved_model), None, documents, batch_size=4, max_length=32, progress=False)[0]


def test_losses_equal_transformers(model_directory, documents):
    torch = pytest.importorskip("torch", reason="torch is the reference here (extra `test`)")
    import transformers

    theirs = transformers.MixtralForCausalLM.from_pretrained(model_directory, experts_implementation="eager").eval()
    some = documents[:6]
    longest = max(len(document.ids) for document in some)
    run = plain_runner(load_model(model_directory))
    ours, _ = score(run, None, some, batch_size=2, max_length=longest, progress=False)
    for document, nll, tokens in zip(some, ours.nll, ours.tokens, strict=True):
        ids = torch.tensor(document.ids[None].astype(np.int64))
        with torch.inference_mode():
            loss = theirs(ids, labels=ids).loss.item()  # mean over the tokens after the first
        assert tokens == len(document.ids) - 1
        assert nll / tokens == pytest.approx(loss, rel=1e-5)


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def wikitext(shared_data) -> list[Document]:
    """The three shortest articles of each of WikiText-2's held-out files, and a text with white space at its ends."""
    files = [load_documents(shared_data / "corpora" / f"wikitext2_{part}.txt") for part in ("test", "valid")]
    shortest = [one for articles in files for one in sorted(articles, key=lambda one: len(one.text))[:3]]
    return [*shortest, Document("  a\n short \u00a0 text \n", "own")]


def harness_metrics(documents, max_length: int, **settings) -> dict[str, float]:
    """What lm-evaluation-harness itself computes, by Hugging Face's Mixtral on the reference checkpoint."""
    pytest.importorskip("lm_eval", reason="the harness is the reference here (extra `test`)")
    pytest.importorskip("accelerate", reason="the harness's Hugging Face model needs it (extra `test`)")
    import datasets
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "rolling",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([{"text": one.text} for one in documents])},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in PERPLEXITIES],
        "num_fewshot": 0,
    }
    hflm = HFLM(str(REFERENCE), device="cpu", dtype="float32", batch_size=4, max_length=max_length, **settings)
    loaded = TaskManager(include_defaults=False).load([task])
    results = evaluate(hflm, loaded, bootstrap_iters=0, log_samples=False)["results"]["rolling"]
    return {name: results[f"{name},none"] for name in PERPLEXITIES}


def test_figures_equal_those_of_the_harness(reference, wikitext):
    encoded = encode(wikitext, reference.tokenizer, reference.config)
    settings = {"max_length": 128, "full_last": True, "batch_size": 4, "progress": False}
    begin = reference.tokenizer.bos_token_id
    ours, _ = score(plain_runner(reference), None, encoded, prefix_id=begin, **settings)
    theirs = harness_metrics(wikitext, 128)
    assert {name: ours.summary()[name] for name in PERPLEXITIES} == pytest.approx(theirs, rel=1e-5)
    np.testing.assert_array_equal(ours.tokens, [len(one.ids) for one in encoded])

    without, _ = score(plain_runner(reference), None, encoded, **settings)
    theirs = harness_metrics(wikitext, 128, add_bos_token=False)
    assert {name: without.summary()[name] for name in PERPLEXITIES} == pytest.approx(theirs, rel=1e-5)
    assert without.nll.sum() != pytest.approx(ours.nll.sum(), rel=1e-4)


@pytest.mark.parametrize("stride", [5, 48, 64])
def test_losses_equal_hugging_faces_sliding_window(reference, wikitext, stride):
    torch = pytest.importorskip("torch", reason="torch is the reference here (extra `test`)")
    import transformers

    theirs = transformers.MixtralForCausalLM.from_pretrained(
        REFERENCE, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    encoded = encode(wikitext, reference.tokenizer, reference.config)
    some = [dataclasses.replace(one, ids=one.ids[:size]) for one, size in zip(encoded, (64, 65, 66, 200), strict=False)]
    settings = {"max_length": 64, "stride": stride, "batch_size": 2, "progress": False}
    ours, _ = score(plain_runner(reference), None, some, **settings)
    for document, nll, tokens in zip(some, ours.nll, ours.tokens, strict=True):
        expected = sliding_window(theirs, torch.tensor(document.ids[None].astype(np.int64)), 64 + 1, stride)
        assert (nll, tokens) == pytest.approx(expected, rel=1e-5)


def sliding_window(model, input_ids, max_length: int, stride: int) -> tuple[float, int]:
    """Hugging Face, "Perplexity of fixed-length models": the summed loss and the tokens that it is over.

    Their page takes the mean over a window's labels times one less than their number; here, times their number.
    """
    import torch

    nll, tokens, before = 0.0, 0, 0
    for begin in range(0, input_ids.shape[1], stride):
        end = min(begin + max_length, input_ids.shape[1])
        ids = input_ids[:, begin:end]
        labels = ids.clone()
        labels[:, : -(end - before)] = -100
        with torch.inference_mode():
            loss = model(ids, labels=labels).loss.item()
        count = int((labels[:, 1:] != -100).sum())  # the loss shifts the labels by one
        nll, tokens, before = nll + loss * count, tokens + count, end
        if end == input_ids.shape[1]:
            break
    return nll, tokens


def test_a_prefix_scores_the_first_token_too(saved_model, documents, scores):
    prefix = saved_model.config.eos_token_ids[0]
    settings = {"batch_size": 4, "max_length": 32, "progress": False}
    other, _ = score(plain_runner(saved_model), None, documents, prefix_id=prefix, **settings)
    np.testing.assert_array_equal(other.tokens, scores.tokens + 1)
    prefixed = [dataclasses.replace(one, ids=np.array([prefix, *one.ids], np.int32)) for one in documents]
    by_hand, _ = score(plain_runner(saved_model), None, prefixed, **settings)
    np.testing.assert_array_equal(other.nll, by_hand.nll)
    assert (other.prefix_id, scores.prefix_id) == (prefix, None)


def test_batching_does_not_matter(saved_model, documents, scores):
    other, _ = score(plain_runner(saved_model), None, documents, batch_size=3, max_length=32, progress=False)
    np.testing.assert_allclose(other.nll, scores.nll, rtol=1e-5)


def test_a_shorter_stride_scores_the_same_tokens(saved_model, documents, scores):
    other, _ = score(plain_runner(saved_model), None, documents, batch_size=4, max_length=32, stride=8, progress=False)
    np.testing.assert_array_equal(other.tokens, scores.tokens)
    short = np.array([len(document.ids) <= 32 for document in documents])
    np.testing.assert_allclose(other.nll[short], scores.nll[short], rtol=1e-5)
    assert (other.nll[~short] != scores.nll[~short]).all()  # more context


def test_units(scores, tmp_path):
    tokens, nats = scores.tokens.sum(), scores.nll.sum()
    figures = scores.summary()
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / scores.bytes.sum())
    assert figures["byte_perplexity"] == pytest.approx(2 ** figures["bits_per_byte"])
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / scores.words.sum()))
    scores.save(tmp_path / "losses.parquet")
    saved = pd.read_parquet(tmp_path / "losses.parquet")
    assert saved["nll"].sum() == nats and saved["id"].is_unique
    for said in (figures, saved.attrs):
        named = {name: said[name] for name in ("max_length", "stride", "prefix_id", "full_last")}
        assert named == {"max_length": 32, "stride": 32, "prefix_id": None, "full_last": False}
    assert set(PERPLEXITIES) | {"perplexity", "nll_per_token"} <= set(figures["units"])
    assert "nats" in saved.attrs["units"]["nll"]
