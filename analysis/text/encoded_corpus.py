"""A corpus in token ids, read from its source as often as it is asked for: nothing of it stays in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.text.corpus import (
    CorpusError,
    CorpusHash,
    Document,
    check_dataset,
    check_limit,
    iter_documents,
    known_split,
    split_of,
)
from analysis.text.drawn import Drawn, order_of
from analysis.text.encoding import Encoded, iter_encode
from analysis.text.prepared import Prepared, is_prepared, open_prepared
from models.config import MoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedCorpus:
    """The documents of a split of a dataset, in an order that does not change."""

    def __init__(
        self,
        dataset: str,
        split: str | None,
        limit: int | None,
        tokenizer: PreTrainedTokenizerBase | None,
        config: MoEConfig,
        text_column: str = "text",
    ):
        """
        Args:
            dataset: a prepared folder (`analysis.text.prepared`), or as in `analysis.text.corpus.load_documents`.
            split, limit, text_column: as in `analysis.text.corpus.load_documents`.
            tokenizer, config: as in `analysis.text.encoding.encode`.

        Raises:
            CorpusError: no such split, a limit below 1, or an empty name.
        """
        check_dataset(dataset)
        known_split(split)
        check_limit(limit)
        self.request: dict[str, Any] = {
            "dataset": dataset,
            "split": split,
            "limit": limit,
            "text_column": text_column,
        }
        self.about: dict[str, Any] = self.request  # what a result file says: more once it has been read to the end
        self._tokenizer, self._config = tokenizer, config

    def __iter__(self) -> Iterator[Encoded]:
        """The documents. Raises CorpusError if there are none, or they cannot be read."""
        folder = Path(self.request["dataset"]).expanduser()
        read = documents = tokens = 0
        digest = CorpusHash()

        def counted() -> Iterator[Document]:
            nonlocal read
            for document in iter_documents(**self.request):
                read += 1
                yield document

        source: Iterator[Encoded]
        if is_prepared(folder):
            opened = open_prepared(folder, self._tokenizer)
            before, source = opened.manifest.drawn, self._prepared(opened)
        else:
            before = Drawn(order_of(self.request["dataset"]), 0)
            source = iter_encode(counted(), self._tokenizer, self._config)
        for document in source:
            documents, tokens = documents + 1, tokens + len(document.ids)
            digest.add(document.id)
            yield document
        self.about = self.request | {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()}
        self.about["drawn"] = self._drawn(before, read or documents, documents)

    def _drawn(self, before: Drawn | None, read: int, documents: int) -> dict[str, Any] | None:
        """The record of how `documents` of the `read` ones came to be here, after what a prepared folder says."""
        if before is None:
            return None
        limit = self.request["limit"]
        reached = limit is not None and read >= limit and "documents" not in before.cut
        cut = (*before.cut, "documents") if reached else before.cut
        return dataclasses.replace(before, read=read, short=before.short + read - documents, cut=cut).fields()

    def _prepared(self, documents: Prepared) -> Iterator[Encoded]:
        folder, split, limit = (self.request[name] for name in ("dataset", "split", "limit"))
        if documents.manifest.max_id >= self._config.vocab_size:
            raise CorpusError(
                f"{folder} holds the id {documents.manifest.max_id} but the model's vocab_size is "
                f"{self._config.vocab_size}; prepare the dataset with this model's tokenizer"
            )
        wanted, found = known_split(split), 0
        fitting = (document for document in documents if wanted in (None, split_of(document.id)))
        for document in islice(fitting, limit):
            found += 1
            yield document
        if not found:
            raise CorpusError(
                f"{folder} holds no document of the split {split}; it was prepared with the split "
                f"{documents.manifest.request.split or 'all'}: prepare another or choose another --split"
            )
