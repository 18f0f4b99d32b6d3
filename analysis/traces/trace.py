"""Routing traces: which experts each token got, in a file that can be studied without the model.

Letters: N tokens, D documents, L layers, E experts, K experts per token.

The file is Parquet, version 1, with one row per token; the tokens of a document are adjacent and in order.

| column | type | what |
|---|---|---|
| `document` | string | id of the document (of traces recorded here: SHA-256 of its text) |
| `group` | string | the domain it belongs to |
| `position` | int32 | place in the document; after a gap a new context begins |
| `token_id` | int32 | |
| `token_str` | string | its text, null where it is not known |
| `experts` | list of L * K int16 | layer by layer the chosen experts, best first if `ranked`; -1: layer not captured |
| `probs` | list of L * K float32 | their probabilities; no such column where they are not known |
| `entropy` | list of L float32 | nats, of the gate's softmax over all E experts; no such column where it is not known |

The schema's metadata holds JSON under `varjax_trace`: `version`, `num_layers`, `num_experts`, `top_k`, `ranked`,
`probs_over` (`all`: over all E experts; `chosen`: over the K chosen; null: no probabilities), `scores` (what the
probabilities were computed from: `softmax`, where they are the router's own; `sigmoid`, scores divided by their sum;
`logits`; `none`: no probabilities; files without this field mean `softmax`), `entropy` (true if there is such a
column), `notes` (a list of what was left out or computed when the trace was imported), and about the origin `model`,
`revision`, `dtype`, `tokenizer`, `phase` (`prefill` or `decode`) and whatever else the writer knows. `sealed` means
that the file carries checksums (`varjax.checksums`), which reading verifies; other programs' files need none.

Probabilities over the chosen experts add up to 1, those over all experts to at most 1; a file that violates this is
refused. A layer that was not captured (`analysis.traces.capture`) holds -1 at every token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.traces.capture import captured_layers
from varjax import checksums
from varjax.errors import InputError
from varjax.files import replacing

SCORES = ("softmax", "sigmoid", "logits", "none")
TOLERANCE = 0.01  # by which a sum of probabilities may miss 1: float16 is good to 0.0005 each, bfloat16 to 0.004
ORIGIN = ("model", "revision", "dtype", "tokenizer", "phase")
_VERSION = 1
_HEADER = b"varjax_trace"
NO_ROUTING = "there is no routing in this model"  # where every layer has one expert
_LAYOUT = ("version", "num_layers", "num_experts", "top_k", "ranked", "probs_over", "scores", "entropy", "notes")
_SEALED = "sealed"
_FIX = "restore the file, or record or import the trace again"
_ROW_GROUP = 1 << 16  # tokens
_COLUMNS = ("token_id", "document", "position", "experts", "probs", "entropy")  # fields with a row per token


class TraceError(InputError):
    """A trace that cannot be read or does not fit together; the message names file, column and fix."""


@dataclass(frozen=True)
class Trace:
    """N tokens and what the router chose for each. Host arrays.

    Raises TraceError, naming every fault, if the arrays do not fit together.
    """

    token_id: np.ndarray  # int32 [N]
    document: np.ndarray  # int32 [N], index into `document_ids`; equal ones are adjacent
    position: np.ndarray  # int32 [N], rising within a document
    experts: np.ndarray  # int16 [N, L, K]; -1 at every token of a layer that was not captured
    probs: np.ndarray | None  # float32 [N, L, K], falling; meaningless where not captured; None: not known
    document_ids: tuple[str, ...]  # [D]
    groups: tuple[str, ...]  # [D]
    num_experts: int
    ranked: bool = True  # the experts are sorted best first; always so where there are probabilities
    probs_over: Literal["all", "chosen"] | None = "all"
    scores: Literal["softmax", "sigmoid", "logits"] = "softmax"  # what `probs` were computed from, if there are any
    entropy: np.ndarray | None = None  # float32 [N, L], nats, of the gate over all experts; None: not known
    token_strings: Mapping[int, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)  # model, revision, dtype, tokenizer, phase, ...
    notes: tuple[str, ...] = ()  # what was left out or computed when it was imported

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if faults:
            raise TraceError("; ".join(faults))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.experts.shape[2]

    @property
    def captured(self) -> np.ndarray:
        """bool [L]: the layers whose routing is known."""
        return self.experts[0, :, 0] >= 0 if len(self.experts) else np.ones(self.num_layers, bool)

    def remarks(self) -> tuple[str, ...]:
        """List what every report on this trace must say.

        Returns:
            The notes, and which layers were not captured.
        """
        missing = np.flatnonzero(~self.captured)
        if not len(missing):
            return self.notes
        layers = f"layer{'s' * (len(missing) != 1)} {', '.join(map(str, missing))} of {self.num_layers}"
        return (*self.notes, f"Not captured: {layers}; left out of every mean, table and figure.")

    def captured_part(self) -> Trace:
        """Select the captured layers.

        Returns:
            The same tokens with these layers only, renumbered from 0.
        """
        captured = self.captured
        return self if captured.all() else self._with(_COLUMNS[3:], lambda values: values[:, captured])

    def of(self, documents: np.ndarray) -> Trace:
        """Select the tokens of some documents.

        Args:
            documents: bool [D].

        Returns:
            A trace with the same list of documents.
        """
        rows = documents[self.document]
        return self._with(_COLUMNS, lambda values: values[rows])

    def _with(self, columns: Iterable[str], change: Callable[[np.ndarray], np.ndarray]) -> Trace:
        known = {name: getattr(self, name) for name in columns}
        changed: dict[str, Any] = {name: change(values) for name, values in known.items() if values is not None}
        return replace(self, **changed)

    def begins(self) -> np.ndarray:
        """Find where contexts begin.

        Returns:
            bool [N], True where no token of the same document comes directly before.
        """
        follows = (self.document[1:] == self.document[:-1]) & (self.position[1:] == self.position[:-1] + 1)
        return np.append(True, ~follows)[: len(self.token_id)]

    def contexts(self, order: int) -> np.ndarray:
        """Number the contexts of the tokens.

        Args:
            order: ids per context.

        Returns:
            int64 [N], equal where the last `order` ids are equal, from 0 on; -1 where there are fewer ids.
        """
        begins = self.begins()
        since = np.arange(len(begins)) - np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        code = np.zeros(len(begins), np.int64)
        vocabulary = int(self.token_id.max(initial=0)) + 1
        for back in range(order):
            here = np.flatnonzero(since >= back)
            code[here] = np.unique(code[here] * vocabulary + self.token_id[here - back], return_inverse=True)[1]
        return np.where(since >= order - 1, code, -1)

    def build_documents(self, share: float = 0.7) -> np.ndarray:
        """Choose the documents that tables are built on, by a hash of the id alone; the others score them.

        Args:
            share: of the documents.

        Returns:
            bool [D].
        """
        place = [int(hashlib.sha256(one.encode()).hexdigest()[:12], 16) / 16**12 for one in self.document_ids]
        return np.array(place) < share


def write(path: str | Path, trace: Trace) -> None:
    """Write a trace, whole or not at all.

    Args:
        path: the file to write.
        trace: the trace.
    """
    with writing(path, trace) as add:
        add(trace)


@contextmanager
def writing(path: str | Path, like: Trace) -> Iterator[Callable[[Trace], None]]:
    """Write a file in parts, whole or not at all: `with writing(path, like) as add: add(trace); ...`.

    No document may be in two parts. Documents of which no token is added leave no trace in the file.

    Args:
        path: the file to write.
        like: any trace with the same layers, experts, kind of probabilities and origin.

    Yields:
        A function that adds a part.

    Raises:
        TraceError: a part that is unlike `like` was added.
    """
    layout = _layout(like)
    header = {**like.origin, **layout, "notes": list(like.notes), _SEALED: True}
    schema = _schema(like).with_metadata({_HEADER: json.dumps(header, allow_nan=False)})
    with replacing(path) as temporary, checksums.parquet_writer(temporary, schema) as file:

        def add(part: Trace) -> None:
            if _layout(part) != layout:
                raise TraceError(f"{path}: this part has {_layout(part)}, expected {layout} as in the parts before")
            file.write_table(_table(part, schema), row_group_size=_ROW_GROUP)

        yield add


def read(path: str | Path) -> Trace:
    """Read a trace file.

    Args:
        path: the file.

    Returns:
        The trace.

    Raises:
        FileNotFoundError: the file does not exist.
        TraceError: not a trace, another version, or impossible figures; the message names the file and the column.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; record or import a trace first, or correct the path")
    sealed = checksums.verify(path, _FIX)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}: not a readable Parquet file ({error}); write the trace again") from error
    if not is_trace(table.schema):
        raise TraceError(f"{path}: no routing trace (its metadata has no {_HEADER.decode()}); give a trace file")
    try:
        header = _header(table.schema)
        if header.pop(_SEALED, False) and not sealed:
            raise TraceError("its checksum is missing or unreadable, so the file was damaged")
        return _trace(table, header)
    except (InputError, pa.ArrowException) as error:
        raise TraceError(f"{path}: {error}; record or import the trace again") from error


