"""Every command of README and docs does what they say, as it is written there.

Each is parsed by its own program's parser, and run, in the order in which a reader meets them, in a folder where all
that is large is small (`tests.stage` says what is staged). Not a word of a command is changed; the one for four devices
has a process of its own, with four simulated devices. Some take long even so (`SLOW`): `make test` leaves them to
`make slow`.

`make`, `pip`, `tensorboard` and `optuna-dashboard` are not started: it is tested that what they are asked for is there.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched
from urllib.parse import unquote

import jax
import optuna
import pytest

from analysis.collect.run import STATS
from analysis.evaluate.comparison import read_result
from analysis.hypothesis_validation import TRACE_FILE
from analysis.text.prepared import read_manifest
from analysis.traces import trace
from benchmarks import smollm2
from models import load_model
from models.config import read_config
from profiling import published
from tests.documented import DOCUMENTS, ROOT, Command, commands
from tests.running import run_python
from tests.stage import MIXTRAL, TRIALS, shrink, shrink_harness, stage
from varjax import answersfile, statsfile
from varjax.tablefiles import saved_files

COMMANDS = commands()


def python_words(command: Command) -> tuple[str, ...]:
    """What follows `python`; empty where another program is meant."""
    words = command.words[command.words[0] == "srun" :]
    return words[1:] if words[0] == "python" else ()


def program(words: tuple[str, ...]) -> str:
    """The file or the module."""
    return words[1] if words[0] == "-m" else words[0]


PYTHON = [one for one in COMMANDS if python_words(one)]
SLOW = (
    *("olmoe", "--mode study", "results/phase3", "results/phase5", "--hidden 2048", "analysis.harness"),
    *("benchmarks.step", "benchmarks.answers", "benchmarks.device", "benchmarks.frontier"),
    *("performance_model", "results/roadmap", "results/smollm2"),
)
"""Words by which a command is known that takes half a minute even here."""

BUILDS_ON = {"phase3.md": ("phase2.md",), "phase5.md": ("phase2.md", "phase3.md")}
"""Documents whose commands need what those of others have written; the rest begin with nothing."""


def slow(command: Command) -> bool:
    """Whether `make slow` gives it, and `make test` does not."""
    return any(words in " ".join(command.words) for words in SLOW)


# --- in milliseconds -------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Nothing that a program catches: its arguments are known, and no more is wanted of it."""


