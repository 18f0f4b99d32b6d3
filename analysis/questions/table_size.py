"""How much of the saving does a smaller table keep? Fewer answers, and answers in fewer bytes.

Letters: L layers, N answers of a layer.

A bound on the answers of a layer keeps the most valuable ones (`varjax.shrinkage`); the policy stays the same. Sizes
are those of the tables as they would be shipped, including keys; losses are measured in tables of one shape, in which
an answer that is not kept cannot be found. Affine answers have a map in every layer, whatever the number of answers,
and a center each.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
from matplotlib.figure import Figure

from analysis.evaluate.points import MeasuredPoint, Subject, measured, score_point
from analysis.questions.question import Question
from analysis.report.figures import panels
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import document_counts
from varjax.config import AnswerType
from varjax.keys import KeyIndex
from varjax.progress import progress_bar
from varjax.routing import NO_ANSWER
from varjax.table import RouteTable

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the answers of the layer that has the most
_MARKERS: dict[AnswerType, str] = {"float32": "o", "bfloat16": "s", "int8": "^"}
_MB = 1e6


@dataclasses.dataclass(frozen=True)
class Size:
    """One table."""

    answers_per_layer: int | None  # the bound; None: every answer
    answer_dtype: AnswerType
    answers: int  # that the table holds, in all layers
    answer_bytes: int  # with their deviations and scales, maps and centers
    affine_bytes: int  # of these, maps and centers; 0 where answers are constant
    bytes: int  # of the whole table: answers, keys, predicted routing
    measured: MeasuredPoint  # its dial: answers


@dataclasses.dataclass(frozen=True)
class TableSizes:
    """Smaller bounds first, then the whole table in smaller types."""

    sizes: tuple[Size, ...]
    top_k: int
    documents: int
    tokens: int  # scored
    samples: int  # bootstrap draws


def _table_sizes(subject: Subject) -> TableSizes:
    """The given policy under tables of several sizes."""
    plain = score_point(subject)
    counts = document_counts(len(plain.nll), subject.samples, subject.seed)
    whole = dataclasses.replace(subject.config, answers_per_layer=None, answer_dtype="float32")
    most = max(_shipped(subject.build(whole))[0])
    bounds = sorted({max(round(share * most), 1) for share in SHARES})
    configs = [dataclasses.replace(whole, answers_per_layer=bound) for bound in bounds]
    configs += [dataclasses.replace(whole, answer_dtype=one) for one in _MARKERS]
    found = []
    for config in progress_bar(configs, unit="table", desc="table sizes", show=subject.progress):
        table = subject.build(config)
        answers, in_answers, in_maps, in_all = _shipped(table)
        point = measured(sum(answers), plain, score_point(subject, config, table), counts)
        sizes = (in_answers, in_maps, in_all)
        found.append(Size(config.answers_per_layer, config.answer_dtype, sum(answers), *sizes, point))
    tokens = int(plain.tokens.sum())
    return TableSizes(tuple(found), subject.model.config.top_k, len(plain.nll), tokens, subject.samples)


def _shipped(table: RouteTable) -> tuple[list[int], int, int, int]:
    """The answers of each layer, all their bytes, those of maps and centers among them, and those of the whole table.

    All as if the table, which was built with `keep_shapes`, had been built without; no second build is needed.
    """
    rows = np.flatnonzero(np.asarray(table.eligible).any(axis=0))
    rows = rows if len(rows) else np.array([0])
    keys = KeyIndex.build(np.asarray(table.index.keys)[rows])
    per_row = (table.eligible, table.experts_kept, table.routing)  # [L, R, ...]
    total = _bytes((keys, table.rules, table.made_with)) + _bytes(per_row) * len(rows) // table.eligible.shape[1]
    answers, answer_bytes, affine_bytes = [], 0, 0
    for layer, wanted in zip(table.answers or (), np.asarray(table.rules.use_answers), strict=False):
        entry = np.asarray(layer.entry)[rows] if wanted else np.full((1, table.num_experts), NO_ANSWER, np.int32)
        answers.append(len(np.unique(entry[entry != NO_ANSWER])))
        per_answer = _bytes((layer.answers, layer.deviation, layer.scale)) // len(layer.answers)
        answer_bytes += per_answer * max(answers[-1], 1)
        total += (entry if answers[-1] else entry[:1]).nbytes
        if answers[-1] and layer.affine is not None:
            maps = _bytes(dataclasses.replace(layer.affine, center=None))
            affine_bytes += maps + answers[-1] * _bytes(layer.affine.center) // len(layer.answers)
    answer_bytes += affine_bytes
    return answers, answer_bytes, affine_bytes, total + answer_bytes


def _bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _section(found: TableSizes) -> Section:
    whole = {size.answer_dtype: size for size in found.sizes if size.answers_per_layer is None}
    full, smallest = whole["float32"], min(whole.values(), key=lambda size: size.answer_bytes)
    saved = found.top_k - full.measured.experts_per_token
    halves = [size for size in found.sizes if found.top_k - size.measured.experts_per_token >= saved / 2]
    half = min(halves, key=lambda size: size.answers)
    full_loss, half_loss, small_loss = (one.measured.degradation.value for one in (full, half, smallest))
    outcome = (
        f"{full.answers:,} answers in {full.answer_bytes / _MB:.1f} MB (float32) save {saved:.2f} of {found.top_k} "
        f"experts at {full_loss:+.2%}; half of that takes {half.answers:,} and costs {half_loss:+.2%}; as "
        f"{smallest.answer_dtype} they take {smallest.answer_bytes / _MB:.1f} MB at {small_loss:+.2%}"
    )
    words = [
        "A bound on the answers of a layer keeps those that remove the most squared error, weighted by the gate; the "
        "shorter key's answer, or else the expert, replaces one that is not kept. The policy is the same for every "
        "size, so these tables are at different losses and experts. Choose a size on other documents: which table "
        "saves half was read off these.",
    ]
    if full.affine_bytes:
        part, answers = full.affine_bytes / _MB, full.answer_bytes / _MB
        words.append(
            f"The answers are affine: their maps and centers take {part:.1f} of the {answers:.1f} MB "
            f"({part / answers:.0%}) in float32. A smaller table keeps the maps whole; answers in bfloat16 or int8 "
            "have both in bfloat16."
        )
    columns = (
        *(Column("bound per layer", ","), Column("type"), Column("answers", ","), Column("answers [MB]", ".2f")),
        *(Column("maps and centers", ".1%"), Column("table [MB]", ".2f")),
        *(Column("experts", ".3f"), Column("left open", ".1%")),
        *(Column(name, "+.2%") for name in ("perplexity", "low", "high")),
    )
    rows = [
        (
            *("none" if size.answers_per_layer is None else size.answers_per_layer, size.answer_dtype, size.answers),
            *(size.answer_bytes / _MB, size.affine_bytes / max(size.answer_bytes, 1), size.bytes / _MB),
            *(size.measured.experts_per_token, size.measured.open_share),
            *dataclasses.astuple(size.measured.degradation),
        )
        for size in found.sizes
    ]
    figure = ReportFigure(
        QUESTION.name,
        QUESTION.title,
        "Each marker is a table under the same policy; from left to right, the tables hold more answers, the most "
        "valuable ones first. Left: the experts that still run. Right: the loss, with 95% intervals. Hollow markers: "
        "all answers, stored in fewer bytes each.",
        "The policy was searched for the whole table. A smaller table may lose as much and save less, even where the "
        "whole table, under smaller tolerances, would run as many experts at almost no loss.",
        partial(_draw, found),
    )
    return QUESTION.section("reported", outcome, words, (Table("Tables", columns, tuple(rows)),), (figure,))


def _draw(found: TableSizes) -> Figure:
    drawn, (experts, change) = panels(2, sharex=True)
    for dtype, marker in _MARKERS.items():
        sizes = [size for size in found.sizes if size.answer_dtype == dtype]
        bytes_ = [size.answer_bytes / _MB for size in sizes]
        style = {"color": "0", "marker": marker, "markersize": 5, "linewidth": 0.9, "label": dtype}
        if dtype != "float32":
            style |= {"markerfacecolor": "1"}
        experts.plot(bytes_, [size.measured.experts_per_token for size in sizes], **style)
        value, low, high = 100 * np.array([dataclasses.astuple(size.measured.degradation) for size in sizes]).T
        change.errorbar(bytes_, value, np.maximum([value - low, high - value], 0), **style)
    experts.set(xscale="log", ylabel="experts run per token and layer")
    change.set(ylabel="change in perplexity [%]")
    change.axhline(0, color="0.8", linewidth=0.8)
    experts.legend(fontsize="small")
    drawn.supxlabel("bytes of the answers [MB]")
    drawn.suptitle(f"Size of the table — {found.tokens:,} tokens, {found.documents:,} documents")
    drawn.tight_layout()
    return drawn


QUESTION = Question(
    "table_size",
    "Size of the table against what it saves",
    _table_sizes,
    kind=TableSizes,
    present=lambda found: [_section(found)],
)
