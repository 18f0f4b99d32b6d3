import dataclasses

import numpy as np
import pytest

from analysis.text.corpus import CorpusError, iter_documents, load_documents
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.encoding import encode
from analysis.text.preparation import prepare
from analysis.text.prepared import Request


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
