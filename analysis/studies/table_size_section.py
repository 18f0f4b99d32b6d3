"""What a study says of the size of the table: table, figure and how to read them."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.report.figures import panels
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.studies.table_size import Size, TableSizes

NAME = "table_size"
NOTE = ReportFigure(
    NAME,
    "Size of the table against what it saves",
    "Each dot is a table under the same policy; from left to right it holds more answers, the most valuable ones "
    "first. Left: the experts that still run. Right: what it costs, with 95 % intervals. Squares and triangles: every "
    "answer, in fewer bytes.",
    "The policy was searched for the whole table and is not searched anew: a smaller table may cost as much and save "
    "less, where the whole one under smaller tolerances would cost nothing at the same experts. Value is counted in "
    "squared error of single layers, not in loss.",
)
_MARKERS = {"float32": "o", "bfloat16": "s", "int8": "^"}
_MB = 1e6


def section(found: TableSizes) -> Section:
    """No bound is published, so it is reported."""
    whole = {size.answer_dtype: size for size in found.sizes if size.answers_per_layer is None}
    full, smallest = whole["float32"], min(whole.values(), key=lambda size: size.answer_bytes)
    dearest = full.measured.experts_per_token
    saved = found.top_k - dearest
    halves = [size for size in found.sizes if found.top_k - size.measured.experts_per_token >= saved / 2]
    half = min(halves, key=lambda size: size.answers)
    return Section(
        NAME,
        "Size of the table against what it saves",
        "reported",
        f"{full.answers:,} answers in {full.answer_bytes / _MB:.1f} MB (float32) save {saved:.2f} of {found.top_k} "
        f"experts at {full.measured.degradation.value:+.2%}; half of that takes {half.answers:,} "
        f"and costs {half.measured.degradation.value:+.2%}; as "
        f"{smallest.answer_dtype} they take {smallest.answer_bytes / _MB:.1f} MB at "
        f"{smallest.measured.degradation.value:+.2%}",
        (
            "A bound on the answers of a layer keeps those that remove the most squared error, weighted by the gate, "
            "against the answer of the longest shorter key, or against nothing. Where an answer is not kept, the "
            "shorter key's stands in; where that is not kept either, the expert runs.",
            "Which table saves half is read off these documents, so its cost is a little flattered: choose a size on "
            "other documents before relying on it.",
            "The policy stays as it is for every size, so these tables are not at equal loss or equal experts: compare "
            "them with VAR's own curve, the whole table under other tolerances.",
            "Answers: their bytes with scales and deviations. Table: with keys, predicted routing and which answer is "
            "whose. MB are 10^6 bytes.",
        ),
        (Table("Tables", _COLUMNS, tuple(_row(size) for size in found.sizes)),),
        (NOTE,),
    )


def figure(found: TableSizes) -> Figure:
    """Experts per token, and change of perplexity, against the bytes of the answers."""
    drawn, (experts, change) = panels(2, sharex=True)
    for dtype, marker in _MARKERS.items():
        sizes = [size for size in found.sizes if size.answer_dtype == dtype]
        bytes_ = [size.answer_bytes / _MB for size in sizes]
        style = {"color": "0", "marker": marker, "markersize": 5, "linewidth": 0.9, "label": dtype}
        if dtype != "float32":
            style |= {"markerfacecolor": "1"}
        experts.plot(bytes_, [size.measured.experts_per_token for size in sizes], **style)
        losses = [size.measured.degradation for size in sizes]
        value = [100 * one.value for one in losses]
        bars = [
            [max(100 * (one.value - one.low), 0) for one in losses],
            [max(100 * (one.high - one.value), 0) for one in losses],
        ]
        change.errorbar(bytes_, value, bars, **style)
    experts.set(xscale="log", ylabel="experts run per token and layer")
    change.set(ylabel="change of perplexity [%]")
    change.axhline(0, color="0.8", linewidth=0.8)
    experts.legend(fontsize="small")
    drawn.supxlabel("bytes of the answers [MB]")
    drawn.suptitle(f"Size of the table — {found.tokens:,} tokens, {found.documents:,} documents")
    drawn.tight_layout()
    return drawn


_COLUMNS = (
    *(Column("bound per layer", ","), Column("type"), Column("answers", ","), Column("answers [MB]", ".2f")),
    *(Column("table [MB]", ".2f"), Column("experts", ".3f"), Column("left open", ".1%")),
    *(Column(name, "+.2%") for name in ("perplexity", "low", "high")),
)


def _row(size: Size) -> tuple[str | float, ...]:
    bound = "none" if size.answers_per_layer is None else size.answers_per_layer
    one, change = size.measured, size.measured.degradation
    return (
        *(bound, size.answer_dtype, size.answers, size.answer_bytes / _MB, size.bytes / _MB),
        *(one.experts_per_token, one.open_share, change.value, change.low, change.high),
    )