def is_trace(schema: pa.Schema) -> bool:
    """Check whether a Parquet file declares itself as a trace.

    Args:
        schema: of the file.

    Returns:
        True if it does.
    """
    return _HEADER in (schema.metadata or {})


def field_faults(fields: Mapping[str, Any]) -> list[str]:
    """Check the fields that describe a trace, in the header of a trace file or in another program's JSON.

    Args:
        fields: those that have to be there and any of the optional ones.

    Returns:
        What is wrong with them.
    """
    faults = []
    for name in ("num_layers", "num_experts", "top_k"):
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(f"{name} is {value!r}, expected a whole number of at least 1")
    for name in ("ranked", "entropy"):
        if not isinstance(fields.get(name, False), bool):
            faults.append(f"{name} is {fields[name]!r}, expected true or false")
    if fields.get("probs_over") not in (None, "all", "chosen"):
        faults.append(f"probs_over is {fields['probs_over']!r}, expected 'all', 'chosen' or null")
    if fields.get("scores") not in (None, *SCORES):
        faults.append(f"scores is {fields['scores']!r}, expected one of {', '.join(SCORES)}")
    for name in ("notes", "document_group", "document_id", "token_strings"):
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            faults.append(f"{name} is not a list of strings")
    return faults


def _faults(trace: Trace) -> Iterable[str]:
    """Everything that does not fit together. Shapes come first, since nothing else can be checked without them."""
    n, shape = len(trace.token_id), trace.experts.shape
    if len(shape) != 3 or shape[0] != n or 0 in shape[1:]:
        yield f"experts has shape {list(shape)}, expected [{n}, layers, experts per token]"
        return
    for name in ("document", "position"):
        if getattr(trace, name).shape != (n,):
            yield f"{name} has shape {list(getattr(trace, name).shape)}, expected [{n}]"
            return
    if len(trace.document_ids) != len(trace.groups):
        yield f"{len(trace.document_ids)} document ids but {len(trace.groups)} groups"
    if len(set(trace.document_ids)) < len(trace.document_ids):
        yield "document_ids names a document twice"
    if (trace.probs is None) != (trace.probs_over is None):
        yield f"probs_over is {trace.probs_over!r} but probs is {'missing' if trace.probs is None else 'there'}"
    if trace.probs is not None and trace.probs.shape != shape:
        yield f"probs has shape {list(trace.probs.shape)}, expected that of experts, {list(shape)}"
    if trace.entropy is not None and trace.entropy.shape != shape[:2]:
        yield f"entropy has shape {list(trace.entropy.shape)}, expected {list(shape[:2])}"
        return
    if trace.probs is not None and not trace.ranked:
        yield "ranked is False but there are probabilities: sort each token's experts by them"
    if trace.scores not in SCORES[:-1]:
        yield f"scores is {trace.scores!r}, expected one of {', '.join(SCORES[:-1])}"
    if n == 0:
        return
    if trace.token_id.min() < 0:
        yield "token_id holds a negative id"
    captured = np.any(trace.experts != -1, axis=(0, 2))
    if not captured.any():
        yield "experts is -1 everywhere: no layer was captured"
        return
    experts = trace.experts if captured.all() else trace.experts[:, captured]
    if experts.min() < 0 or experts.max() >= trace.num_experts:
        yield f"experts holds {experts.min()} to {experts.max()}, expected 0 to {trace.num_experts - 1}"
    if trace.document.min() < 0 or trace.document.max() >= len(trace.document_ids):
        yield f"document holds an index outside its {len(trace.document_ids)} documents"
    same = trace.document[1:] == trace.document[:-1]
    if 1 + int(np.sum(~same)) != len(np.unique(trace.document)):
        yield "document: the tokens of a document are not adjacent"
    if np.any(same & (trace.position[1:] <= trace.position[:-1])):
        yield "position does not rise within a document"
    if trace.entropy is not None:
        entropy = trace.entropy[:, captured]
        if not np.all((entropy >= -1e-3) & (entropy <= math.log(trace.num_experts) + 1e-3)):  # NaN fails too
            yield f"entropy holds figures outside 0 to ln {trace.num_experts} nats"
    ordered = np.sort(experts, axis=-1)
    if np.any(ordered[..., 1:] == ordered[..., :-1]):
        yield "experts names an expert twice for one token"
    if trace.probs is not None and trace.probs.shape == shape:
        yield from _probability_faults(trace.probs if captured.all() else trace.probs[:, captured], trace.probs_over)


