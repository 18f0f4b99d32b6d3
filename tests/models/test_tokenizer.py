"""Tokenizers: what is trained opens in transformers with Mixtral's special ids; SentencePiece converts exactly."""

import shutil

import pytest

from models.tokenizer import BOS, SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_bpe

TEXTS = ["The router chooses experts for every token.", "Every token is routed; some routes are predictable."] * 4
HARD = ["", " leading", "trailing  ", "two  spaces\n\n\ttab", "größer 中文 😀", "a" * 50, 40 * " " + "x"]


@pytest.fixture(scope="module")
def trained():
    return train_bpe(TEXTS, vocab_size=300)


def test_special_tokens_have_mixtrals_ids_and_bos_comes_first(trained):
    assert trained.get_vocab_size() == 300
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert trained.encode("x").tokens[0] == BOS


@pytest.mark.parametrize("text", HARD)
def test_any_text_survives_encoding(trained, text):
    assert trained.decode(trained.encode(text).ids) == text


def test_training_is_deterministic(trained):
    assert train_bpe(TEXTS, vocab_size=300).to_str() == trained.to_str()


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="use >= 259"):
        train_bpe(TEXTS, vocab_size=258)


def test_what_is_saved_opens_as_a_fast_transformers_tokenizer(trained, tmp_path):
    save_tokenizer(trained, tmp_path / "model", max_length=64)
    opened = load_tokenizer(tmp_path / "model")
    assert opened.is_fast
    assert (opened.unk_token_id, opened.bos_token_id, opened.eos_token_id) == (0, 1, 2)
    assert (len(opened), opened.model_max_length) == (300, 64)
    for text in HARD:
        assert opened(text).input_ids == trained.encode(text).ids
        assert opened.decode(opened(text).input_ids, skip_special_tokens=True) == text


def test_a_directory_without_a_tokenizer_gives_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path)


def test_mixtrals_sentencepiece_model_converts_exactly(shared_data, tmp_path):
    import sentencepiece

    source = shared_data / "mixtral" / "tokenizer.model"
    shutil.copy(source, tmp_path)
    converted = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    assert len(converted) == 32_000
    assert converted("Hello world").input_ids == [1, 22557, 1526]
    prose = (shared_data / "corpora" / "books_valid.txt").read_text()[:100_000]
    for text in [prose, *HARD]:
        ids = converted(text).input_ids
        assert ids == [1, *reference.encode(text)]
        assert converted.decode(ids, skip_special_tokens=True) == text
