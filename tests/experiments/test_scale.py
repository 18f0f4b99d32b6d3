"""Phase 1 killed and resumed, in parts, on several devices and in several processes: always the result of one run."""

import json
import os
import random
import shutil
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
from varjax.answers import bytes_a_pair

ROOT = Path(__file__).resolve().parents[2]
STATS, ROWS = "routing_stats.parquet", "routing_stats.answers.safetensors"


@pytest.fixture(scope="module")
def command(model_directory, even_corpus):
    """`command(output, *more)`: Phase 1 on the tiny model as a user would start it."""
    reading = ("--max_length", "16", "--batch_size", "1", "--save_tokens", "400")
    reading += ("--split", "all", "--num_samples", "160")
    keys = ("--min_count", "3", "--answer_min_count", "5", "--trace_tokens", "0")
    script = str(ROOT / "experiments" / "01_routing_analysis.py")

    def make(output: Path, *more: str) -> list[str]:
        inputs = ("--model", str(model_directory), "--dataset", str(even_corpus), "--output", str(output))
        return [sys.executable, script, *inputs, *reading, *keys, *more]

    return make


def start(arguments: list[str], devices: int = 1) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def whole(script, command, tmp_path_factory) -> Path:
    """The output of one uninterrupted run on one device."""
    output = tmp_path_factory.mktemp("whole")
    script(*command(output)[1:])
    return output


def header(path: Path) -> dict:
    """The metadata of a statistics file without the time at which it was written."""
    meta = json.loads(pq.read_schema(path).metadata[b"varjax"])
    for name in ("time_utc", "command"):
        del meta["provenance"][name]
    return meta


def test_killed_twice_and_resumed_with_the_same_settings_alone_the_file_is_the_same(script, command, whole, tmp_path):
    moment, work = random.Random(0), tmp_path / "routing_checkpoints" / "process-0"
    for stage in ("statistics/checkpoint.safetensors", "answers/checkpoint.safetensors"):  # while either is collected
        process = start(command(tmp_path))
        while process.poll() is None and not list(work.glob(stage)):
            time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.5))
        assert process.poll() is None, process.communicate()[0]  # it was killed in the middle
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with pytest.raises(SystemExit) as stop:
        script(*command(tmp_path, "--min_count", "4")[1:])
    assert "of a run with settings.keys.min_count = 3 (here 4); give the same arguments" in str(stop.value)
    script(*command(tmp_path)[1:])
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


