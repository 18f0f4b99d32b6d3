"""A corpus in token ids that is read from its source whenever it is iterated: nothing of it stays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.text.corpus import Document, check_request, iter_documents, split_of
from analysis.text.encoding import Drawn, Encoded, iter_encode
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
        self._wanted = check_request(dataset, split, limit)
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
            before = Drawn.begin(self.request["dataset"])
            source = iter_encode(counted(), self._tokenizer, self._config)
        for document in source:
            digest.update(b"\n" * bool(documents) + document.id.encode())
            documents, tokens = documents + 1, tokens + len(document.ids)
            yield document
        self.about = self.request | {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()}
        read = read or documents  # of a prepared folder, whose short documents were left out before
        drawn = before and before.after(read, documents, {"documents": (self.request["limit"], read)})
        self.about["drawn"] = drawn and drawn.fields()

    def _fitting(self, prepared: Prepared) -> Iterator[Encoded]:
        """The requested documents of a prepared folder."""
        folder, split, limit = (self.request[name] for name in ("dataset", "split", "limit"))
        if prepared.manifest.max_id >= self._config.vocab_size:
            raise CorpusError(
                f"{folder} holds the id {prepared.manifest.max_id} but the model's vocab_size is "
                f"{self._config.vocab_size}; prepare the dataset with this model's tokenizer"
            )
        found = 0
        for document in islice((one for one in prepared if self._wanted in (None, split_of(one.id))), limit):
            found += 1
            yield document
        if not found:
            raise CorpusError(
                f"{folder} holds no document of the split {split}; it was prepared with the split "
                f"{prepared.manifest.request.split or 'all'}: prepare another or choose another --split"
            )
