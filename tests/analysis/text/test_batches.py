import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.text.batches import batches, cut
from analysis.text.corpus import Document
from analysis.text.encoding import Encoded, count_words, encode
from analysis.text.sources import CorpusError
from models import MoEConfig


def encoded(ids) -> Encoded:
    return Encoded(np.asarray(ids, np.int32), id=str(len(ids)), group="g", words=1, bytes=1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 3),
    max_length=st.integers(2, 12),
    data=st.data(),
)
def test_each_token_is_read_and_scored_once(lengths, batch_size, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    documents = [encoded(1000 * index + np.arange(length)) for index, length in enumerate(lengths)]
    scored: list[int] = []
    fresh: list[int] = []
    made = list(batches(documents, batch_size, max_length, stride))
    for batch in made:
        scored += batch.targets[batch.scored].tolist()
        fresh += batch.ids[batch.fresh].tolist()
        # A target is the id that follows, and only real tokens are read.
        np.testing.assert_array_equal(batch.targets[batch.scored], batch.ids[batch.scored] + 1)
        assert not (batch.scored & ~batch.mask).any() and not (batch.fresh & ~batch.mask).any()
        assert not batch.mask[batch.documents < 0].any()
    assert sorted(scored) == sorted(int(i) for d in documents for i in d.ids[1:])
    assert sorted(fresh) == sorted(int(i) for d in documents for i in d.ids)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), max_length=st.integers(2, 12), data=st.data())
def test_full_last_windows_score_each_token_once_with_full_context(length, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    made = list(cut(np.arange(length), 0, max_length, stride, full_last=True))
    assert [token for one in made for token in one.ids[1 + one.seen :]] == list(range(1, length))
    assert all(len(one.ids) == one.size + 1 for one in made)  # each position has a target
    assert [one.size for one in made] == [min(max_length, length - 1)] * len(made)


def test_few_shapes_whatever_the_lengths():
    documents = [encoded(range(length)) for length in range(2, 70)]
    shapes = {batch.ids.shape for batch in batches(documents, 4, 32)}
    assert shapes == {(4, 32), (8, 16), (16, 8)}


@pytest.mark.parametrize("arguments", [(0, 8, None), (1, 1, None), (1, 8, 9), (1, 8, 0)])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        list(batches([encoded(range(5))], *arguments))


def test_encode_refuses_what_cannot_be_scored(saved_model):
    config, tokenizer = saved_model.config, saved_model.tokenizer
    with pytest.raises(CorpusError, match=r"tokenizer\.json"):
        encode([Document("text", "g")], None, config)
    with pytest.raises(CorpusError, match="two tokens"):
        encode([], tokenizer, config)
    small = MoEConfig(**{**vars(config), "vocab_size": 5})
    with pytest.raises(CorpusError, match="vocab_size is 5"):
        encode([Document("the router", "g")], tokenizer, small)


@pytest.mark.parametrize(
    ("text", "words"), [("one", 1), ("two\u00a0\n words", 2), (" two words", 3), ("a\tb c \n", 4), ("\n", 2), ("", 1)]
)
def test_white_space_at_an_end_counts_as_one_word_more(text, words):
    assert count_words(text) == words


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 3),
    max_length=st.integers(2, 12),
)
def test_one_by_one_a_row_reads_a_document_from_its_first_window_to_its_last(lengths, batch_size, max_length):
    documents = [encoded(1000 * index + np.arange(length)) for index, length in enumerate(lengths)]
    read: dict[int, list[int]] = {}
    before, end = np.full(batch_size, -1), 0
    for batch in batches(documents, batch_size, max_length, one_by_one=True):
        np.testing.assert_array_equal(batch.goes_on, (batch.documents == before) & (before >= 0))
        assert batch.start == end and len(batch.ids) == batch_size
        for row, owner in enumerate(batch.documents):
            read.setdefault(owner, []).extend(batch.ids[row, batch.mask[row]].tolist())
        before, end = batch.documents, end + batch.ids.shape[1]
    assert read.pop(-1, []) == []  # what fills a batch is padding
    assert read == {index: document.ids.tolist() for index, document in enumerate(documents)}
