"""Residual rows on disk: a safetensors file with the tensors of `Answers` and a JSON header.

Letters as in `varjax.answers`. The header (the file's metadata, key `varjax`) holds the format's version, the rules
and whatever the caller gives: fingerprint of the model, provenance. Nothing in the file can run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from varjax.answers import Answers, Rule
from varjax.files import replacing

FORMAT = 1
_OWN = ("format", "rules", "distilled")
_DTYPES = {"keys": np.int32, "mean": np.float32, "count": np.int64, "nonfinite": np.int64}


def write(path: str | Path, answers: Answers, meta: dict[str, Any]) -> None:
    """Writes the answers, the means as float32, whole or not at all.

    Args:
        meta: anything that JSON can hold, under names other than `format`, `rules` and `distilled`.
    """
    taken = sorted(set(meta) & set(_OWN))
    if taken:
        raise ValueError(f"the file itself says {', '.join(taken)}: leave that out of the metadata")
    header = {"format": FORMAT, "rules": answers.rules, "distilled": answers.distilled, **meta}
    tensors = {name: np.ascontiguousarray(getattr(answers, name), dtype) for name, dtype in _DTYPES.items()}
    with replacing(Path(path)) as part:
        save_file(tensors, part, metadata={"varjax": json.dumps(header)})


def read(path: str | Path) -> tuple[Answers, dict[str, Any]]:
    """What `write` wrote: the answers (means float32) and the caller's metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; collect residuals first, or mend the path")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("varjax", "null"))
            tensors = {name: file.get_tensor(name) for name in _DTYPES if name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); collect the residuals again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise ValueError(f"{path}: expected residuals of format {FORMAT}, found {found}; collect them again")

    try:
        rules, distilled = tuple(Rule(*rule) for rule in header["rules"]), bool(header["distilled"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: the header lacks its rules ({error!r}); collect the residuals again") from error
    _check_shapes(path, tensors, len(rules))
    answers = Answers(rules=rules, distilled=distilled, **tensors)
    return answers, {name: value for name, value in header.items() if name not in _OWN}


def _check_shapes(path: str | Path, tensors: dict[str, np.ndarray], num_rules: int) -> None:
    missing = sorted(set(_DTYPES) - set(tensors))
    if missing:
        raise ValueError(f"{path}: the tensors {', '.join(missing)} are missing; collect the residuals again")
    num_rows, width = (*tensors["keys"].shape, 0, 0)[:2]  # 0 for an axis that is not there
    hidden_size = (*tensors["mean"].shape, 0, 0, 0)[2]
    expected = {
        "keys": (num_rows, width),
        "mean": (num_rules, num_rows, hidden_size),
        "count": (num_rules, num_rows),
        "nonfinite": (num_rules,),
    }
    for name, tensor in tensors.items():
        if tensor.shape != expected[name] or tensor.dtype != _DTYPES[name]:
            raise ValueError(
                f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{np.dtype(_DTYPES[name])} {list(expected[name])}; collect the residuals again"
            )
