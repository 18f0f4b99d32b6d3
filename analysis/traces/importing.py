"""Traces that other programs recorded, as `analysis.traces.trace.Trace`.

Letters: N tokens, D documents, L layers, E experts, K experts per token.

    python -m analysis.traces.importing IN.npz OUT.parquet

The foreign form is two files of one name, to be imitated by whoever has a router's log. `NAME.npz` holds arrays:

| array | shape | what |
|---|---|---|
| `token` | integers [N] | token ids; where `token_strings` is given, the index of the text in it |
| `experts` | integers [N, L, K] | ids of the chosen experts, from 0 |
| `probs` | floats [N, L, K], optional | their probabilities in the same order, whatever that is; float16 will do |
| `document` | integers [N] | which document, from 0 |
| `position` | integers [N], optional | place in the document; else its tokens come in order, without gaps |

`NAME.json` holds an object:

| field | what |
|---|---|
| `num_layers`, `num_experts`, `top_k` | L, E, K |
| `ranked` | optional, without `probs`: whether the experts stand best first; false if not said |
| `probs_over` | optional: `"all"`, softmax over all E experts, or `"chosen"`, over the K; else found out (below) |
| `document_group` | optional, D strings: the domain of each document; else all are of one group, NAME |
| `document_id` | optional, D different strings; else the document's number |
| `token_strings` | optional, a list of strings |
| `model`, `revision`, `dtype`, `tokenizer`, `phase` | optional, where the trace comes from |

Probabilities are taken to be over the chosen where all their sums over K are 1 to within 0.01, else over all experts.
Experts come out best first where there are probabilities. Tokens may come in any order of documents, and of positions
where these are given. Object arrays would need pickle and are refused.
"""

from __future__ import annotations

import argparse
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.command import path_argument, program
from analysis.reports.output import Output
from analysis.traces import trace as trace_file
from analysis.traces.trace import ORIGIN, Trace, TraceError
from varjax.errors import InputError

TOLERANCE = 0.01  # by which the chosen experts' probabilities may miss 1: float16 is good to 0.0005 each


def load(path: str | Path) -> Trace:
    """The trace in a `.npz` of the foreign form or in a trace file (any other name).

    Raises:
        FileNotFoundError, TraceError: as `import_npz` and `analysis.traces.trace.read`.
    """
    return import_npz(path) if Path(path).suffix == ".npz" else trace_file.read(path)


def import_npz(path: str | Path) -> Trace:
    """The trace in `path` and the JSON beside it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        TraceError: they are not of the form above; names the file, the array or field, and the mend.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a foreign trace is NAME.npz with NAME.json beside it")
    arrays, fields = _arrays(path), _fields(beside)
    expected = (len(arrays["token"]), fields["num_layers"], fields["top_k"])
    if arrays["experts"].shape != expected:
        raise TraceError(
            f"{path}: experts has shape {list(arrays['experts'].shape)}, expected {list(expected)} by {beside.name} "
            "(tokens, num_layers, top_k); mend the one that is wrong"
        )
    try:
        return _trace(arrays, fields, path.stem)
    except TraceError as error:
        raise TraceError(f"{path}: {error}; mend the file or its {beside.name}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive, each of the right kind."""
    kinds = {"token": "iu", "experts": "iu", "document": "iu", "position": "iu", "probs": "f"}
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError("it holds a single array")
            names = archive.files
            arrays = {name: archive[name] for name in kinds if name in names}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TraceError(f"{path}: not a readable .npz of plain arrays ({error}); write it with numpy.savez") from error
    missing = [name for name in ("token", "experts", "document") if name not in arrays]
    if missing:
        raise TraceError(f"{path}: no array {', '.join(missing)} (it has {', '.join(names)}); add what is missing")
    for name, array in arrays.items():
        if array.dtype.kind not in kinds[name]:
            expected = "floats" if name == "probs" else "integers"
            raise TraceError(f"{path}: array {name} is {array.dtype}, expected {expected}; convert it")
        if name in ("token", "document", "position") and array.shape != arrays["token"].shape[:1]:
            raise TraceError(
                f"{path}: array {name} has shape {list(array.shape)}, expected one number for each of the "
                f"{len(arrays['token'])} tokens; mend it"
            )
        if array.dtype.kind in "iu" and array.size and not (array.min() >= 0 and array.max() < 2**31):
            raise TraceError(f"{path}: array {name} holds {array.min()} to {array.max()}, expected 0 to 2**31 - 1")
    return arrays


