"""Phase 1 killed and resumed, in parts, on several devices and in several processes: always the result of one run."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from varjax import statsfile

ROOT = Path(__file__).resolve().parents[2]
STATS, ROWS = "routing_stats.parquet", "routing_stats.residuals.safetensors"


@pytest.fixture(scope="module")
def command(model_directory, corpus_file):
    """`command(output, *more)`: Phase 1 on the tiny model as a user would start it."""
    reading = ("--max_length", "16", "--batch_size", "1", "--save_tokens", "400", "--split", "all")
    keys = ("--min_count", "3", "--residual_min_count", "5", "--trace_tokens", "0")
    script = str(ROOT / "experiments" / "01_routing_analysis.py")

    def make(output: Path, *more: str) -> list[str]:
        inputs = ("--model", str(model_directory), "--dataset", str(corpus_file), "--output", str(output))
        return [sys.executable, script, *inputs, *reading, *keys, *more]

    return make


def start(arguments: list[str], devices: int = 1) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """The output of one uninterrupted run on one device."""
    output = tmp_path_factory.mktemp("whole")
    finish(start(command(output)))
    return output


def header(path: Path) -> dict:
    """The metadata of a statistics file without the time at which it was written."""
    meta = json.loads(pq.read_schema(path).metadata[b"varjax"])
    for name in ("time_utc", "command"):
        del meta["provenance"][name]
    return meta


def test_killed_three_times_and_resumed_the_file_is_the_same(command, whole, tmp_path):
    moment = random.Random(0)
    for _ in range(3):
        process = start(command(tmp_path))
        # `keys` is the first checkpoint; from then on the run may die at any time.
        while process.poll() is None and not list(tmp_path.glob("routing_checkpoints/keys/0")):
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(command(tmp_path)))
    assert pq.read_table(tmp_path / STATS).equals(pq.read_table(whole / STATS))
    assert header(tmp_path / STATS) == header(whole / STATS)
    ours, theirs = load_file(tmp_path / ROWS), load_file(whole / ROWS)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert not (tmp_path / "routing_checkpoints").exists()


def assert_equal_up_to_rounding(one: Path, other: Path) -> None:
    (ours, about), (theirs, meta) = statsfile.read(one), statsfile.read(other)
    rows = [{tuple(key): row for row, key in enumerate(stats.keys.tolist())} for stats in (ours, theirs)]
    assert rows[0].keys() == rows[1].keys()
    order = [rows[0][key] for key in rows[1]]
    np.testing.assert_array_equal(ours.count[:, order], theirs.count)
    np.testing.assert_array_equal(ours.top1_counts[:, order], theirs.top1_counts)
    np.testing.assert_array_equal(ours.absent, theirs.absent)
    for name in ("entropy", "confidence"):
        for moment in ("mean", "min", "max"):
            got, wanted = (getattr(getattr(stats, name), moment) for stats in (ours, theirs))
            np.testing.assert_allclose(got[:, order], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            getattr(ours, f"std_{name}")[:, order], getattr(theirs, f"std_{name}"), rtol=1e-6, atol=1e-6
        )
    np.testing.assert_allclose(ours.mean_probs[:, order], theirs.mean_probs, rtol=1e-6, atol=1e-6)
    assert (ours.tokens, ours.documents) == (theirs.tokens, theirs.documents)
    assert about["fingerprint"] == meta["fingerprint"]


def test_eight_devices_give_the_result_of_one(command, whole, tmp_path):
    finish(start(command(tmp_path), devices=8))
    assert_equal_up_to_rounding(tmp_path / STATS, whole / STATS)
    ours, theirs = load_file(tmp_path / ROWS), load_file(whole / ROWS)
    np.testing.assert_array_equal(ours["count"], theirs["count"])
    np.testing.assert_allclose(ours["mean"], theirs["mean"], atol=1e-5)


def test_two_processes_give_the_result_of_one(command, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    finish(
        *(
            start(command(tmp_path, "--coordinator", address, "--num_processes", "2", "--process_id", str(index)), 2)
            for index in range(2)
        )
    )
    assert_equal_up_to_rounding(tmp_path / STATS, whole / STATS)
    assert (tmp_path / ROWS).is_file()


def test_runs_merged_equal_one(command, whole, tmp_path):
    """Runs over parts of a corpus have keys of their own; here both are over the whole, so everything counts twice."""
    finish(start(command(tmp_path / "twice", "--merge", str(whole), str(whole / STATS))))
    (twice, _), (once, _) = statsfile.read(tmp_path / "twice" / STATS), statsfile.read(whole / STATS)
    np.testing.assert_array_equal(twice.count, 2 * once.count)
    np.testing.assert_allclose(twice.entropy.mean, once.entropy.mean, rtol=1e-12)
    np.testing.assert_allclose(twice.std_entropy, once.std_entropy, rtol=1e-6, atol=1e-9)
    ours, theirs = load_file(tmp_path / "twice" / ROWS), load_file(whole / ROWS)
    np.testing.assert_array_equal(ours["count"], 2 * theirs["count"])
    np.testing.assert_allclose(ours["mean"], theirs["mean"], atol=1e-6)
    strings = statsfile.token_strings(whole / STATS)
    assert strings and statsfile.token_strings(tmp_path / "twice" / STATS) == strings


def test_a_run_is_not_resumed_with_other_settings(command, tmp_path):
    process = start(command(tmp_path))
    while process.poll() is None and not list(tmp_path.glob("routing_checkpoints/keys/0")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    other = start(command(tmp_path, "--orders", "1"))
    output, _ = other.communicate(timeout=300)
    assert other.returncode == 1
    assert "belong to a run with" in output and "--output" in output


def test_residual_rows_need_their_order(command, tmp_path):
    process = start(command(tmp_path, "--orders", "1", "--residual_orders", "2"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "error: residual orders [2] are not among the orders (1,)" in output
