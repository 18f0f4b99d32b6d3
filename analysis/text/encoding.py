"""Documents as token ids, and the record of how they came out of their dataset."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from analysis.text.corpus import Document
from analysis.text.sources import CorpusError
from models.config import MoEConfig
from varjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Order = Literal["hash", "source"]
Cut = Literal["documents", "tokens"]
T = TypeVar("T")

# What the tokenizer gets at once: it holds some hundred bytes per token while it works.
_TOGETHER, _TOGETHER_CHARS = 512, 1 << 20


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One document in token ids."""

    ids: np.ndarray  # int32 [n], starting with the begin id where the tokenizer adds one
    id: str  # SHA-256 of the text
    group: str
    words: int  # see `count_words`, the unit of word perplexity
    bytes: int  # of the text in UTF-8, the unit of bits per byte


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, config: MoEConfig
) -> list[Encoded]:
    """Tokenize documents; see `iter_encode`.

    Args:
        documents, tokenizer, config: see `iter_encode`.

    Returns:
        The documents that hold two tokens or more.
    """
    return list(iter_encode(documents, tokenizer, config))


def iter_encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, config: MoEConfig
) -> Iterator[Encoded]:
    """Tokenize documents, some hundred at a time. Those without two tokens have nothing to predict and are left out.

    Args:
        documents: the documents.
        tokenizer, config: of the model; without a tokenizer it is an error.

    Yields:
        The documents that hold two tokens or more.

    Raises:
        CorpusError: no tokenizer, no document left, a text that is not Unicode, or ids that the model does not have.
    """
    if tokenizer is None:
        raise CorpusError("the model has no tokenizer; put its tokenizer.json or tokenizer.model next to config.json")
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
    """Tokenize every document, however short.

    Args:
        documents: the documents.
        tokenizer: any.

    Yields:
        The documents in token ids.

    Raises:
        CorpusError: a text is not Unicode.
    """
    for part in grouped(documents, lambda one: max(len(one.text), _TOGETHER_CHARS // _TOGETHER), _TOGETHER_CHARS):
        sizes = [_utf8_bytes(document) for document in part]
        rows = tokenizer([document.text for document in part], verbose=False, return_attention_mask=False)["input_ids"]
        for document, size, row in zip(part, sizes, rows, strict=True):
            yield Encoded(np.asarray(row, np.int32), document.id, document.group, count_words(document.text), size)


def grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Group items, in their order.

    Args:
        items: may be a stream.
        size: of an item.
        most: a group is closed by the item with which its size reaches this.

    Yields:
        The groups.
    """
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= most:
            yield group
            group, total = [], 0
    if group:
        yield group


def count_words(text: str) -> int:
    """Count words as lm-evaluation-harness does for word perplexity.

    Args:
        text: of a document.

    Returns:
        Number of parts between runs of white space; an empty part before or after the outermost one counts.
    """
    return len(re.split(r"\s+", text))


def _utf8_bytes(document: Document) -> int:
    try:
        return len(document.text.encode())
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"a document of {document.group} (SHA-256 {document.id}) is not Unicode text ({error}); fix or remove it"
        ) from None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How the documents of a run came out of their dataset, recorded while they are read.

    What a certificate may say about its sample depends on this record: afterwards a run that stopped at its limit on
    documents looks like one that read everything, and the arguments of a run do not tell what a prepared folder that it
    reads was cut to.
    """

    order: Order  # by the hash of the texts, or as the source lists them
    read: int  # documents of the split that were read
    short: int = 0  # documents left out for having under two tokens, of these or of those a prepared folder came from
    cut: tuple[Cut, ...] = ()  # the limits at which reading stopped; (): the source was read to its end

    @classmethod
    def begin(cls, dataset: str) -> Drawn:
        """Begin the record of a dataset.

        Args:
            dataset: as in `analysis.text.corpus.iter_documents`.

        Returns:
            The record before anything was read.
        """
        return cls("hash" if dataset == "embedded" else "source", 0)

    def after(self, read: int, kept: int, limits: Mapping[Cut, tuple[int | None, int]]) -> Drawn:
        """Continue the record.

        Args:
            read: documents that were read.
            kept: those of them that were not too short.
            limits: each limit, None if there is none, and how much of it was reached.

        Returns:
            The record after reading.
        """
        reached = (name for name, (most, number) in limits.items() if most is not None and number >= most)
        cut = dict.fromkeys((*self.cut, *reached))
        return dataclasses.replace(self, read=read, short=self.short + read - kept, cut=tuple(cut))

    @property
    def sampled(self) -> bool:
        """Whether these are all documents of the split, or a part of them that their hashes chose."""
        return self.order == "hash" or not self.cut

    def fields(self) -> dict[str, Any]:
        """Convert the record for a JSON file.

        Returns:
            The fields as JSON gives them back.
        """
        return dataclasses.asdict(self) | {"cut": list(self.cut)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Drawn | None:
        """Read the record in what a result or a manifest says about its documents.

        Args:
            data: fields with the record under `drawn`.

        Returns:
            The record; None: it was not recorded.

        Raises:
            InputError: the record is damaged.
        """
        found = data.get("drawn")
        if found is None:
            return None
        names = {field.name for field in dataclasses.fields(cls)}
        if (
            not isinstance(found, dict)
            or found.keys() != names
            or not all(type(found[name]) is int and found[name] >= 0 for name in ("read", "short"))
            or not isinstance(found["cut"], list)
            or not all(one in get_args(Cut) for one in found["cut"])
            or found["order"] not in get_args(Order)
        ):
            raise InputError(
                f"drawn={found!r} does not say how documents were drawn: expected order, read, short and cut, as this "
                "version writes them; evaluate again, or remove it"
            )
        return cls(**found | {"cut": tuple(found["cut"])})