def _fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file, its fields checked."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise TraceError(f"{path}: not valid JSON ({error}); mend the file") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{path}: holds a JSON {type(fields).__name__}, expected an object with num_layers, …")
    faults = []
    for name in ("num_layers", "num_experts", "top_k"):
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(f"{name} is {value!r}, expected a whole number of at least 1")
    for name in ("document_group", "document_id", "token_strings"):
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            faults.append(f"{name} is not a list of strings")
    if not isinstance(fields.get("ranked", False), bool):
        faults.append(f"ranked is {fields['ranked']!r}, expected true or false")
    if fields.get("probs_over") not in (None, "all", "chosen"):
        faults.append(f"probs_over is {fields['probs_over']!r}, expected 'all' or 'chosen'")
    if faults:
        raise TraceError(f"{path}: {'; '.join(faults)}; mend these fields")
    return fields


def _trace(arrays: dict[str, np.ndarray], fields: dict[str, Any], name: str) -> Trace:
    document, probs, experts = arrays["document"], arrays.get("probs"), arrays["experts"]
    num_documents = len(fields.get("document_group") or fields.get("document_id") or ())
    num_documents = num_documents or int(document.max(initial=-1)) + 1
    token_strings = dict(enumerate(fields.get("token_strings", ())))
    if token_strings and int(arrays["token"].max(initial=0)) >= len(token_strings):
        raise TraceError(f"token holds {arrays['token'].max()} but token_strings has only {len(token_strings)} entries")
    if experts.size and experts.max() >= fields["num_experts"]:
        raise TraceError(f"experts holds {experts.max()}, expected 0 to {fields['num_experts'] - 1}")

    position = arrays.get("position")
    order = np.argsort(document, kind="stable") if position is None else np.lexsort((position, document))
    document = document[order]
    if position is None:
        first = np.searchsorted(document, document)
        position = np.arange(len(document)) - first
    else:
        position = position[order]
    experts, probs, probs_over = _best_first(experts[order], None if probs is None else probs[order])
    return Trace(
        token_id=arrays["token"][order].astype(np.int32),
        document=document.astype(np.int32),
        position=position.astype(np.int32),
        experts=experts,
        probs=probs,
        document_ids=tuple(fields.get("document_id") or map(str, range(num_documents))),
        groups=tuple(fields.get("document_group") or [name] * num_documents),
        num_experts=fields["num_experts"],
        ranked=probs is not None or fields.get("ranked", False),
        probs_over=None if probs is None else fields.get("probs_over") or probs_over,
        token_strings=token_strings,
        origin={field: fields[field] for field in ORIGIN if field in fields},
    )


def _best_first(experts: np.ndarray, probs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, Any]:
    """Experts int16 and probabilities float32 [N, L, K], falling, and what the latter seem to be taken over."""
    experts = experts.astype(np.int16)
    if probs is None:
        return experts, None, None
    if probs.shape != experts.shape:
        raise TraceError(f"probs has shape {list(probs.shape)}, expected that of experts, {list(experts.shape)}")
    probs = probs.astype(np.float32)  # exact from float16, so that equal ones stay equal
    if np.any(probs[..., 1:] > probs[..., :-1]):
        falling = np.argsort(-probs, axis=-1, kind="stable")
        experts, probs = (np.take_along_axis(array, falling, axis=-1) for array in (experts, probs))
    ones = np.all(np.abs(probs.sum(axis=-1) - 1) <= TOLERANCE)
    return experts, probs, "chosen" if ones else "all"


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Turn a foreign routing trace into a trace file.")
    parser.add_argument("input", type=path_argument, metavar="IN.npz", help="arrays, with IN.json beside them")
    parser.add_argument(
        "output", type=path_argument, metavar="OUT.parquet", help="the trace file to write, or a directory for it"
    )
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "routing_trace", (".parquet",))
    with output.locked():
        trace = import_npz(args.input)
        trace_file.write(output.main(".parquet"), trace)
    known = "no probabilities" if trace.probs is None else f"probabilities over {trace.probs_over} experts"
    print(
        f"{len(trace.token_id):,} tokens of {len(np.unique(trace.document)):,} documents, {trace.num_layers} layers, "
        f"{trace.top_k} of {trace.num_experts} experts, {known}; written to {output.main('.parquet')}"
    )


if __name__ == "__main__":
    main()
