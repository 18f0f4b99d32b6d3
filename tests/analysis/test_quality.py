import math

import numpy as np
import pandas as pd
import pytest

from analysis.quality import plain_runner, score
from models import load_model


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
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / scores.words.sum()))
    scores.save(tmp_path / "losses.parquet")
    saved = pd.read_parquet(tmp_path / "losses.parquet")
    assert saved["nll"].sum() == nats and saved["id"].is_unique
