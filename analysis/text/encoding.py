"""Documents as token ids."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from analysis.text.corpus import CorpusError, Document
from models.config import MoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the tokenizer gets at once: it holds some hundred bytes a token while it works.
_TOGETHER, _TOGETHER_CHARS = 512, 1 << 20


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One document in token ids."""

    ids: np.ndarray  # int32 [n], the begin id in front where the tokenizer puts one
    id: str  # SHA-256 of the text
    group: str
    words: int  # see `count_words`, the unit of word perplexity
    bytes: int  # of the text in UTF-8, the unit of bits per byte


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, config: MoEConfig
) -> list[Encoded]:
    """The documents of `iter_encode`, as a list."""
    return list(iter_encode(documents, tokenizer, config))


def iter_encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, config: MoEConfig
) -> Iterator[Encoded]:
    """Tokenize documents, some hundred at a time; those without two tokens have nothing to predict and are left out.

    Raises:
        CorpusError: no tokenizer, no document left, a text that is no Unicode, or ids that the model does not have.
    """
    if tokenizer is None:
        raise CorpusError("the model has no tokenizer; put its tokenizer.json or tokenizer.model beside config.json")
    read = found = 0
    for document in tokenized(documents, tokenizer):
        read += 1
        if len(document.ids) < 2:
            continue
        found += 1
        largest = int(document.ids.max())
        if largest >= config.vocab_size:
            raise CorpusError(f"the tokenizer gives id {largest} but the model's vocab_size is {config.vocab_size}")
        yield document
    if not found:
        raise CorpusError(
            f"none of the {read} documents holds two tokens; choose another dataset, split or number of samples"
        )


def tokenized(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Every document, however short. Raises CorpusError for a text that is no Unicode."""
    for part in _parts(documents):
        sizes = [_utf8_bytes(document) for document in part]
        rows = tokenizer([document.text for document in part], verbose=False, return_attention_mask=False)["input_ids"]
        for document, size, row in zip(part, sizes, rows, strict=True):
            yield Encoded(np.asarray(row, np.int32), document.id, document.group, count_words(document.text), size)


def count_words(text: str) -> int:
    """The parts between runs of white space, as lm-evaluation-harness counts them for word perplexity.

    White space at the text's beginning or end has an empty part beside it, which counts.
    """
    return len(re.split(r"\s+", text))


def _parts(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of at most `_TOGETHER`, or of so many characters."""
    part: list[Document] = []
    chars = 0
    for document in documents:
        part.append(document)
        chars += len(document.text)
        if len(part) == _TOGETHER or chars >= _TOGETHER_CHARS:
            yield part
            part, chars = [], 0
    if part:
        yield part


def _utf8_bytes(document: Document) -> int:
    try:
        return len(document.text.encode())
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"a document of {document.group} (SHA-256 {document.id}) is no Unicode text ({error}); fix or remove it"
        ) from None
