"""Every command of README and docs does what they say, as it is written there.

Each is parsed by its own program's parser, and run, in the order in which a reader meets them, in a folder where all
that is large is small. Not a word of a command is changed. What is staged:

- The reference model and `mistralai/Mixtral-8x7B-v0.1` are one random Mixtral of two layers and four experts, as is the
  published Mixtral that `device_bench` builds; `experiments/configs/olmoe_small.json` is as small.
- The embedded corpus, C4 and WikiText-103 are some 400 made-up documents each: the first where its cache is looked for,
  the others in directories of their names, which are read before the hub is asked.
- The hub's two calls that a download makes copy that model; `jax.distributed` joins nobody; `srun` starts one process.
- What a command leaves to its defaults is less (`FEWER`); nothing is timed in more than two rounds; a search makes four
  trials and a training two steps, however many are asked for; a performance model has fewer and smaller calls.
- The harness does not look through the thousands of tasks that it comes with.
- A study has fewer rules to compare, fewer sizes of a table, and times one sequence at a time.
- The command for four devices has a process of its own, with four simulated devices.

Some take half a minute even so (`SLOW`): `make test` leaves them to `make slow`.

`make`, `pip`, `tensorboard` and `optuna-dashboard` are not started: it is tested that what they are asked for is there.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch as patched

import huggingface_hub
import jax
import numpy as np
import optuna
import pytest
from huggingface_hub.hf_api import RepoSibling
from lm_eval import tasks

from analysis import distillation, families, table_size
from analysis.collection.run import STATS
from analysis.comparison import read_result
from analysis.hypothesis_validation import TRACE_FILE
from analysis.text import embedded
from analysis.text.corpus import Document
from analysis.text.prepared import read_manifest
from analysis.traces import trace
from models import load_model, training
from models import model as models_model
from models.config import MoEConfig, read_config
from models.parameters import init_params
from models.tokenizer import save_tokenizer, train_bpe
from models.weights import save_params
from profiling import components, points, published, throughput, timing
from profiling.points import Task
from tests.documented import DOCUMENTS, ROOT, Command, commands
from tests.running import run_python
from tuning import study
from varjax import VARConfig, answersfile, statsfile

COMMANDS = commands()
FEWER = {"repeats": 2, "seeds": 1, "trials": 12, "hidden": [16], "permutations": 20, "samples": 50}
ROUNDS, TRIALS, STEPS = 2, 4, 2
SHAPES = [(1, 8), (2, 8), (2, 16), (4, 12), (1, 1, 8), (2, 1, 8), (4, 1, 12)]
TASKS = [
    *(Task(*shape, policy=name, calibrates=name == "plain") for name in ("plain", "one") for shape in SHAPES),
    Task(3, 12, policy="none", calibrates=True),
    Task(2, 12, policy="answers, one", calibrates=True),
]
MIXTRAL = MoEConfig(
    vocab_size=420,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_experts=4,
    top_k=2,
    initializer_range=0.3,
)
OLMOE = {"vocab_size": 420, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_experts": 6}
OLMOE |= {"num_attention_heads": 2, "num_key_value_heads": 2}
SHOWN = re.compile(r"^```yaml\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # a file: its name and its text


def python_words(command: Command) -> tuple[str, ...]:
    """What follows `python`; empty where another program is meant."""
    words = command.words[command.words[0] == "srun" :]
    return words[1:] if words[0] == "python" else ()


def program(words: tuple[str, ...]) -> str:
    """The file or the module."""
    return words[1] if words[0] == "-m" else words[0]


PYTHON = [one for one in COMMANDS if python_words(one)]
SLOW = ("--mode study", "results/phase3", "results/phase5", "--quick", "--hidden 2048")
SLOW += ("profiling.step_bench", "profiling.performance_model", "profiling.device_bench")
"""Words by which a command is known that takes half a minute even here."""


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
    assert spoken_of - known <= {"--logdir"}  # of tensorboard


# --- the stage -------------------------------------------------------------------------------------------------------


def texts(seed: int, number: int = 400) -> list[str]:
    """Documents of one length, 61 tokens, so that what reads them compiles once; a long one to build tables from."""
    rng = np.random.default_rng(seed)
    nouns, verbs = ("router", "expert", "token", "layer", "table"), ("finds", "keeps", "drops", "meets")

    def text(sentences: int) -> str:
        return " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}." for _ in range(sentences))

    long = next(one for one in iter(partial(text, 42), None) if Document(one, "").split == "train")
    found = [long, *(text(10) for _ in range(number))]
    return sorted(found, key=lambda one: Document(one, "").id)  # as `embedded.rows` gives them


def write_texts(path: Path, found: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": text, "group": "ab"[len(text) % 2]} for text in found)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Files, models and texts in the working directory, and what leads there."""
    shutil.copytree(ROOT / "experiments", "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", "README.md")
    for document in DOCUMENTS:
        for path, text in SHOWN.findall(document.read_text(encoding="utf-8")):
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_text(text)
    shape = Path("experiments/configs/olmoe_small.json")
    shape.write_text(json.dumps(json.loads(shape.read_text()) | OLMOE))
    rng = np.random.default_rng(0)
    experts = rng.random((600, 2, 4)).argsort()[..., :2]
    np.savez("IN.npz", token=rng.integers(0, 50, 600), experts=experts, document=np.arange(600) // 30)
    Path("IN.json").write_text(json.dumps({"num_layers": 2, "num_experts": 4, "top_k": 2}))

    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    write_texts(embedded._cache_file(), texts(0))
    write_texts(Path("allenai/c4:en/c4.jsonl"), texts(1))
    write_texts(Path("Salesforce/wikitext:wikitext-103-raw-v1/wikitext.jsonl"), texts(2))

    mixtral = folder / "mistralai" / "Mixtral-8x7B-v0.1"
    mixtral.mkdir(parents=True)
    save_tokenizer(train_bpe(texts(0), MIXTRAL.vocab_size), mixtral, max_length=256)
    save_params(mixtral, init_params(MIXTRAL, jax.random.key(0)), MIXTRAL)
    patch.setattr(models_model, "REFERENCE", mixtral)

    def snapshot_download(repo: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        for name in allow_patterns:
            shutil.copy(folder / repo / name, local_dir)

    files = [RepoSibling(path.name, path.stat().st_size) for path in sorted(mixtral.iterdir())]
    info = SimpleNamespace(sha="f" * 40, siblings=files)
    patch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Fewer repeats of everything."""
    timed, fill = timing.compare, study.fill

    def few_rounds(
        callables: dict[str, Callable[[], Any]], repeats: int = ROUNDS, warmup: int = 1, seed: int = 0
    ) -> dict[str, np.ndarray]:
        return timed(callables, min(repeats, ROUNDS), min(warmup, 1), seed)

    for module in list(sys.modules.values()):
        if getattr(module, "compare", None) is timed:
            patch.setattr(module, "compare", few_rounds)
    for module, name, fewer in (
        (families, "RATIOS", families.RATIOS[:2]),
        (families, "MASSES", families.MASSES[:2]),
        (families, "CACHES", families.CACHES[:1]),
        (table_size, "SHARES", table_size.SHARES[-1:]),
    ):
        patch.setattr(module, name, fewer)
    patch.setattr(throughput, "by_batch", partial(throughput.by_batch, batch_sizes=(1,)))
    patch.setattr(components, "TURN", 0.001)
    patch.setattr(points, "tasks", lambda quick=False: TASKS)
    patch.setattr(study, "fill", lambda *given: fill(*given[:3], min(given[3], TRIALS), *given[4:]))
    for module, name in ((training, "TrainConfig"), (distillation, "DistilConfig")):
        patch.setattr(module, name, partial(brief, getattr(module, name)))
    patch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it asks the machine what is installed


def brief(made: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Settings of a training, of a few steps."""
    settings = made(*given, **named)
    return dataclasses.replace(settings, steps=min(settings.steps, STEPS))


class Reader:
    """Somebody who gives one command after the other."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.given: set[int] = set()  # of COMMANDS
        self.printed = ""  # by the last one
        self.arguments = argparse.Namespace()  # that the last one understood
        self.joined: list[dict[str, Any]] = []  # what `jax.distributed.initialize` was given
        parse = argparse.ArgumentParser.parse_args

        def parse_args(parser: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
            known = {action.dest for action in parser._actions}
            parser.set_defaults(**{name: value for name, value in FEWER.items() if name in known})
            if parser.get_default("model") == "random":  # a hundred million parameters
                parser.set_defaults(model="reference")
            self.arguments = parse(parser, *given)
            return self.arguments

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(jax.distributed, "initialize", lambda **given: self.joined.append(given))

    def reach(self, index: int) -> None:
        """Give this command, after those before it that were not given; a quick one does not wait for slow ones."""
        for number, command in enumerate(COMMANDS[: index + 1]):
            if number not in self.given and slow(command) <= slow(COMMANDS[index]):
                self.given.add(number)
                self.give(command)

    def give(self, command: Command) -> None:
        words = python_words(command)
        if not words:
            ELSEWHERE[command.words[0]](command.words)
            return
        if "--mesh" in words:
            self.on_four_devices(words)
            return
        small = {"mixtral-8x7b": MIXTRAL} if program(words) == "profiling.device_bench" else {}
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
    assert f"{stats.tokens:,} tokens of {stats.documents:,} documents" in reader.printed
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
        assert "perplexity degradation" in reader.printed
        path = asked.output if asked.output.suffix else asked.output / "comparison.json"
        assert read_json(path)["documents"] == len(read_result(asked.compare[0]).documents)
    elif asked.certify:
        assert read_json(asked.output / "certificate.json")["certificate"]
        assert "95 %" in reader.printed or "95%" in reader.printed
    elif asked.mode == "distil":
        config = VARConfig.load(asked.output / "var_config.json")
        assert answersfile.read(config.residuals)[0].layers == (0, 1)
    elif asked.mode == "study":
        assert {"study.html", "study.json", "study.txt"} <= {path.name for path in asked.output.iterdir()}
    else:
        result = read_json(asked.output)
        assert (result["mode"], "throughput" in result) == (asked.mode, not asked.no_throughput)
        assert len(read_result(asked.output).documents) == result["documents"] > 0
    if asked.mode == "var":
        assert sum(result["tiers"].values()) == pytest.approx(1)
        config = VARConfig.load(asked.output.with_suffix(".var_config.json"))
        assert asked.answers is None or config.residuals == str(asked.answers)


def searched(reader: Reader) -> None:
    asked = reader.arguments
    if asked.validate:
        found = read_json(asked.output / "validation.json")["validation"]["configurations"]
        assert [one["name"] for one in found][-3:] == ["preset conservative", "preset balanced", "preset aggressive"]
    else:
        assert len(read_json(asked.output / "tuning.json")["points"]) == TRIALS
        assert VARConfig.load(asked.output / "best_config.json").routing_stats == str(asked.routing_stats)


def analysed(reader: Reader) -> None:
    asked = reader.arguments
    found = read_json(asked.output / "systems.json")["results"]
    assert {one["phase"] for one in found["evidence"]} == {"prefill", "decode"}
    assert bool(found["memory"]) == (not asked.quick) == any(one["by_ablation"] for one in found["components"])
    assert (asked.output / "traces").exists() == asked.trace


def told(pattern: str, times: int = 1) -> Callable[[Reader], None]:
    """A fact of what is only printed."""

    def check(reader: Reader) -> None:
        assert len(re.findall(pattern, reader.printed, re.MULTILINE)) >= times

    return check


def table_of_devices(reader: Reader) -> None:
    """What is printed is what the document has."""
    lines = [line for line in reader.printed.splitlines() if line]
    assert (
        set(lines) <= set((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()) and len(lines) > 15
    )


def validated(reader: Reader) -> None:
    assert read_json(reader.arguments.output / "hypotheses.json")["provenance"]["files"].keys() == {"input", "trace"}
    assert (reader.arguments.output / "hypotheses.html").is_file()


def replayed(reader: Reader) -> None:
    assert sum(read_json(reader.arguments.output / "replay.json")["shares"].values()) == pytest.approx(1)


def fetched(reader: Reader) -> None:
    assert load_model(reader.arguments.output).config == dataclasses.replace(MIXTRAL)


def prepared(reader: Reader) -> None:
    assert [read_manifest(Path("prepared") / name).documents for name in ("c4", "wikitext103")] == [401, 401]


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


FACTS: dict[str, Callable[[Reader], None]] = {
    "analysis.audit_study": audited,
    "analysis.certificate_simulation": told(r"^[a-z -]+ +(?:50|200|1000)(?: +\d+\.\d\d%){3}(?: +\d+\.\d\d){3}$", 15),
    "analysis.harness": harnessed,
    "analysis.hypothesis_validation": validated,
    "analysis.replay": replayed,
    "analysis.traces.importing": imported,
    "experiments/00_train_reference.py": trained,
    "experiments/01_routing_analysis.py": collected,
    "experiments/02_evaluate_var.py": evaluated,
    "experiments/03_hyperparameter_optimization.py": searched,
    "experiments/05_systems_analysis.py": analysed,
    "experiments/download_models.py": fetched,
    "experiments/prepare_datasets.py": prepared,
    "profiling.calculator": told(r"187 +334 +1\.78x"),  # as docs/phase5.md has it
    "profiling.ceilings": told(r"square: 1024"),
    "profiling.collection_bench": told(r"^in all +\d+\.\d+x$"),
    "profiling.device_bench": measured,
    "profiling.device_memory": table_of_devices,
    "profiling.experts_bench": told(r"^N=(?:2048|1), D=(?:16|2048)", 2),
    "profiling.performance_model": told(r"^(?:PASS|FAIL): median error on unseen points under 10%$"),
    "profiling.step_bench": told(r"^plain +\d+\.\d +1\.000"),
    "tuning.landscape": told(r"^(?:random|tpe|bayesian) +\d of 1 ", 3),
}


def make_has(words: tuple[str, ...]) -> None:
    """In a folder without an environment, where the Makefile finds nothing to clean up."""
    shutil.copy(ROOT / "pyproject.toml", "pyproject.toml")
    done = subprocess.run(
        ["make", "--dry-run", "--file", ROOT / "Makefile", *words[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 2, done.stderr


def pip_has(words: tuple[str, ...]) -> None:
    _, install, wanted = words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert install == "install" and wanted in (*(f".[{extra}]" for extra in extras), "optuna-dashboard")


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
    def here(words: list[str], **_: object) -> subprocess.CompletedProcess:
        assert words[0] == sys.executable
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