def joined(arguments: list[str], devices: int) -> list[subprocess.Popen]:
    """Two processes that run one program together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--num_processes", "2")
    return [start([*arguments, *together, "--process_id", str(index)], devices) for index in range(2)]


@pytest.mark.slow
def test_joined_processes_go_on_after_a_kill(command, whole, tmp_path):
    run = command(tmp_path, "--mesh", "data=4,model=2")
    first, second = joined(run, devices=4)
    work = tmp_path / "routing_checkpoints" / "process-0"
    while first.poll() is None and not list(work.glob("statistics/checkpoint.safetensors")):
        time.sleep(0.005)
    second.kill()
    second.communicate()
    output, _ = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "Start all of them again with the same arguments" in output or "another task died" in output
    finish(*joined(run, devices=4))
    assert_equal_up_to_rounding(tmp_path / STATS, whole / STATS)


def test_joined_processes_are_one_program(command, whole, script, model_directory, even_corpus, tmp_path):
    first, second = joined(command(tmp_path, "--mesh", "data=4,model=2"), devices=4)
    silent, _ = second.communicate(timeout=300)
    finish(first)
    assert second.returncode == 0 and "tokens of" not in silent
    assert_equal_up_to_rounding(tmp_path / STATS, whole / STATS)

    asked = ("--mode", "var", "--preset", "aggressive", "--routing_stats", tmp_path / STATS, "--num_samples", 12)
    reading = ("--model", model_directory, "--dataset", even_corpus, "--max_length", 16, "--no_throughput")
    script("02_evaluate_var.py", *asked, *reading, "--output", tmp_path / "one.json")
    evaluate = [sys.executable, str(ROOT / "experiments" / "02_evaluate_var.py"), *map(str, (*asked, *reading))]
    finish(*joined([*evaluate, "--mesh", "model=2", "--output", str(tmp_path / "two.json")], devices=1))
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    assert (two["tiers"], two["experts_per_token"]) == (one["tiers"], one["experts_per_token"])
    assert two["tiers"]["fast"] > 0
    assert two["cached_tier"] == {"shared": False, "seconds_per_token": 0.01, "unit": "seconds"}


def test_two_processes_give_the_result_of_one_though_one_is_killed(command, whole, tmp_path):
    """The second one, which then begins again from its checkpoint; the first one waits for it.

    There is room for the likeliest answers only: each process takes its own.
    """
    bounded = ("--num_processes", "2", "--answer_gib", "7.5e-6")  # 8,053 bytes
    shares = [command(tmp_path, *bounded, "--process_id", str(index)) for index in range(2)]
    work = tmp_path / "routing_checkpoints" / "process-1"
    first, second = start(shares[0], 2), start(shares[1], 2)
    while second.poll() is None and not list(work.glob("statistics/checkpoint.safetensors")):
        time.sleep(0.005)
    second.kill()
    second.communicate()
    assert first.poll() is None
    again = start(shares[1], 2)
    finish(first, again)
    assert_equal_up_to_rounding(tmp_path / STATS, whole / STATS)
    assert not work.exists()
    ours, theirs = load_file(tmp_path / ROWS), load_file(whole / ROWS)
    (layers, _, experts), hidden_size = theirs["entry"].shape, theirs["mean"].shape[2]
    room = 8_053 // bytes_a_pair(layers, experts, hidden_size)  # those of order 0 among them
    assert 0 < ours["mean"].shape[1] <= 2 * room - experts < theirs["mean"].shape[1]
    row = {tuple(key): row for row, key in enumerate(theirs["keys"].tolist())}
    for r, key in enumerate(ours["keys"].tolist()):
        for a, expert in np.argwhere(ours["entry"][:, r] >= 0):
            part, all_of_it = ours["entry"][a, r, expert], theirs["entry"][a, row[tuple(key)], expert]
            assert 0 < ours["count"][a, part] <= theirs["count"][a, all_of_it]


def test_runs_merged_equal_one(script, command, whole, tmp_path):
    """Runs over parts of a corpus have keys of their own; here both are over the whole, so everything counts twice."""
    script(*command(tmp_path / "twice", "--merge", str(whole), str(whole / STATS))[1:])
    (twice, _), (once, _) = statsfile.read(tmp_path / "twice" / STATS), statsfile.read(whole / STATS)
    np.testing.assert_array_equal(twice.count, 2 * once.count)
    np.testing.assert_allclose(twice.entropy.mean, once.entropy.mean, rtol=1e-12)
    np.testing.assert_allclose(twice.std_entropy, once.std_entropy, rtol=1e-6, atol=1e-9)
    ours, theirs = load_file(tmp_path / "twice" / ROWS), load_file(whole / ROWS)
    np.testing.assert_array_equal(ours["count"], 2 * theirs["count"])
    np.testing.assert_allclose(ours["mean"], theirs["mean"], atol=1e-6)
    strings = statsfile.token_strings(whole / STATS)
    assert strings and statsfile.token_strings(tmp_path / "twice" / STATS) == strings


WRONG = {
    "answer orders [2] are not among the orders (1,)": ("--orders", "1", "--answer_orders", "2"),
    "layers [0, 9]: expected some of 0 to 1": ("--layers", "9", "0"),
    "batch_size=0: expected at least 1": ("--batch_size", "0"),
    "min_count=0: expected at least 1": ("--min_count", "0"),
    "process 2 of 2: expected a process from 0 to 1": ("--num_processes", "2", "--process_id", "2"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused_before_anything_is_done(script, command, tmp_path, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script(*command(tmp_path, *WRONG[message])[1:])
    assert message in f"{stop.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_rows_of_a_former_run_do_not_survive_its_statistics(script, command, whole, tmp_path):
    for name in (STATS, ROWS):
        shutil.copy(whole / name, tmp_path)
    (tmp_path / "routing_trace.parquet").touch()
    script(*command(tmp_path, "--no-answers")[1:])
    assert (tmp_path / STATS).is_file()
    assert not (tmp_path / ROWS).exists() and not (tmp_path / "routing_trace.parquet").exists()


def test_parts_that_do_not_belong_together_leave_nothing(script, command, whole, tmp_path):
    script(*command(tmp_path / "one", "--layers", "0")[1:])
    with pytest.raises(SystemExit, match="layers is"):
        script(*command(tmp_path / "both", "--merge", str(whole), str(tmp_path / "one"))[1:])
    assert not (tmp_path / "both").exists()