def _probability_faults(probs: np.ndarray, over: str | None) -> Iterable[str]:
    """What is wrong with probabilities [N, L, K]."""
    if not np.all((probs >= 0) & (probs <= 1 + 1e-3)):  # NaN fails too
        yield "probs holds what is no probability"
        return
    if np.any(probs[..., 1:] > probs[..., :-1]):
        yield "probs does not fall: sort each token's experts by probability"
        return
    sums = probs.sum(axis=-1, dtype=np.float64)
    least, most = float(sums.min()), float(sums.max())
    what = "they are not probabilities, so say what they are (`scores` in analysis.traces.importing)"
    if over == "chosen" and (least < 1 - TOLERANCE or most > 1 + TOLERANCE):
        yield f"probs add up to {least:.3g} to {most:.3g} over the chosen experts, expected 1: {what}"
    if over == "all" and most > 1 + TOLERANCE:
        yield f"probs add up to as much as {most:.3g}, expected at most 1: {what}"


def _layout(trace: Trace) -> dict[str, Any]:
    """The fields of the header besides origin and notes."""
    shape = {"num_layers": trace.num_layers, "num_experts": trace.num_experts, "top_k": trace.top_k}
    known: dict[str, Any] = {"ranked": trace.ranked, "probs_over": trace.probs_over}
    known |= {"scores": "none" if trace.probs is None else trace.scores, "entropy": trace.entropy is not None}
    return {"version": _VERSION, **shape, **known}


