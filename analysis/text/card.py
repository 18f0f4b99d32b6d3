"""Whether the embedded corpus is still the one that a model's card names.

The embedded corpus follows the versions of the installed packages, and a document's split follows from its text. So an
edited docstring is another document, in a split of its own: with other versions than at the training, held-out text may
be an edit of training text. Whoever reads a result has to know.

What can be known depends on the card (`card.json`, of `experiments/00_train_reference.py`). It always holds the number
of documents of the train and the test split, and a hash over each; these tell whether a split is the same, and no more.
Where it names its documents (`document_ids`), those that differ are counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from platform import python_version
from typing import Any

from analysis.report.provenance import version_of
from analysis.text import embedded
from analysis.text.corpus import corpus_hash, iter_documents, split_of
from analysis.text.prepared import is_prepared, read_manifest
from models import Model
from models import model as checkpoints
from varjax.errors import InputError

SECTIONS = {"train": "training", "test": "test"}  # of a card, by the split that it describes
DIGITS = 12  # of a document's id, that a card names it by: two of a million share them with a probability of 0.2 %


@dataclasses.dataclass(frozen=True)
class SplitCheck:
    """One split of the corpus, on the card and now."""

    split: str
    on_card: int  # documents
    now: int  # documents
    same: bool  # the same documents in the same order, by their hash
    added: int | None  # documents that are not on the card; None: the card does not name its documents
    gone: int | None  # documents on the card that no longer exist; None: unknown


@dataclasses.dataclass(frozen=True)
class CardCheck:
    """The embedded corpus against a model's card."""

    splits: tuple[SplitCheck, ...]
    versions: Mapping[str, tuple[str | None, str | None]]  # that differ, of the packages on the card: there, here

    @property
    def words(self) -> str:
        """For a report, and for people."""
        found = [_said(one) for one in self.splits]
        if all(one.same for one in self.splits):
            return f"the embedded corpus is the one on the model's card: {'; '.join(found)}"
        if any(one.added is None for one in self.splits if not one.same):
            found.append("the card does not name its documents, so how many differ cannot be told")
        changed = ", ".join(f"{name} {here} (card: {there})" for name, (there, here) in self.versions.items())
        found.append(f"versions that the card names and that differ: {changed or 'none'}")
        found.append("held-out text may be edited training text")
        return f"the embedded corpus is not the one on the model's card: {'; '.join(found)}"

    def fields(self) -> dict[str, Any]:
        """The check as a result file holds it, with its words."""
        return dataclasses.asdict(self) | {"words": self.words}


def check(model: Model, dataset: str) -> CardCheck | None:
    """The installed corpus against the model's card; None for another dataset, or a model without a card of that kind.

    Raises:
        InputError: the card cannot be read.
    """
    directory = checkpoints.REFERENCE if model.name == "reference" else Path(model.name)
    path = directory / "card.json"
    if not path.is_file() or not _is_embedded(dataset):
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise InputError(f"{path}: not a model card in JSON ({error}); restore the file, or remove it") from error
    if not _describes(card):
        return None
    return compare(card, (document.id for document in iter_documents("embedded")))


def announced(model: Model, dataset: str) -> dict[str, Any] | None:
    """The fields of `check`, after its words were printed."""
    found = check(model, dataset)
    if found is None:
        return None
    print(found.words)
    return found.fields()


def compare(card: Mapping[str, Any], document_ids: Iterable[str]) -> CardCheck:
    """The same from the card's content and the ids of all documents of the corpus, in its order."""
    now: dict[str, list[str]] = {split: [] for split in SECTIONS}
    for one in document_ids:
        now.get(split_of(one), []).append(one)
    noted = card.get("provenance", {}).get("versions", {})
    present = {"python": python_version()} | {
        name: version_of(name) for name in noted if name in embedded.DISTRIBUTIONS
    }
    versions = {name: (noted[name], here) for name, here in present.items() if noted.get(name, here) != here}
    return CardCheck(tuple(_checked(split, card[SECTIONS[split]], ids) for split, ids in now.items()), versions)


def facts(found: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """What a report states of `CardCheck.fields`; nothing where there was nothing to compare."""
    return () if found is None else (("model card", found["words"]),)


def named(document_ids: Iterable[str]) -> list[str]:
    """`document_ids` of a card."""
    return [one[:DIGITS] for one in document_ids]


def _checked(split: str, section: Mapping[str, Any], ids: list[str]) -> SplitCheck:
    same, listed, here = corpus_hash(ids) == section["data_sha256"], section.get("document_ids"), set(named(ids))
    added = gone = 0 if same else None
    if listed is not None:
        added, gone = len(here - set(listed)), len(set(listed) - here)
    return SplitCheck(split, section["documents"], len(ids), same, added, gone)


def _said(one: SplitCheck) -> str:
    if one.same:
        return f"{one.split} {one.now:,} documents"
    counts = f"{one.split} {one.now:,} documents (card: {one.on_card:,})"
    if one.added is None:
        return f"{counts}, at least {max(abs(one.now - one.on_card), 1):,} differ"
    return f"{counts}, {one.added:,} of them new and {one.gone:,} of the card's gone"


def _is_embedded(dataset: str) -> bool:
    """Whether the documents are those of the embedded corpus, read from the packages or from a prepared folder."""
    folder = Path(dataset).expanduser()
    return dataset == "embedded" or (is_prepared(folder) and read_manifest(folder).request.dataset == "embedded")


def _describes(card: Any) -> bool:
    """Whether it is a card of `experiments/00_train_reference.py`."""
    sections = [card.get(name) for name in SECTIONS.values()] if isinstance(card, dict) else [None]
    return all(isinstance(one, dict) and {"documents", "data_sha256"} <= one.keys() for one in sections)
