"""How the documents of a run came out of their dataset, recorded while they are read.

What a certificate may say of its sample follows from this record alone: a run that ended for its limit on documents
looks the same afterwards as one that read everything, and what a prepared folder was cut to is not in the arguments of
the run that reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from varjax.errors import InputError

Order = Literal["hash", "source"]
Cut = Literal["documents", "tokens"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The record. Results keep it as `fields` gives it."""

    order: Order  # by the hash of the texts, or as the source lists them
    read: int  # documents of the split that were read
    short: int = 0  # of these (of a prepared folder: of those it was made from), left out for having under two tokens
    cut: tuple[Cut, ...] = ()  # the limits at which reading stopped; (): the source was read to its end

    @property
    def sampled(self) -> bool:
        """Whether these are all documents of the split, or a part of them that their hashes chose."""
        return self.order == "hash" or not self.cut

    def fields(self) -> dict[str, Any]:
        """The record as JSON gives it back."""
        return dataclasses.asdict(self) | {"cut": list(self.cut)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Drawn | None:
        """The record in what a result or a manifest says of its documents; None if it has none.

        Raises:
            InputError: the record is damaged.
        """
        found = data.get("drawn")
        if found is None:
            return None
        try:
            record = cls(**found | {"cut": tuple(found["cut"])})
            numbers = all(type(one) is int and one >= 0 for one in (record.read, record.short))
            known = record.order in get_args(Order) and set(record.cut) <= set(get_args(Cut))
        except (TypeError, KeyError):
            numbers = known = False
        if not (numbers and known):
            raise InputError(
                f"drawn={found!r} does not say how documents were drawn: expected order, read, short and cut, as this "
                "version writes them; evaluate again, or remove it"
            )
        return record


def order_of(dataset: str) -> Order:
    """The order in which a dataset gives its documents (`analysis.text.corpus.load_documents`)."""
    return "hash" if dataset == "embedded" else "source"
