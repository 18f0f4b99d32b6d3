"""The embedded corpus against a model's card: what differs, as far as the card tells."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from analysis.text import embedded
from analysis.text.card import _check, _compare, named
from analysis.text.corpus import Document, corpus_hash, load_documents
from models.model import REFERENCE
from varjax.errors import InputError


def of_split(split: str, number: int) -> list[str]:
    """Ids of documents of a split, in hash order."""
    texts = (Document(f"text {index}", "g") for index in range(10_000))
    return sorted([one.id for one in texts if one.split == split][:number])


def section(ids: list[str], name_them: bool) -> dict:
    return {"documents": len(ids), "data_sha256": corpus_hash(ids)} | (
        {"document_ids": named(ids)} if name_them else {}
    )


def made_up(train: list[str], test: list[str], name_them: bool = True, **versions: str) -> dict:
    made = {"versions": {"python": "3.11.0", "numpy": "1.0", "varjax": "0.1", **versions}}
    return {"training": section(train, name_them), "test": section(test, name_them), "provenance": made}


TRAIN, TEST, TUNE = of_split("train", 60), of_split("test", 20), of_split("tune", 5)


@pytest.mark.parametrize("name_them", [True, False])
def test_the_corpus_of_the_card_is_told_so(name_them):
    found = _compare(made_up(TRAIN, TEST, name_them), sorted(TRAIN + TEST + TUNE))
    assert [(one.split, one.on_card, one.now, one.same, one.added, one.gone) for one in found.splits] == [
        ("train", 60, 60, True, 0, 0),
        ("test", 20, 20, True, 0, 0),
    ]
    assert found.words == "the embedded corpus is the one on the model's card: train 60 documents; test 20 documents"


def test_documents_that_differ_are_counted_where_the_card_names_them():
    card = made_up(TRAIN[:50], TEST[3:])  # 10 of today's are new; 3 of today's test documents are
    found = _compare(card, sorted(TRAIN[5:] + TEST))
    assert [(one.split, one.on_card, one.now, one.same, one.added, one.gone) for one in found.splits] == [
        ("train", 50, 55, False, 10, 5),
        ("test", 17, 20, False, 3, 0),
    ]
    assert "train 55 documents (card: 50), 10 of them new and 5 of the card's gone" in found.words
    assert "test 20 documents (card: 17), 3 of them new and 0 of the card's gone" in found.words
    assert "held-out text may be edited training text" in found.words and "cannot be told" not in found.words


def test_a_card_with_counts_alone_tells_no_more_than_that_they_differ(monkeypatch):
    monkeypatch.setattr("analysis.text.card.version_of", lambda name: {"numpy": "2.0"}.get(name))
    monkeypatch.setattr("analysis.text.card.python_version", lambda: "3.12.1")
    edited = [*TRAIN[1:], of_split("train", 61)[-1]]  # as many, another one
    found = _compare(made_up(TRAIN, TEST, name_them=False, jax="0.9"), sorted(edited + TEST))
    assert [(one.same, one.added, one.gone) for one in found.splits] == [(False, None, None), (True, 0, 0)]
    assert "train 60 documents (card: 60), at least 1 differ; test 20 documents; the card does not" in found.words
    # varjax is not a source of the corpus
    assert found.versions == {"python": ("3.11.0", "3.12.1"), "numpy": ("1.0", "2.0"), "jax": ("0.9", None)}
    assert "python 3.12.1 (card: 3.11.0), numpy 2.0 (card: 1.0), jax None (card: 0.9)" in found.words


def test_the_reference_model_is_compared_with_its_card(monkeypatch, tmp_path):
    """With a small corpus instead of the installed one, of which nothing is on the card."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    embedded.save([(f"text {index}", "g") for index in range(100)], embedded._cache_file())
    model = SimpleNamespace(name="reference")  # the name is all that is asked
    found = _check(model, "embedded")
    card = json.loads((REFERENCE / "card.json").read_text())
    numbers = [len(load_documents("embedded", split=split)) for split in ("train", "test")]
    assert 0 < sum(numbers) <= 100
    assert [(one.on_card, one.now, one.same, one.added) for one in found.splits] == [
        (card["training"]["documents"], numbers[0], False, None),
        (card["test"]["documents"], numbers[1], False, None),
    ]
    assert (found.splits[0].on_card, found.splits[1].on_card) == (17788, 1783)
    assert _check(model, "texts.jsonl") is None


def test_a_model_without_a_card_has_nothing_to_compare(saved_model, tmp_path):
    assert _check(saved_model, "embedded") is None
    model = dataclasses.replace(saved_model, name=str(tmp_path))
    (tmp_path / "card.json").write_text('{"license": "mit"}')
    assert _check(model, "embedded") is None
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(InputError, match=r"card\.json: not a model card in JSON"):
        _check(model, "embedded")
