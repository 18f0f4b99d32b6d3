"""Traces that other programs recorded, as `analysis.traces.trace.Trace`.

Letters: N tokens, D documents, L layers, E experts, K experts per token.

    python -m analysis.traces.importing IN.npz OUT.parquet

The foreign form is two files of one name, which anybody can write from a router's log. `NAME.npz` holds arrays:

| array | shape | what |
|---|---|---|
| `token` | integers [N] | token ids; where `token_strings` is given, the index of the text in it |
| `experts` | integers [N, L, K] | ids of the chosen experts, from 0 (more forms below) |
| `probs` | floats [N, L, K], optional | their scores in the same order, whatever that is; float16 will do |
| | or floats [N, L, E] | the scores of all experts, by id |
| `document` | integers [N] | which document: any numbers, or places in `document_group` and `document_id` |
| `position` | integers [N], optional | place in the document; else its tokens come in order, without gaps |

`NAME.json` holds an object:

| field | what |
|---|---|
| `num_layers`, `num_experts`, `top_k` | L, E, K |
| `ranked` | optional, without `probs`: whether the experts are sorted best first; default false |
| `scores` | optional: what `probs` holds (below) |
| `probs_over` | optional: `"all"`, over all E experts, or `"chosen"`, over the K; else inferred |
| `document_group` | optional, D strings: the domain of each document; else all are of one group, NAME |
| `document_id` | optional, D different strings; else the document's number |
| `token_strings` | optional, a list of strings |
| `model`, `revision`, `dtype`, `tokenizer`, `phase` | optional, where the trace comes from |

`scores` decides how `probs` become probabilities; the trace and every report on it say so:

| `scores` | `probs` holds | probabilities |
|---|---|---|
| `softmax` | probabilities: over the chosen they add up to 1, over all E to at most 1 (to within 0.01) | as they are |
| `sigmoid` | independent scores from 0 to 1 | divided by their sum over all E if these are given, else over the K |
| | the same with `probs_over` `"all"`, of the K chosen | as they are: divided by the sum over all E already |
| `logits` | any finite numbers | softmax over all E if these are given, else over the K chosen |
| `none` | anything that ranks the experts, the largest first | none: only the order is used |

Without `scores` they are taken for `softmax` if that is possible: they add up to 1 over the K chosen at every token and
in every layer; or to at most 1, and what is missing is no more than the other experts can have, each at most as much as
the last one chosen. Anything else is refused.

Experts come out best first where there are scores. Tokens may come in any order of documents, and of positions where
these are given. Documents are renumbered. Object arrays would need pickle and are refused. Three conventions of serving
programs are supported:

- Rows of `experts` wider than K hold -1 in the rest; so do the same places of `probs`, with any value.
- `experts` (and `probs`) may have one row less than `token` for each document: the last token of a text has not been
  routed yet. Tokens with -1 in every layer have not been routed either. Both are left out of the trace.
- Layers that were not captured: `analysis.traces.capture`.
"""

from __future__ import annotations

import argparse
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from scipy.special import entr, softmax

from analysis.command import path_argument, program
from analysis.report.output import Output
from analysis.traces import trace as trace_file
from analysis.traces.capture import captured_layers, on_all_layers, zero_layers
from analysis.traces.trace import ORIGIN, TOLERANCE, Trace, TraceError, field_faults
from varjax.errors import InputError

_MAX_EXPERTS = 2**15 - 1  # ids are int16
_KINDS = {"token": "iu", "experts": "iu", "document": "iu", "position": "iu", "probs": "f"}  # of the arrays


def load(path: str | Path) -> Trace:
    """Read a trace of any known form.

    Args:
        path: a file whose ending `READERS` knows, or a trace file under any other name.

    Returns:
        The trace.

    Raises:
        FileNotFoundError: the file does not exist.
        TraceError: it cannot be read.
    """
    return READERS.get(Path(path).suffix, trace_file.read)(path)


