"""A corpus in token ids that is read from its source whenever it is iterated: nothing of it stays in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.text.corpus import Document, check_request, iter_documents, known_split, split_of
from analysis.text.encoding import Drawn, Encoded, iter_encode, order_of
from analysis.text.prepared import Prepared, is_prepared, open_prepared
from analysis.text.sources import CorpusError
from models.config import MoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedCorpus:
    """The documents of a split of a dataset, in an order that does not change.

    Attributes:
        request: what was asked for.
        about: what a result file says about the documents: the request and, once they have been read to the end,
            their number, tokens and hash, and how they were drawn.
    """

    def __init__(
        self,
        dataset: str,
        split: str | None,
        limit: int | None,
        tokenizer: PreTrainedTokenizerBase | None,
        config: MoEConfig,
        text_column: str = "text",
    ):
        """Check the request; nothing is read yet.

        Args:
            dataset: a prepared folder (`analysis.text.prepared`), or as in `analysis.text.corpus.iter_documents`.
            split, limit, text_column: as in `analysis.text.corpus.iter_documents`.
            tokenizer, config: of the model.

        Raises:
            CorpusError: an unknown split, a limit below 1, or an empty name.
        """
        check_request(dataset, split, limit)
        given = {"dataset": dataset, "split": split, "limit": limit, "text_column": text_column}
        self.request: dict[str, Any] = given
        self.about: dict[str, Any] = self.request
        self._tokenizer, self._config = tokenizer, config

    def __iter__(self) -> Iterator[Encoded]:
        """Read the documents. Raises CorpusError if there are none, or they cannot be read."""
        folder = Path(self.request["dataset"]).expanduser()
        read = documents = tokens = 0
        digest = hashlib.sha256()  # of the ids, as `analysis.text.corpus.corpus_hash`

        def counted() -> Iterator[Document]:
            nonlocal read
            for document in iter_documents(**self.request):
                read += 1
                yield document

        source: Iterator[Encoded]
        if is_prepared(folder):
            prepared = open_prepared(folder, self._tokenizer)
            before, source = prepared.manifest.drawn, self._fitting(prepared)
        else:
            before = Drawn(order_of(self.request["dataset"]), 0)
            source = iter_encode(counted(), self._tokenizer, self._config)
        for document in source:
            digest.update(b"\n" * bool(documents) + document.id.encode())
            documents, tokens = documents + 1, tokens + len(document.ids)
            yield document
        self.about = self.request | {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()}
        self.about["drawn"] = self._drawn(before, read or documents, documents)

    def _drawn(self, before: Drawn | None, read: int, documents: int) -> dict[str, Any] | None:
        """How `documents` of the `read` ones were drawn, given how the prepared folder was (`before`)."""
        if before is None:
            return None
        limit = self.request["limit"]
        reached = limit is not None and read >= limit and "documents" not in before.cut
        cut = (*before.cut, "documents") if reached else before.cut
        return dataclasses.replace(before, read=read, short=before.short + read - documents, cut=cut).fields()

    def _fitting(self, prepared: Prepared) -> Iterator[Encoded]:
        """The requested documents of a prepared folder."""
        folder, split, limit = (self.request[name] for name in ("dataset", "split", "limit"))
        if prepared.manifest.max_id >= self._config.vocab_size:
            raise CorpusError(
                f"{folder} holds the id {prepared.manifest.max_id} but the model's vocab_size is "
                f"{self._config.vocab_size}; prepare the dataset with this model's tokenizer"
            )
        wanted, found = known_split(split), 0
        for document in islice((one for one in prepared if wanted in (None, split_of(one.id))), limit):
            found += 1
            yield document
        if not found:
            raise CorpusError(
                f"{folder} holds no document of the split {split}; it was prepared with the split "
                f"{prepared.manifest.request.split or 'all'}: prepare another or choose another --split"
            )
