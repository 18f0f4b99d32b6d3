"""The size of the table against what it saves: fewer answers, and answers in fewer bytes.

Letters: L layers, N answers of a layer.

A bound on the answers of a layer keeps the most valuable ones (`varjax.shrinkage`); the policy stays the same. Sizes
are those of the tables as they would be shipped, with keys and everything else; losses are measured in tables of one
shape, in which an answer that is not kept cannot be found.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from analysis.policies.scored_points import Measured, Subject, losses, measured
from analysis.resampling import document_counts
from varjax.config import AnswerType
from varjax.keys import KeyIndex
from varjax.model import build_for
from varjax.progress import progress_bar
from varjax.routing import NO_ANSWER
from varjax.table import RouteTable

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the answers of the layer that has the most
TYPES: tuple[AnswerType, ...] = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Size:
    """One table."""

    answers_per_layer: int | None  # the bound; None: every answer
    answer_dtype: AnswerType
    answers: int  # that the table holds, in all layers
    answer_bytes: int  # with their deviations and scales
    bytes: int  # of the whole table: answers, keys, predicted routing
    measured: Measured  # its dial: answers


@dataclasses.dataclass(frozen=True)
class TableSizes:
    """Smaller bounds first, then the whole table in smaller types."""

    sizes: tuple[Size, ...]
    top_k: int
    documents: int
    tokens: int  # scored
    samples: int  # bootstrap draws


def table_sizes(subject: Subject) -> TableSizes:
    """The given policy on the subject's documents under tables of several sizes.

    Raises:
        InputError: as `varjax.table.build`.
    """
    plain = losses(subject)
    counts = document_counts(len(plain.nll), subject.samples, subject.seed)
    top_k = subject.model.config.top_k
    whole = dataclasses.replace(subject.config, answers_per_layer=None, answer_dtype="float32")
    most = max(shipped(build_for(subject.model, whole, subject.stats, subject.answers, keep_shapes=True)).answers)
    bounds = sorted({max(round(share * most), 1) for share in SHARES})
    configs = [dataclasses.replace(whole, answers_per_layer=bound) for bound in bounds]
    configs += [dataclasses.replace(whole, answer_dtype=one) for one in TYPES]
    found = []
    for config in progress_bar(configs, unit="table", desc="table sizes", show=subject.progress):
        table = build_for(subject.model, config, subject.stats, subject.answers, keep_shapes=True)
        size = shipped(table)
        number = sum(size.answers)
        point = measured(number, plain, losses(subject, config, table), counts)
        found.append(Size(config.answers_per_layer, config.answer_dtype, number, size.answer_bytes, size.bytes, point))
    return TableSizes(tuple(found), top_k, len(plain.nll), int(plain.tokens.sum()), subject.samples)


class Shipped(NamedTuple):
    """What is left of a table without what it never looks up."""

    answers: tuple[int, ...]  # [L]
    answer_bytes: int  # with deviations and scales
    bytes: int


def shipped(table: RouteTable) -> Shipped:
    """The size of a table built with `keep_shapes` if it were built without; no second build is needed."""
    rows = np.flatnonzero(np.asarray(table.eligible).any(axis=0))
    rows = rows if len(rows) else np.array([0])
    keys = KeyIndex.build(np.asarray(table.index.keys)[rows])
    per_row = (table.eligible, table.experts_kept, table.routing)  # [L, R, ...]
    total = _bytes((keys, table.rules, table.made_with)) + _bytes(per_row) * len(rows) // table.eligible.shape[1]
    answers, answer_bytes = [], 0
    for layer, wanted in zip(table.answers or (), np.asarray(table.rules.use_answers), strict=False):
        entry = np.asarray(layer.entry)[rows] if wanted else np.full((1, table.num_experts), NO_ANSWER, np.int32)
        answers.append(len(np.unique(entry[entry != NO_ANSWER])))
        per_answer = _bytes((layer.answers, layer.deviation, layer.scale)) // len(layer.answers)
        answer_bytes += per_answer * max(answers[-1], 1)
        total += (entry if answers[-1] else entry[:1]).nbytes
    return Shipped(tuple(answers), answer_bytes, total + answer_bytes)


def _bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