def import_npz(path: str | Path) -> Trace:
    """Read a trace of the foreign form.

    Args:
        path: the `.npz` file, with the JSON file next to it.

    Returns:
        The trace.

    Raises:
        FileNotFoundError: one of the two files is missing.
        TraceError: they are not of the form above; the message names the file, the array or field, and the fix.
    """
    path = Path(path)
    about = path.with_suffix(".json")
    for file in (path, about):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a foreign trace is NAME.npz with NAME.json next to it")
    arrays, fields = _arrays(path), _fields(about)
    try:
        return _trace(arrays, fields, path.stem)
    except InputError as error:
        raise TraceError(f"{path}: {error}; fix the file or its {about.name}") from error


READERS: dict[str, Callable[[str | Path], Trace]] = {".npz": import_npz}
"""How files of other programs are read, by their ending; a new form is one more function here."""


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive, each of the right kind."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError("it holds a single array")
            names = archive.files
            arrays = {name: archive[name] for name in _KINDS if name in names}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TraceError(f"{path}: not a readable .npz of plain arrays ({error}); write it with numpy.savez") from error
    missing = [name for name in ("token", "experts", "document") if name not in arrays]
    if missing:
        raise TraceError(f"{path}: no array {', '.join(missing)} (it has {', '.join(names)}); add what is missing")
    for name, array in arrays.items():
        if array.dtype.kind not in _KINDS[name]:
            expected = "floats" if name == "probs" else "integers"
            raise TraceError(f"{path}: array {name} is {array.dtype}, expected {expected}; convert it")
        if name in ("token", "document", "position") and array.shape != arrays["token"].shape[:1]:
            raise TraceError(
                f"{path}: array {name} has shape {list(array.shape)}, expected one number for each of the "
                f"{len(arrays['token'])} tokens; fix it"
            )
        least, most = -1 if name == "experts" else 0, 2**63 - 1 if name == "document" else 2**31 - 1
        if name != "probs" and array.size and (array.min() < least or array.max() > most):
            raise TraceError(
                f"{path}: array {name} holds {array.min()} to {array.max()}, expected {least} to {most:,}; fix it"
            )
    return arrays


def _fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file, its fields checked."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise TraceError(f"{path}: not valid JSON ({error}); fix the file") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{path}: holds a JSON {type(fields).__name__}, expected an object with num_layers, …")
    faults = field_faults(fields)
    if not faults and fields["num_experts"] > _MAX_EXPERTS:
        faults.append(f"num_experts is {fields['num_experts']:,}, expected at most {_MAX_EXPERTS:,}")
    if faults:
        raise TraceError(f"{path}: {'; '.join(faults)}; fix these fields")
    return fields


def _trace(arrays: dict[str, np.ndarray], fields: dict[str, Any], name: str) -> Trace:
    num_experts = fields["num_experts"]
    token_strings = dict(enumerate(fields.get("token_strings", ())))
    if token_strings and int(arrays["token"].max(initial=0)) >= len(token_strings):
        raise TraceError(f"token holds {arrays['token'].max()} but token_strings has only {len(token_strings)} entries")
    experts, scores = arrays["experts"], arrays.get("probs")
    if experts.size and experts.max() >= num_experts:
        raise TraceError(f"experts holds {experts.max()}, expected 0 to {num_experts - 1}")
    document, document_ids, groups = _documents(arrays["document"], fields, name)

    position = arrays.get("position")
    order = np.argsort(document, kind="stable") if position is None else np.lexsort((position, document))
    document, token = document[order], arrays["token"][order]
    if position is None:
        position = np.arange(len(document)) - np.searchsorted(document, document)
    else:
        position = position[order]
    routed, rows, notes = _routed(arrays, order, document, fields)
    of_all = (*experts.shape[:2], num_experts)
    if scores is not None and scores.shape not in (experts.shape, of_all):
        raise TraceError(
            f"probs has shape {list(scores.shape)}, expected that of experts, {list(experts.shape)}, or "
            f"{list(of_all)}, one score for each of the {num_experts} experts"
        )
    experts, scores = _without_padding(experts[rows], None if scores is None else scores[rows], fields)
    zeros = zero_layers(experts)  # layers that were not captured
    open_ = np.all(experts[:, ~zeros] == -1, axis=(1, 2)) & ~zeros.all()
    if open_.any() and not open_.all():
        notes.append(f"{open_.sum():,} tokens have -1 in every layer: not routed, and left out.")
        routed, experts = routed[~open_], experts[~open_]
        scores = None if scores is None else scores[~open_]
    document, position, token = document[routed], position[routed], token[routed]

    captured = captured_layers(experts, token, num_experts)
    if np.any(experts[:, captured] == -1):
        raise TraceError("experts holds -1 at some tokens of a layer and not at others; remove these tokens")
    found = _probabilities(experts[:, captured], None if scores is None else scores[:, captured], fields)
    return Trace(
        token_id=token.astype(np.int32),
        document=document.astype(np.int32),
        position=position.astype(np.int32),
        experts=on_all_layers(found.experts, captured, -1, axis=1),
        probs=None if found.probs is None else on_all_layers(found.probs, captured, 0, axis=1),
        document_ids=document_ids,
        groups=groups,
        num_experts=num_experts,
        ranked=scores is not None or fields.get("ranked", False) or fields["top_k"] == 1,
        probs_over=found.over,
        scores=found.scores,
        entropy=None if found.entropy is None else on_all_layers(found.entropy, captured, np.nan, axis=1),
        token_strings=token_strings,
        origin={field: fields[field] for field in ORIGIN if field in fields},
        notes=(*notes, *found.notes),
    )