@pytest.mark.parametrize("command", PYTHON, ids=str)
def test_its_own_parser_takes_the_command(command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        run_python(python_words(command))


def test_options_that_documents_speak_of_are_options_of_some_program(monkeypatch):
    known: set[str] = set()

    def note(parser: argparse.ArgumentParser, *_: Any) -> None:
        known.update(option for action in parser._actions for option in action.option_strings)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", note)
    monkeypatch.chdir(ROOT)
    for words in {program(words): words for words in map(python_words, PYTHON)}.values():
        with pytest.raises(Parsed):
            run_python(words)
    spoken_of = {
        option
        for document in DOCUMENTS
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", document.read_text(encoding="utf-8"))
        for option in re.findall(r"(?<![\w-])--\w+", code)
    }
    assert len(spoken_of) > 40
    assert spoken_of - known <= {"--logdir", "--xla_gpu_deterministic_ops"}  # of tensorboard, of XLA


# --- run --------------------------------------------------------------------------------------------------------------


class Reader:
    """Somebody who gives one command after the other."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.given: set[int] = set()  # of COMMANDS
        self.printed = ""  # by the last one
        self.arguments = argparse.Namespace()  # that the last one understood
        self.joined: list[dict[str, Any]] = []  # what `jax.distributed.initialize` was given
        parse = argparse.ArgumentParser.parse_args

        def note(parser: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
            self.arguments = parse(parser, *given)
            return self.arguments

        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        patch.setattr(jax.distributed, "initialize", lambda **given: self.joined.append(given))

    def reach(self, index: int) -> None:
        """Give this command, after those that it builds on and that were not given; a quick one needs no slow one."""
        wanted = COMMANDS[index]
        known = {wanted.document, *BUILDS_ON.get(wanted.document, ())}
        for number, command in enumerate(COMMANDS[: index + 1]):
            if number not in self.given and command.document in known and slow(command) <= slow(wanted):
                self.given.add(number)
                self.give(command)
                if slow(command):
                    jax.clear_caches()  # all programs of all commands would be too many for one process

    def give(self, command: Command) -> None:
        words = python_words(command)
        if not words:
            ELSEWHERE[command.words[0]](command.words)
            return
        if "--mesh" in words:
            self.on_four_devices(words)
            return
        small = {"mixtral-8x7b": MIXTRAL} if program(words) == "benchmarks.device" else {}
        out = io.StringIO()
        with contextlib.redirect_stdout(out), patched.dict(published.PUBLISHED, small):
            run_python(words)
        self.printed = out.getvalue()
        print(self.printed)
        for path in re.findall(r"written to ([\w/.-]*[\w/-])", self.printed):
            assert Path(path).exists()
        if "output" in self.arguments and self.arguments.output is not None:
            assert Path(self.arguments.output).exists()
        FACTS[program(words)](self)

    def on_four_devices(self, words: tuple[str, ...]) -> None:
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], env=os.environ | flags, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "written to results/mixtral/baseline.json" in done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # as users have it
        patch.chdir(folder)
        stage(folder, patch)
        shrink(patch)
        shrink_harness(patch)
        yield Reader(patch)


# --- what is to be true afterwards -----------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def trained(reader: Reader) -> None:
    asked = reader.arguments
    model = load_model(Path("checkpoints") / asked.config.stem)
    assert model.config == read_config(asked.config)
    assert read_json(Path("checkpoints") / asked.config.stem / "card.json")["training"]["balance"] == asked.balance


def collected(reader: Reader) -> None:
    stats, about = statsfile.read(reader.arguments.output / STATS)
    assert f"{stats.tokens:,} tokens, {stats.documents:,} documents" in reader.printed
    assert about["model"] == reader.arguments.model
    assert len(trace.read(reader.arguments.output / TRACE_FILE).token_id)
    if reader.arguments.coordinator == "auto":
        assert not {"coordinator_address", "num_processes", "process_id"} & reader.joined[-1].keys()
    elif reader.arguments.coordinator:
        told = {"coordinator_address": "first_machine:8476", "num_processes": 2, "process_id": 0}
        assert told.items() <= reader.joined[-1].items()


def evaluated(reader: Reader) -> None:
    asked = reader.arguments
    if asked.compare:
        assert "Perplexity degradation" in reader.printed
        path = asked.output if asked.output.suffix else asked.output / "comparison.json"
        assert read_json(path)["documents"] == len(read_result(asked.compare[0]).losses.ids)
    elif asked.certify:
        assert read_json(asked.output / "certificate.json")["certificate"]
        assert f"certified at {asked.level} confidence" in reader.printed
    elif asked.mode == "distill":
        assert answersfile.read(saved_files(asked.output / "var_config.json").answers)[0].layers == (0, 1)
    elif asked.mode == "study":
        assert {"study.html", "study.json", "study.txt"} <= {path.name for path in asked.output.iterdir()}
    else:
        result = read_json(asked.output)
        assert (result["mode"], "throughput" in result) == (asked.mode, not asked.no_throughput)
        assert len(read_result(asked.output).losses.ids) == result["documents"] > 0
    if asked.mode == "var":
        assert sum(result["tiers"].values()) == pytest.approx(1)
        files = saved_files(asked.output.with_suffix(".var_config.json"))
        assert asked.answers is None or files.answers == str(asked.answers)


def searched(reader: Reader) -> None:
    asked = reader.arguments
    if asked.validate:
        found = read_json(asked.output / "validation.json")["validation"]
        assert found["candidates"] and (found["chosen"] is None) == (not found["presets"])
    else:
        assert len(read_json(asked.output / "tuning.json")["points"]) == TRIALS
        assert saved_files(asked.output / "best_config.json").routing_stats == str(asked.routing_stats)


def analyzed(reader: Reader) -> None:
    asked = reader.arguments
    found = read_json(asked.output / "systems.json")["results"]
    assert {one["phase"] for one in found["evidence"]} == {"prefill", "decode"}
    assert bool(found["memory"]) == (not asked.quick)
    assert (asked.output / "traces").exists() == asked.trace


def told(pattern: str, times: int = 1) -> Callable[[Reader], None]:
    """A fact of what is only printed."""

    def check(reader: Reader) -> None:
        assert len(re.findall(pattern, reader.printed, re.MULTILINE)) >= times

    return check


def table_of_devices(reader: Reader) -> None:
    """The tables that are printed are those that the document has."""
    lines = [line for line in reader.printed.splitlines() if line.startswith("|")]
    assert (
        set(lines) <= set((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()) and len(lines) > 15
    )


def validated(reader: Reader) -> None:
    assert read_json(reader.arguments.output / "hypotheses.json")["provenance"]["files"].keys() == {"input", "trace"}
    assert (reader.arguments.output / "hypotheses.html").is_file()


def replayed(reader: Reader) -> None:
    assert sum(read_json(reader.arguments.output / "replay.json")["shares"].values()) == pytest.approx(1)


def indexed(reader: Reader) -> None:
    page = reader.arguments.folder / "index.html"
    listed = re.findall(r'<h2><a href="([^"]+)">', page.read_text())
    assert listed and all((page.parent / unquote(link)).is_file() for link in listed)


def fetched(reader: Reader) -> None:
    assert load_model(reader.arguments.output).config == read_config(Path(reader.arguments.model) / "config.json")


def prepared(reader: Reader) -> None:
    assert [read_manifest(Path("prepared") / name).documents for name in ("c4", "wikitext103")] == [400, 400]


def imported(reader: Reader) -> None:
    assert len(trace.read(reader.arguments.output).token_id) == 600


def audited(reader: Reader) -> None:
    outcomes = {one["name"]: one for one in read_json(reader.arguments.output)["outcomes"]}
    assert {"same domain", "answers shuffled", "random token ids"} <= outcomes.keys()


def harnessed(reader: Reader) -> None:
    result = read_json(reader.arguments.output)
    assert result["results"]["my_task"]["bits_per_byte,none"] > 0 and result["tiers"]


def measured(reader: Reader) -> None:
    found = read_json(Path(reader.arguments.output))
    assert {"ceilings", "experts/1", "experts/8192", "prefill", "decode/8"} <= found.keys() and found["layers"] == 2


def drawn(reader: Reader) -> None:
    asked = reader.arguments
    rows = read_json(asked.output / "frontier.json")["rows"]
    assert len(rows) == len(asked.answers) * len(asked.budgets) * (1 + len(asked.texts))


def regrouped(reader: Reader) -> None:
    config = load_model(reader.arguments.output).config
    assert (config.num_experts, config.top_k) == (reader.arguments.groups, reader.arguments.groups)


FACTS: dict[str, Callable[[Reader], None]] = {
    "analysis.audit_study": audited,
    "benchmarks.answers": told(r"^(?:prefill|decode), .* ms +\d+\.\d{3} \[.*\] +[+-]\d+\.\d%", 4),
    "benchmarks.certificate_simulation": told(r"^[a-z -]+ +(?:50|200|1000)(?: +\d+\.\d\d%){3}(?: +\d+\.\d\d){3}$", 15),
    "analysis.harness": harnessed,
    "analysis.hypothesis_validation": validated,
    "analysis.replay": replayed,
    "analysis.report.index_page": indexed,
    "analysis.traces.importing": imported,
    "benchmarks.collection": told(r"^in all +\d+\.\d+x$"),
    "benchmarks.device": measured,
    "benchmarks.device_memory": table_of_devices,
    "benchmarks.experts": told(r"^N=(?:2048|1), D=(?:16|2048)", 2),
    "benchmarks.frontier": drawn,
    "benchmarks.generation": told(r"^plain +(?:1|4|16|64) +\d+\.\d{3} +\d+\.\d\dx \[", 4),
    "benchmarks.smollm2": regrouped,
    "benchmarks.step": told(r"^plain +\d+\.\d +1\.000"),
    "experiments/00_train_reference.py": trained,
    "experiments/01_routing_analysis.py": collected,
    "experiments/02_evaluate_var.py": evaluated,
    "experiments/03_hyperparameter_optimization.py": searched,
    "experiments/05_systems_analysis.py": analyzed,
    "experiments/download_models.py": fetched,
    "experiments/prepare_datasets.py": prepared,
    "profiling.calculator": told(r"187 +334 +1\.78x"),  # as docs/phase5.md has it
    "profiling.ceilings": told(r"square: 1024"),
    "profiling.performance_model": told(r"^(?:PASS|FAIL): median error on unseen points < 10%"),
    "tests.tuning.landscape": told(r"^(?:random|tpe|bayesian) +\d of 1 ", 3),
}


def make_has(words: tuple[str, ...]) -> None:
    """In a folder without an environment, where the Makefile finds nothing to clean up."""
    shutil.copy(ROOT / "pyproject.toml", "pyproject.toml")
    done = subprocess.run(
        ["make", "--dry-run", "--file", ROOT / "Makefile", *words[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 2, done.stderr


def pip_has(words: tuple[str, ...]) -> None:
    _, install, *editable, wanted = words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert install == "install" and (editable == ["-e"]) == (wanted in {f".[{extra}]" for extra in extras})
    assert editable in (["-e"], ["--no-deps"]) or wanted == "optuna-dashboard"
    assert editable != ["--no-deps"] or wanted == smollm2.PACKAGE.replace("_", "-")


def tensorboard_has(words: tuple[str, ...]) -> None:
    assert words[1] == "--logdir" and len(list(Path(words[2]).glob("plugins/profile/*/*.xplane.pb"))) == 4


def optuna_has(words: tuple[str, ...]) -> None:
    assert optuna.get_all_study_names(words[1]) == ["varjax"]


ELSEWHERE: dict[str, Callable[[tuple[str, ...]], None]] = {
    "make": make_has,
    "optuna-dashboard": optuna_has,
    "pip": pip_has,
    "tensorboard": tensorboard_has,
}


@pytest.mark.parametrize(
    "index",
    [pytest.param(index, marks=[pytest.mark.slow] * slow(one), id=str(one)) for index, one in enumerate(COMMANDS)],
)
def test_a_command_does_what_it_says(index, reader):
    reader.reach(index)


@pytest.mark.slow
def test_the_demo_runs_and_the_code_of_the_readme_after_it(reader, monkeypatch, capsys):
    run = subprocess.run

    def here(words: list[str], **options: Any) -> subprocess.CompletedProcess:
        if words[0] != sys.executable:
            return run(words, **options)
        run_python(words[1:])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", here)
    run_python(["-m", "experiments.demo"])
    assert re.search(r"^policy +[-+]\d", capsys.readouterr().out, re.MULTILINE)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["tokens"].shape[1] > found["input_ids"].shape[1]
    assert "fast" in capsys.readouterr().out


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_was_executed_from_its_first_cell_to_its_last(notebook):
    cells = code_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and "image/png" in str(cells)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(notebook, reader):
    """Its cells one after the other, without what only a notebook knows."""
    found: dict[str, Any] = {}
    for number, cell in enumerate(code_of(notebook), 1):
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), found)