def _header(schema: pa.Schema) -> dict[str, Any]:
    """The checked header of a file."""
    try:
        header = json.loads(schema.metadata[_HEADER])
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise TraceError(f"metadata {_HEADER.decode()} is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise TraceError(f"trace version {version}, this varjax reads {_VERSION}")
    default: dict[str, Any] = {"ranked": None, "probs_over": "", "entropy": False, "scores": "softmax", "notes": []}
    header = default | header
    faults = field_faults(header)
    if faults:
        raise TraceError(f"metadata {'; '.join(faults)}")
    if header["scores"] == "none":
        header["probs_over"] = None
    header["scores"] = {None: "softmax", "none": "softmax"}.get(header["scores"], header["scores"])
    columns = {"document", "group", "position", "token_id", "token_str", "experts"}
    columns |= {name for name, there in (("probs", header["probs_over"]), ("entropy", header["entropy"])) if there}
    missing = sorted(columns - set(schema.names))
    if missing:
        raise TraceError(f"no column {', '.join(missing)}")
    return header


def _schema(trace: Trace) -> pa.Schema:
    size = trace.num_layers * trace.top_k
    text = pa.dictionary(pa.int32(), pa.string())
    columns = [
        ("document", text),
        ("group", text),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token_str", text),
        ("experts", pa.list_(pa.int16(), size)),
    ]
    if trace.probs is not None:
        columns.append(("probs", pa.list_(pa.float32(), size)))
    if trace.entropy is not None:
        columns.append(("entropy", pa.list_(pa.float32(), trace.num_layers)))
    return pa.schema(columns)


def _table(trace: Trace, schema: pa.Schema) -> pa.Table:
    different, which = np.unique(trace.token_id, return_inverse=True)
    texts = pa.array([trace.token_strings.get(one) for one in different.tolist()], pa.string())
    columns = {
        "document": pa.array(trace.document_ids, pa.string()).take(pa.array(trace.document)),
        "group": pa.array(trace.groups, pa.string()).take(pa.array(trace.document)),
        "position": trace.position,
        "token_id": trace.token_id,
        "token_str": texts.take(pa.array(which)),
    }
    for name, kind in (("experts", np.int16), ("probs", np.float32), ("entropy", np.float32)):
        values = getattr(trace, name)
        if values is not None:
            size = schema.field(name).type.list_size
            columns[name] = pa.FixedSizeListArray.from_arrays(values.astype(kind).ravel(), size)
    return pa.table(columns).cast(schema)


def _trace(table: pa.Table, header: dict[str, Any]) -> Trace:
    def whole(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if column.null_count:
            raise TraceError(f"column {name} misses {column.null_count} values")
        return column

    def lists(name: str, kind: pa.DataType, *inner: int) -> np.ndarray:
        flat = whole(name, pc.list_flatten(whole(name, table[name])))
        if len(flat) != len(table) * math.prod(inner):
            wanted = " * ".join(map(str, inner))
            raise TraceError(f"column {name} holds {len(flat)} figures, expected {wanted} per token")
        return flat.cast(kind).to_numpy().reshape(len(table), *inner)

    texts = {name: table[name].cast(pa.string()) for name in ("document", "group", "token_str")}
    token_id, position = (whole(one, table[one]).cast(pa.int32()).to_numpy() for one in ("token_id", "position"))
    document = pc.dictionary_encode(whole("document", texts["document"])).unify_dictionaries()
    ids = document.chunk(0).dictionary.to_pylist() if len(table) else []  # in order of appearance
    index = np.concatenate([chunk.indices.to_numpy() for chunk in document.chunks] or [np.zeros(0)]).astype(np.int32)
    first = np.unique(index, return_index=True)[1]
    layers, chosen = header["num_layers"], (header["num_layers"], header["top_k"])
    experts = lists("experts", pa.int16(), *chosen)
    captured = captured_layers(experts, token_id, header["num_experts"])
    if not captured.all():
        experts = np.where(captured[:, None], experts, np.int16(-1))
    different, at = np.unique(token_id, return_index=True)
    strings = zip(different.tolist(), texts["token_str"].take(pa.array(at)).to_pylist(), strict=True)
    return Trace(
        token_id=token_id,
        document=index,
        position=position,
        experts=experts,
        probs=lists("probs", pa.float32(), *chosen) if header["probs_over"] else None,
        entropy=lists("entropy", pa.float32(), layers) if header["entropy"] else None,
        document_ids=tuple(ids),
        groups=tuple(whole("group", texts["group"]).take(pa.array(first)).to_pylist()),
        token_strings={i: text for i, text in strings if text is not None},
        origin={name: value for name, value in header.items() if name not in _LAYOUT},
        notes=tuple(header["notes"]),
        **{name: header[name] for name in ("num_experts", "ranked", "probs_over", "scores")},
    )