def _documents(
    document: np.ndarray, fields: dict[str, Any], name: str
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Documents int64 [N] numbered from 0 without gaps, their ids, and their groups."""
    different, dense = np.unique(document, return_inverse=True)
    ids, groups = fields.get("document_id"), fields.get("document_group")
    for field, listed in (("document_id", ids), ("document_group", groups)):
        if listed and len(different) and int(different[-1]) >= len(listed):
            raise TraceError(
                f"document holds {different[-1]}, outside its {len(listed)} documents: it is a place in {field}, from 0"
            )
    if ids and groups and len(ids) != len(groups):
        raise TraceError(f"{len(ids)} document ids but {len(groups)} groups")
    if ids and len(set(ids)) < len(ids):
        raise TraceError("document_id names a document twice")
    numbers = different.tolist()
    return (
        dense,
        tuple(ids[number] if ids else str(number) for number in numbers),
        tuple(groups[number] if groups else name for number in numbers),
    )


def _routed(
    arrays: dict[str, np.ndarray], order: np.ndarray, document: np.ndarray, fields: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Which tokens have a row of `experts`, and which row that is.

    Args:
        arrays: as stored.
        order: int64 [N], of the tokens as stored, by document and position.
        document: int64 [N], in that order.
        fields: of the JSON file.

    Returns:
        int64 [n], places in that order; int64 [n], rows; notes.
    """
    shape, tokens = arrays["experts"].shape, len(order)
    layers, top_k = fields["num_layers"], fields["top_k"]
    last = np.append(document[1:] != document[:-1], True)[:tokens]
    fewer = tokens - int(last.sum())
    if len(shape) != 3 or shape[1] != layers or shape[2] < top_k or shape[0] not in (tokens, fewer):
        raise TraceError(
            f"experts has shape {list(shape)}, expected {[tokens, layers, top_k]} (tokens, num_layers, top_k), or "
            f"{fewer} rows where the last token of each of the {last.sum()} documents has none, or more columns filled "
            "with -1"
        )
    if shape[0] == tokens:
        return np.arange(tokens), order, []
    has_row = np.empty(tokens, bool)
    has_row[order] = ~last
    note = f"The last token of each of the {last.sum():,} documents has no routing, and is left out."
    return np.flatnonzero(~last), (np.cumsum(has_row) - 1)[order[~last]], [note]


def _without_padding(
    experts: np.ndarray, scores: np.ndarray | None, fields: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Experts int16 [n, L, K] without columns of -1, and scores [n, L, K or E] in the same order."""
    num_experts, top_k = fields["num_experts"], fields["top_k"]
    if experts.shape[-1] == top_k:
        return experts.astype(np.int16), scores
    if scores is not None and experts.shape[-1] == num_experts:
        raise TraceError(
            f"probs has {num_experts} columns, which is both the width of the padded experts and the number of "
            f"experts, so its order is not known; give experts with {top_k} columns"
        )
    used = np.sum(experts >= 0, axis=-1)
    wrong = (used != top_k) & (used != 0) & ~zero_layers(experts)
    if wrong.any():
        raise TraceError(
            f"experts has {experts.shape[-1]} columns, with {used[wrong].min()} to {used[wrong].max()} ids at some "
            f"tokens, expected top_k={top_k} ids and -1 in the rest"
        )
    front = np.argsort(experts < 0, axis=-1, kind="stable")[..., :top_k]
    if scores is not None and scores.shape == experts.shape:
        scores = np.take_along_axis(scores, front, axis=-1)
    return np.take_along_axis(experts, front, axis=-1).astype(np.int16), scores


@dataclass(frozen=True)
class _Found:
    """What experts and scores turned out to be."""

    experts: np.ndarray  # int16 [n, L, K], best first where there are scores
    probs: np.ndarray | None = None  # float32 [n, L, K], falling
    over: Literal["all", "chosen"] | None = None
    entropy: np.ndarray | None = None  # float32 [n, L], where the scores of all experts are known
    scores: Literal["softmax", "sigmoid", "logits"] = "softmax"
    notes: tuple[str, ...] = ()


def _probabilities(experts: np.ndarray, values: np.ndarray | None, fields: dict[str, Any]) -> _Found:
    """The probabilities that scores [n, L, K or E] represent, according to what the file declares."""
    declared, over = fields.get("scores"), fields.get("probs_over")
    if values is None:
        if declared not in (None, "none"):
            raise TraceError(f"scores is {declared!r} but there is no array probs; add it, or remove the field")
        return _Found(experts)
    of_all = values.shape[-1] != fields["top_k"]
    if of_all and over == "chosen":
        raise TraceError(f"probs_over is 'chosen' but probs has the scores of all {values.shape[-1]} experts")
    if not values.size:
        return _Found(experts, np.zeros(experts.shape, np.float32), over or "all")
    values = values.astype(np.float32)  # exact from float16, so that equal ones stay equal
    if not np.all(np.isfinite(values)):
        raise TraceError("probs holds NaN or infinity; remove these tokens")
    if declared == "none":
        sorted_experts, _ = _best_first(experts, _of_chosen(values, experts) if of_all else values)
        return _Found(sorted_experts, notes=("The trace's scores are not probabilities: only their order was used.",))
    probs, whose, notes = _CONVERSIONS[declared or "softmax"](values, fields, of_all)
    entropy = None
    if of_all or fields["top_k"] == fields["num_experts"]:  # then the chosen experts are all
        whose = "all"
        entropy = np.maximum(entr(probs, dtype=np.float64).sum(axis=-1), 0).astype(np.float32)
    if of_all:
        probs = _of_chosen(probs, experts)
    experts, probs = _best_first(experts, probs)
    return _Found(experts, probs, whose, entropy, declared or "softmax", notes)


_Converted = tuple[np.ndarray, Any, tuple[str, ...]]  # probabilities shaped as the values, what they are over, notes


def _from_softmax(values: np.ndarray, fields: dict[str, Any], of_all: bool) -> _Converted:
    sums = values.sum(axis=-1, dtype=np.float64)
    ones = bool(np.all(np.abs(sums - 1) <= TOLERANCE))
    over = "all" if of_all else fields.get("probs_over") or ("chosen" if ones else "all")
    fits = values.min() >= 0 and values.max() <= 1 + TOLERANCE and sums.max() <= 1 + TOLERANCE
    if of_all or over == "chosen":
        fits = fits and ones
    elif fields.get("scores") is None:  # the others have at most as much as the last one chosen, each
        most = (fields["num_experts"] - fields["top_k"]) * values.min(axis=-1)
        fits = fits and bool(np.all(1 - sums <= most + TOLERANCE))
    if not fits:
        _refuse(values, fields, of_all, "softmax probabilities")
    if fields.get("scores") is not None:
        return values, over, ()
    whose = "all experts" if over == "all" else "the chosen experts"
    note = f"The trace does not declare what its scores are; taken for a softmax over {whose}, whose sums they have."
    return values, over, (note,)


def _from_sigmoid(values: np.ndarray, fields: dict[str, Any], of_all: bool) -> _Converted:
    sums = values.sum(axis=-1, keepdims=True, dtype=np.float64)
    divided = not of_all and fields.get("probs_over") == "all"
    if values.min() < 0 or values.max() > 1:
        _refuse(values, fields, of_all, "sigmoid scores, which are between 0 and 1")
    if sums.min() <= 0:
        _refuse(values, fields, of_all, "sigmoid scores, of which one is above 0")
    if divided and sums.max() > 1 + TOLERANCE:
        _refuse(values, fields, of_all, "sigmoid scores that were divided by their sum over all experts")
    if not divided:
        values = (values / sums).astype(np.float32)
    over = "all" if of_all else fields.get("probs_over") or "chosen"
    whose = "all" if over == "all" else f"the {fields['top_k']} chosen"
    note = (
        f"Probabilities are sigmoid scores divided by their sum over {whose} experts: a definition, not the router's "
        "own. Thresholds on entropy and confidence were published for a softmax."
    )
    return values, over, (note,)


def _from_logits(values: np.ndarray, fields: dict[str, Any], of_all: bool) -> _Converted:
    if not of_all and fields.get("probs_over") == "all" and fields["top_k"] < fields["num_experts"]:
        raise TraceError("probs_over is 'all' but logits are given for the chosen experts only; give those of all")
    whose = "all" if of_all else f"the {fields['top_k']} chosen"
    note = f"Probabilities are the softmax of the trace's logits over {whose} experts."
    probs = softmax(values.astype(np.float64), axis=-1).astype(np.float32)
    return probs, "all" if of_all else "chosen", (note,)


_CONVERSIONS = {"softmax": _from_softmax, "sigmoid": _from_sigmoid, "logits": _from_logits}


def _refuse(values: np.ndarray, fields: dict[str, Any], of_all: bool, what: str) -> NoReturn:
    sums = values.sum(axis=-1, dtype=np.float64)
    whose = "all" if of_all else "the chosen"
    over = "" if fields.get("probs_over") is None else f" over {fields['probs_over']!r} (probs_over)"
    raise TraceError(
        f"array probs holds {values.min():.3g} to {values.max():.3g}, in sums over {whose} experts of {sums.min():.3g} "
        f"to {sums.max():.3g}, so it does not hold {what}{over}. Declare in the JSON file what it holds: "
        '"scores": "softmax", "sigmoid", "logits", or "none" if only the order has a meaning'
    )


def _of_chosen(values: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """[n, L, K]: the values [n, L, E] of the chosen experts."""
    return np.take_along_axis(values, experts.astype(np.int64), axis=-1)


def _best_first(experts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts and values [n, L, K] by falling values; equal ones keep their order."""
    if np.any(values[..., 1:] > values[..., :-1]):
        falling = np.argsort(-values, axis=-1, kind="stable")
        experts, values = (np.take_along_axis(array, falling, axis=-1) for array in (experts, values))
    return experts, values


@program
def main(arguments: Sequence[str] | None) -> None:
    """Turn a foreign trace into a trace file.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description="Convert a routing trace from another program into a trace file.")
    parser.add_argument(
        "input",
        type=path_argument,
        metavar="IN.npz",
        help="file with the arrays of the trace; IN.json must be next to it",
    )
    parser.add_argument(
        "output", type=path_argument, metavar="OUT.parquet", help="trace file to write, or a directory for it"
    )
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "routing_trace", (".parquet",))
    with output.locked():
        trace = READERS.get(args.input.suffix, import_npz)(args.input)
        trace_file.write(output.main(".parquet"), trace)
    known = "no probabilities" if trace.probs is None else f"probabilities over {trace.probs_over} experts"
    print(
        f"{len(trace.token_id):,} tokens of {len(np.unique(trace.document)):,} documents, {trace.num_layers} layers, "
        f"{trace.top_k} of {trace.num_experts} experts, {known}; written to {output.main('.parquet')}"
    )
    for remark in trace.remarks():
        print(remark)


if __name__ == "__main__":
    main()
