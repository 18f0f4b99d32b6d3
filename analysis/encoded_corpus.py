"""A corpus in token ids, read from its source as often as it is asked for: nothing of it stays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from analysis.batches import Encoded, iter_encode
from analysis.corpus import iter_documents
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
    ):
        """
        Args:
            dataset, split, limit: as in `analysis.corpus.load_documents`.
            tokenizer, config: as in `analysis.batches.encode`.
        """
        self.request: dict[str, Any] = {"dataset": dataset, "split": split, "limit": limit}
        self.about: dict[str, Any] = self.request  # what a result file says: more once it has been read to the end
        self._tokenizer, self._config = tokenizer, config

    def __iter__(self) -> Iterator[Encoded]:
        """The documents. Raises CorpusError if there are none, or they cannot be read."""
        documents = tokens = 0
        digest = hashlib.sha256()  # over the ids in their order
        for document in iter_encode(iter_documents(**self.request), self._tokenizer, self._config):
            documents, tokens = documents + 1, tokens + len(document.ids)
            digest.update(bytes.fromhex(document.id))
            yield document
        self.about = self.request | {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()}
