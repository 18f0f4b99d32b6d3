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
        if not _sound(found):
            raise InputError(
                f"drawn={found!r} does not say how documents were drawn: expected order, read, short and cut, as this "
                "version writes them; evaluate again, or remove it"
            )
        return cls(**found | {"cut": tuple(found["cut"])})


def _sound(found: Any) -> bool:
    """Whether this is a record as `Drawn.fields` gives it."""
    if not isinstance(found, dict) or found.keys() != {field.name for field in dataclasses.fields(Drawn)}:
        return False
    numbers = all(type(found[name]) is int and found[name] >= 0 for name in ("read", "short"))
    cut = isinstance(found["cut"], list) and all(one in get_args(Cut) for one in found["cut"])
    return numbers and cut and found["order"] in get_args(Order)


def order_of(dataset: str) -> Order:
    """The order in which a dataset gives its documents (`analysis.text.corpus.load_documents`)."""
    return "hash" if dataset == "embedded" else "source"
