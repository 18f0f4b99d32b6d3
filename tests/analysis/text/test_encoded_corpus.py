import copy
import dataclasses
import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from analysis.text.corpus import iter_documents, load_documents
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.encoding import Drawn, encode
from analysis.text.prepared import MANIFEST, Request, prepare
from analysis.text.sources import CorpusError
from varjax import checksums
from varjax.errors import InputError


@pytest.fixture(scope="module")
def folder(saved_model, corpus_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "sentences"
    texts = iter_documents(corpus_file)
    prepare(texts, saved_model.tokenizer, folder, Request(str(corpus_file)), progress=False)
    return folder


@pytest.mark.parametrize(("split", "limit"), [(None, None), ("build", None), ("test", 3)])
def test_text_and_what_was_prepared_of_it_give_the_same_documents(saved_model, corpus_file, folder, split, limit):
    wanted = encode(load_documents(corpus_file, split=split, limit=limit), saved_model.tokenizer, saved_model.config)
    for dataset in (corpus_file, folder):
        corpus = EncodedCorpus(str(dataset), split, limit, saved_model.tokenizer, saved_model.config)
        for _ in range(2):  # as often as it is asked for
            got = list(corpus)
            assert [one.id for one in got] == [one.id for one in wanted]
            for one, other in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(one.ids, other.ids)
                assert (one.group, one.words, one.bytes) == (other.group, other.words, other.bytes)
        assert corpus.about["documents"] == len(wanted)
        assert corpus.about["tokens"] == sum(len(one.ids) for one in wanted)


def test_what_does_not_fit_is_refused(saved_model, corpus_file, tmp_path):
    folder = tmp_path / "build"
    request = Request(str(corpus_file), "build")
    prepare(iter_documents(corpus_file, split="build"), saved_model.tokenizer, folder, request, progress=False)
    small = dataclasses.replace(saved_model.config, vocab_size=5)
    with pytest.raises(CorpusError, match="vocab_size is 5"):
        list(EncodedCorpus(str(folder), None, None, saved_model.tokenizer, small))
    with pytest.raises(CorpusError, match="no document of the split test"):
        list(EncodedCorpus(str(folder), "test", None, saved_model.tokenizer, saved_model.config))
    with pytest.raises(CorpusError, match="split 'tset'"):
        list(EncodedCorpus(str(folder), "tset", None, saved_model.tokenizer, saved_model.config))


def test_an_empty_name_is_not_the_working_directory(saved_model, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(CorpusError, match="the dataset is ''"):
        EncodedCorpus("", None, None, saved_model.tokenizer, saved_model.config)


@pytest.fixture(scope="module")
def tokenizer(saved_model):
    """Without a begin id, so that a text may have a single token."""
    found = copy.deepcopy(saved_model.tokenizer)
    found.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return found


@pytest.fixture(scope="module")
def drawn_of(saved_model, tokenizer):
    """The record of a run that reads all that it asked for, after JSON."""

    def read(dataset, split, limit):
        corpus = EncodedCorpus(str(dataset), split, limit, tokenizer, saved_model.config)
        assert list(corpus)
        return Drawn.of(json.loads(json.dumps(corpus.about)))

    return read


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """50 texts in a file, of which the second has less than two tokens."""
    path = tmp_path_factory.mktemp("listed") / "texts.jsonl"
    texts = ["the router finds a token", "a", *(f"{number}: the table keeps a layer" for number in range(48))]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_how_documents_were_drawn_is_recorded(drawn_of, listed):
    # One of the first ten has under two tokens: nine are there, fewer than the limit, which was reached all the same.
    assert drawn_of(listed, None, 10) == Drawn("source", 10, 1, ("documents",))
    assert drawn_of(listed, None, None) == drawn_of(listed, None, 51) == Drawn("source", 50, 1)
    assert not drawn_of(listed, None, 10).sampled and drawn_of(listed, None, None).sampled


def test_the_embedded_corpus_is_drawn_by_hash(drawn_of):
    found = drawn_of("embedded", "test", 5)
    assert found == Drawn("hash", 5, 0, ("documents",)) and found.sampled


def test_a_prepared_folder_hands_on_what_it_was_cut_to(drawn_of, tokenizer, listed, tmp_path):
    def prepared(name, num_samples=None, max_tokens=None):
        texts, request = iter_documents(listed, limit=num_samples), Request(str(listed), None, num_samples, max_tokens)
        prepare(texts, tokenizer, tmp_path / name, request, progress=False)
        return tmp_path / name

    whole, tokens, documents = prepared("whole"), prepared("tokens", None, 40), prepared("documents", 20)
    assert drawn_of(whole, None, None) == Drawn("source", 49, 1)
    assert drawn_of(whole, None, 7) == Drawn("source", 7, 1, ("documents",))
    assert drawn_of(tokens, None, None).cut == ("tokens",)  # with no limit on the reading
    assert drawn_of(tokens, None, 2).cut == ("tokens", "documents")
    assert drawn_of(documents, None, None) == Drawn("source", 19, 1, ("documents",))

    manifest = whole / MANIFEST
    fields = checksums.read_json(manifest, "")
    del fields["drawn"]  # as an older version wrote it
    checksums.write_json(manifest, fields)
    assert drawn_of(whole, None, None) is None
    checksums.write_json(manifest, fields | {"drawn": {"order": "any"}})
    with pytest.raises(CorpusError, match="does not say how documents were drawn"):
        drawn_of(whole, None, None)


@pytest.mark.parametrize(
    "damage",
    [{"order": "any"}, {"read": -1}, {"read": True}, {"short": "1"}, {"cut": ["words"]}, {"cut": None}, {"more": 1}],
)
def test_a_damaged_record_is_refused(damage):
    with pytest.raises(InputError, match="does not say how documents were drawn"):
        Drawn.of({"drawn": Drawn("hash", 3).fields() | damage})
