"""A check that the embedded corpus is still the one that a model's card describes.

The embedded corpus follows the versions of the installed packages, and a document's split follows from its text. An
edited docstring is therefore another document with a split of its own: with other versions than during training,
held-out text may be an edit of training text. Whoever reads a result has to know.

A card (`card.json`, written by `experiments/00_train_reference.py`) always holds the number of documents of the train
and the test split and a hash of each, which tell only whether a split is the same. Where it names its documents
(`document_ids`), those that differ are counted.
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

_SECTIONS = {"train": "training", "test": "test"}  # of a card, by the split that it describes
_DIGITS = 12  # of a document's id in a card: two of a million documents share them with a probability of 0.2 %


@dataclasses.dataclass(frozen=True)
class _SplitCheck:
    """One split of the corpus, on the card and now."""

    split: str
    on_card: int  # documents
    now: int  # documents
    same: bool  # the same documents in the same order, by their hash
    added: int | None  # documents that are not on the card; None: the card does not name its documents
    gone: int | None  # documents on the card that no longer exist; None: unknown

    def __str__(self) -> str:
        counts = f"{self.split} {self.now:,} documents"
        if self.same:
            return counts
        counts += f" (card: {self.on_card:,})"
        if self.added is None:
            return f"{counts}, at least {max(abs(self.now - self.on_card), 1):,} differ"
        return f"{counts}, {self.added:,} of them new and {self.gone:,} of the card's gone"


@dataclasses.dataclass(frozen=True)
class _CardCheck:
    """The embedded corpus against a model's card."""

    splits: tuple[_SplitCheck, ...]
    versions: Mapping[str, tuple[str | None, str | None]]  # that differ, of the packages on the card: there, here

    @property
    def words(self) -> str:
        """The result in one sentence."""
        found = [*map(str, self.splits)]
        if all(one.same for one in self.splits):
            return f"the embedded corpus is the one on the model's card: {'; '.join(found)}"
        if any(one.added is None for one in self.splits if not one.same):
            found.append("the card does not name its documents, so how many differ cannot be told")
        changed = ", ".join(f"{name} {here} (card: {there})" for name, (there, here) in self.versions.items())
        found.append(f"versions that the card names and that differ: {changed or 'none'}")
        found.append("held-out text may be edited training text")
        return f"the embedded corpus is not the one on the model's card: {'; '.join(found)}"


def _check(model: Model, dataset: str) -> _CardCheck | None:
    """The installed corpus against a model's card; None: another dataset, or a model without a card of that kind."""
    directory = checkpoints.REFERENCE if model.name == "reference" else Path(model.name)
    path = directory / "card.json"
    folder = Path(dataset).expanduser()
    is_embedded = dataset == "embedded" or (is_prepared(folder) and read_manifest(folder).request.dataset == "embedded")
    if not path.is_file() or not is_embedded:
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise InputError(f"{path}: not a model card in JSON ({error}); restore the file, or remove it") from error
    sections = [card.get(name) for name in _SECTIONS.values()] if isinstance(card, dict) else [None]
    if not all(isinstance(one, dict) and {"documents", "data_sha256"} <= one.keys() for one in sections):
        return None  # somebody else's card
    return _compare(card, (document.id for document in iter_documents("embedded")))


def announced(model: Model, dataset: str) -> dict[str, Any] | None:
    """Compare the installed corpus with a model's card, and print the result.

    Args:
        model: whose card is read.
        dataset: what this run reads.

    Returns:
        The comparison as a result file holds it, with its words; None: there is nothing to compare.

    Raises:
        InputError: the card cannot be read.
    """
    found = _check(model, dataset)
    if found is None:
        return None
    print(found.words)
    return dataclasses.asdict(found) | {"words": found.words}


def _compare(card: Mapping[str, Any], document_ids: Iterable[str]) -> _CardCheck:
    """The same from a card's content and the ids of all documents of the corpus, in its order."""
    now: dict[str, list[str]] = {split: [] for split in _SECTIONS}
    for one in document_ids:
        now.get(split_of(one), []).append(one)
    splits = []
    for split, ids in now.items():
        section = card[_SECTIONS[split]]
        same, listed, here = corpus_hash(ids) == section["data_sha256"], section.get("document_ids"), set(named(ids))
        added = gone = 0 if same else None
        if listed is not None:
            added, gone = len(here - set(listed)), len(set(listed) - here)
        splits.append(_SplitCheck(split, section["documents"], len(ids), same, added, gone))
    noted = card.get("provenance", {}).get("versions", {})
    present = {"python": python_version()}
    present |= {name: version_of(name) for name in noted if name in embedded.DISTRIBUTIONS}
    versions = {name: (noted[name], here) for name, here in present.items() if noted.get(name, here) != here}
    return _CardCheck(tuple(splits), versions)


def facts(found: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """State a comparison in a report.

    Args:
        found: as `announced` returns it.

    Returns:
        Facts of a report; none where there was nothing to compare.
    """
    return () if found is None else (("model card", found["words"]),)


def named(document_ids: Iterable[str]) -> list[str]:
    """Shorten document ids for a card's `document_ids`.

    Args:
        document_ids: full ids.

    Returns:
        Their first digits.
    """
    return [one[:_DIGITS] for one in document_ids]
