"""Provenance says where a result comes from; result files are plain JSON, whole or not at all."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.report.provenance import hash_json, provenance, write_json
from varjax.checksums import read_json


@dataclass(frozen=True)
class Result:
    loss: float
    shares: np.ndarray
    path: Path


def test_provenance_names_versions_device_command_seed_and_extras():
    record = provenance(seed=3, model={"hash": "abc"})
    assert record["versions"]["jax"] == jax.__version__
    assert record["device_count"] == jax.device_count()
    assert record["seed"] == 3
    assert record["model"] == {"hash": "abc"}
    assert record["time_utc"].endswith("+00:00")
    assert "pytest" in record["command"] or "python" in record["command"]
    assert json.loads(json.dumps(record)) == record


def test_results_become_plain_json_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "new" / "result.json"
    result = Result(float("nan"), np.array([0.25, np.inf], np.float32), Path("a/b"))
    write_json(path, {"result": result, "count": np.int64(3), "array": jnp.arange(2), "flag": np.True_})
    assert read_json(path, "") == {
        "result": {"loss": None, "shares": [0.25, None], "path": "a/b"},
        "count": 3,
        "array": [0, 1],
        "flag": True,
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"good": 1})
    with pytest.raises(TypeError, match=r"\$\.results\[1\]: object has no JSON form"):
        write_json(path, {"results": [1, object()]})
    assert read_json(path, "") == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_hash_json_is_of_the_content():
    assert hash_json({"a": 1, "b": [1.5, None]}) == hash_json({"b": (np.float64(1.5), np.nan), "a": np.int32(1)})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
