"""Answers on disk: a safetensors file with the tensors of `Answers` and a JSON header.

Letters as in `varjax.answers`. The header (the file's metadata, key `varjax`) holds the format's version, the layers,
as `statistics` the identity of the statistics that the answers belong to (`varjax.statsfile.identity`), and whatever
the caller gives: fingerprint of the model, provenance. The file is sealed (`varjax.checksums`), and reading verifies
it. Nothing in the file can run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from varjax import checksums, statsfile
from varjax.affine import Maps
from varjax.answers import Answers
from varjax.errors import InputError, Library
from varjax.files import replacing
from varjax.routing import NO_ANSWER

safetensors = Library("safetensors")

FORMAT = 4  # 1 held one mean per key and rule; 2 had no checksum and did not name its statistics; 3 no inputs
_WITHOUT_INPUTS = 3  # is read as well: answers that are constant
_OWN = ("format", "answer_layers", "distilled")
_FIX = "restore the file, or collect the answers again"
_TENSORS = {  # dtype, and the letters of its axes
    "keys": (np.int32, "RC"),
    "entry": (np.int32, "ARE"),
    "mean": (np.float32, "AND"),
    "mass": (np.float64, "AN"),
    "m2": (np.float64, "AN"),
    "count": (np.int64, "AN"),
    "nonfinite": (np.int64, "A"),
    "typical": (np.float64, "A"),
    "outliers": (np.int64, "A2"),
    "inputs": (np.float32, "ANX"),
}
_MAPS = {  # X is D in a file that has them
    "read": (np.float32, "AXr"),
    "mix": (np.float32, "AErr"),
    "write": (np.float32, "ArD"),
    "unexplained": (np.float64, "AE"),
}


def write(path: str | Path, answers: Answers, meta: dict[str, Any]) -> None:
    """Write answers, the means as float32, whole or not at all.

    Args:
        path: replaced if it exists.
        answers: to write.
        meta: what JSON can hold, under names other than `format`, `answer_layers` and `distilled`. Without
            `statistics`, the identity of those that the answers belong to, no table can be built from the file.

    Raises:
        InputError: `meta` holds one of these names.
    """
    taken = sorted(set(meta) & set(_OWN))
    if taken:
        raise InputError(f"the file itself says {', '.join(taken)}: leave that out of the metadata")
    header = {"format": FORMAT, "answer_layers": answers.layers, "distilled": answers.distilled, **meta}
    tensors = {name: np.ascontiguousarray(getattr(answers, name), dtype) for name, (dtype, _) in _TENSORS.items()}
    if answers.maps is not None:
        tensors |= {name: np.ascontiguousarray(getattr(answers.maps, name), kind) for name, (kind, _) in _MAPS.items()}
    with replacing(Path(path)) as part:
        checksums.write_safetensors(part, tensors, {"varjax": json.dumps(header)})


def read(path: str | Path) -> tuple[Answers, dict[str, Any]]:
    """Read what `write` wrote.

    Args:
        path: a safetensors file.

    Returns:
        The answers (means float32) and the caller's metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: naming the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; collect the answers first, or correct the path")
    sealed = checksums.verify(path, _FIX)
    header = _header(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in (_TENSORS | _MAPS) if name in file.keys()}  # noqa: SIM118
    try:
        layers, distilled = tuple(int(layer) for layer in header["answer_layers"]), bool(header["distilled"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header lacks its layers ({error!r}); collect the answers again") from error
    if header["format"] == _WITHOUT_INPUTS and "count" in tensors:
        layers_read, count = len(tensors["count"]), tensors["count"].shape
        tensors["inputs"], tensors["typical"] = np.zeros((*count, 0), np.float32), np.zeros(layers_read)
        tensors["outliers"] = np.zeros((layers_read, 2), np.int64)
    _check_shapes(path, tensors, len(layers))
    if not sealed:
        raise InputError(f"{path}: its checksum is missing or unreadable, so the file was damaged; {_FIX}")
    parts = {name: tensors.pop(name) for name in _MAPS if name in tensors}
    answers = Answers(layers=layers, distilled=distilled, maps=Maps(**parts) if parts else None, **tensors)
    return answers, {name: value for name, value in header.items() if name not in _OWN}


def check_statistics(path: str | Path, statistics: str | Path) -> None:
    """Check that the answers in a file belong to the routing statistics in another; reads the headers alone.

    Args:
        path: of the answers.
        statistics: of the statistics.

    Raises:
        FileNotFoundError: one of the files does not exist.
        InputError: they belong to other statistics, or one of the files cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; collect the answers first, or correct the path")
    theirs, ours = _header(path).get("statistics"), statsfile.identity(statistics)
    if theirs is None or theirs != ours:
        belong = "name no statistics" if theirs is None else f"belong to other statistics, {str(theirs)[:12]}…"
        raise InputError(
            f"{path}: these answers {belong}, while {statistics} has the identity {ours[:12]}…; they would mix "
            "different texts: give the statistics that the answers were collected with, or collect both again"
        )


def _header(path: str | Path) -> dict[str, Any]:
    """The header of an answers file of this format."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("varjax", "null"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); collect the answers again") from error
    if not isinstance(header, dict) or header.get("format") not in (_WITHOUT_INPUTS, FORMAT):
        found = header.get("format") if isinstance(header, dict) else None
        raise InputError(f"{path}: expected answers of format {FORMAT}, found {found}; collect them again")
    return header


def _check_shapes(path: str | Path, tensors: dict[str, np.ndarray], num_layers: int) -> None:
    wanted = _TENSORS | (_MAPS if set(_MAPS) & set(tensors) else {})
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise InputError(f"{path}: the tensors {', '.join(missing)} are missing; collect the answers again")
    sizes = {"A": num_layers, "2": 2}
    for name, (dtype, axes) in wanted.items():
        tensor = tensors[name]
        for axis, size in zip(axes, tensor.shape, strict=False):
            sizes.setdefault(axis, size)  # the first tensor with an axis says how long it is
        expected = tuple(sizes.get(axis, 0) for axis in axes)
        if tensor.shape != expected or tensor.dtype != dtype:
            raise InputError(
                f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{np.dtype(dtype)} {list(expected)}; collect the answers again"
            )
    if tensors["entry"].max(initial=NO_ANSWER) >= sizes["N"] or tensors["entry"].min(initial=0) < NO_ANSWER:
        raise InputError(f"{path}: tensor entry names answers beyond the {sizes['N']} there are; collect them again")
