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
from varjax.answers import Answers
from varjax.errors import InputError, Library
from varjax.files import replacing
from varjax.routing import NO_ANSWER

safetensors = Library("safetensors")

FORMAT = 3  # 1 held one mean per key and rule; 2 had no checksum and did not name its statistics
_OWN = ("format", "answer_layers", "distilled")
_FIX = "restore the file, or collect the answers again"
_DTYPES = {
    "keys": np.int32,
    "entry": np.int32,
    "mean": np.float32,
    "mass": np.float64,
    "m2": np.float64,
    "count": np.int64,
    "nonfinite": np.int64,
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
    tensors = {name: np.ascontiguousarray(getattr(answers, name), dtype) for name, dtype in _DTYPES.items()}
    with replacing(Path(path)) as part:
        checksums.write_safetensors(part, tensors, {"varjax": json.dumps(header)})


def read(path: str | Path) -> tuple[Answers, dict[str, Any]]:
    """Read what `write` wrote.

    Args:
        path: a safetensors file.

    Returns:
        The answers (means float32) and the caller's metadata.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: naming the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; collect the answers first, or correct the path")
    sealed = checksums.verify(path, _FIX)
    header = _header(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in _DTYPES if name in file.keys()}  # noqa: SIM118
    try:
        layers, distilled = tuple(int(layer) for layer in header["answer_layers"]), bool(header["distilled"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header lacks its layers ({error!r}); collect the answers again") from error
    _check_shapes(path, tensors, len(layers))
    if not sealed:
        raise InputError(f"{path}: its checksum is missing or unreadable, so the file was damaged; {_FIX}")
    answers = Answers(layers=layers, distilled=distilled, **tensors)
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
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise InputError(f"{path}: expected answers of format {FORMAT}, found {found}; collect them again")
    return header


def _check_shapes(path: str | Path, tensors: dict[str, np.ndarray], num_layers: int) -> None:
    missing = sorted(set(_DTYPES) - set(tensors))
    if missing:
        raise InputError(f"{path}: the tensors {', '.join(missing)} are missing; collect the answers again")
    num_rows, width = (*tensors["keys"].shape, 0, 0)[:2]  # 0 for an axis that is not there
    num_answers, hidden_size = (*tensors["mean"].shape, 0, 0, 0)[1:3]
    num_experts = (*tensors["entry"].shape, 0, 0, 0)[2]
    of_answers = (num_layers, num_answers)
    expected = {
        "keys": (num_rows, width),
        "entry": (num_layers, num_rows, num_experts),
        "mean": (*of_answers, hidden_size),
        "mass": of_answers,
        "m2": of_answers,
        "count": of_answers,
        "nonfinite": (num_layers,),
    }
    for name, tensor in tensors.items():
        if tensor.shape != expected[name] or tensor.dtype != _DTYPES[name]:
            raise InputError(
                f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{np.dtype(_DTYPES[name])} {list(expected[name])}; collect the answers again"
            )
    if tensors["entry"].max(initial=NO_ANSWER) >= num_answers or tensors["entry"].min(initial=0) < NO_ANSWER:
        raise InputError(f"{path}: tensor entry names answers beyond the {num_answers} there are; collect them again")
