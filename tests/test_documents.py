"""Every command of README and docs does what they say, as it is written there.

Each is parsed by its own program's parser, and run, in the order in which a reader meets them, in a folder where all that
is large is small. Not a word of a command is changed. What is staged:

- the reference model and `mistralai/Mixtral-8x7B-v0.1` are one random Mixtral of two layers and four experts, and
  `experiments/configs/olmoe_small.json` and the published Mixtral that `device_bench` knows are as small
- the embedded corpus, C4 and WikiText-103 are a few hundred made-up documents, the embedded one where its cache is looked
  for, the others in directories of their names, which are read before the hub is asked
- the hub's two calls copy that model; `jax.distributed` joins nobody
- options that a command leaves out default to fewer repeats (`FEWER`), nothing is timed in more than two rounds, a search
  makes four trials and a training two steps, whatever number is asked for
- the command for four devices has a process with four simulated ones

`make`, `pip`, `tensorboard` and `optuna-dashboard` are not started: that there is what they are asked for is tested.
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
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.hf_api import RepoSibling

from analysis.text import embedded
from analysis.text.corpus import Document
from models import model as models_model
from models.config import MoEConfig, read_config
from models.parameters import init_params
from models.tokenizer import save_tokenizer, train_bpe
from models.weights import save_params
from tests.documented import ROOT, Command, commands
from tests.running import run_python
from varjax import statsfile

COMMANDS = commands()
FEWER: dict[str, Any] = {"repeats": 2, "seeds": 1, "trials": 4, "hidden": [16]}
ROUNDS = 2
TINY = {
    "vocab_size": 420,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "top_k": 2,
}


def python_words(command: Command) -> tuple[str, ...]:
    """What follows `python`; empty where another program is meant."""
    words = command.words[command.words[0] == "srun" :]
    return words[1:] if words[0] == "python" else ()


class Parsed(BaseException):
    """No exception that a program catches: its arguments are known, and nothing else is wanted of it."""


@pytest.mark.parametrize("command", [one for one in COMMANDS if python_words(one)], ids=str)
def test_a_programs_own_parser_takes_the_command(command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        parse(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        run_python(python_words(command))


# --- the stage -------------------------------------------------------------------------------------------------------


def texts(seed: int, number: int = 400, sentences: int = 42) -> list[str]:
    """Documents of one length in tokens, so that all fall into windows of one shape, which compiles once."""
    rng = np.random.default_rng(seed)
    nouns, verbs = ("router", "expert", "token", "layer", "table"), ("finds", "keeps", "drops", "meets")
    return [
        " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}." for _ in range(sentences))
        for _ in range(number)
    ]


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "group": "ab"[len(text) % 2]}) + "\n" for text in documents))


class World:
    """The folder in which a reader sits, and how far they have read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done, self.printed = folder, 0, ""
        self.arguments = argparse.Namespace()  # of the last command

    def reach(self, index: int) -> None:
        """Run the commands up to this one that have not been run."""
        while self.done <= index:
            command = COMMANDS[self.done]
            self.done += 1
            print(f"$ {command}")
            start = time.perf_counter()
            self.run(command)
            with open("/tmp/c/times", "a") as f: f.write(f"{time.perf_counter()-start:8.2f} {command}\n")
            with open("/tmp/c/printed", "a") as f: f.write(f"\n$ {command}\n{self.printed}\n")

    def run(self, command: Command) -> None:
        words = python_words(command)
        if not words:
            return
        if "--mesh" in words:
            self.run_on_four_devices(words)
            return
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                run_python(words)
            finally:
                self.printed = out.getvalue()

    def run_on_four_devices(self, words: tuple[str, ...]) -> None:
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], env=os.environ | flags, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        self.printed = done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # as a user has it
        patch.chdir(folder)
        stage(folder, patch)
        made = World(folder)
        shrink(made, patch)
        yield made


def stage(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Models, texts and files."""
    shutil.copytree(ROOT / "experiments", "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", "README.md")
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    documents = sorted(texts(0), key=lambda text: Document(text, "").id)
    write_jsonl(embedded._cache_file(), documents)
    write_jsonl(Path("allenai/c4:en/c4.jsonl"), texts(1))
    write_jsonl(Path("Salesforce/wikitext:wikitext-103-raw-v1/wikitext.jsonl"), texts(2))

    mixtral = Path("mistralai/Mixtral-8x7B-v0.1")
    mixtral.mkdir(parents=True)
    save_tokenizer(train_bpe(documents, TINY["vocab_size"]), mixtral, max_length=256)
    config = MoEConfig(**TINY, initializer_range=0.3)
    save_params(mixtral, init_params(config, jax.random.key(0)), config)
    patch.setattr(models_model, "REFERENCE", mixtral.absolute())
    shape = json.loads(Path("experiments/configs/olmoe_small.json").read_text())
    small = {"vocab_size": 420, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    Path("experiments/configs/olmoe_small.json").write_text(json.dumps(shape | small))

    files = [RepoSibling(path.name, path.stat().st_size) for path in sorted(mixtral.absolute().iterdir())]

    def snapshot_download(repo: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        for name in allow_patterns:
            shutil.copy(Path(repo) / name, local_dir)

    info = SimpleNamespace(sha="f" * 40, siblings=files)
    patch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def shrink(world: World, patch: pytest.MonkeyPatch) -> None:
    """Fewer repeats of everything, and each command's arguments noted."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given):
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: value for name, value in FEWER.items() if name in known})
        world.arguments = parse(parser, *given)
        return world.arguments

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=lambda index: str(COMMANDS[index]))
def test_a_command_does_what_it_says(index, world):
    world.reach(index)
