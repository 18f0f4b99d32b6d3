"""Calls of known shape and tier mix, and how long they take: what a performance model is fitted to and tested on.

Letters: B sequences, T positions of a call, S positions in the key/value cache before it, L layers, E experts, K slots.

    points = measure(model, REFERENCE_TASKS, keys=2000)

All tasks are timed in the same rounds, in an order drawn anew for each, so what the machine does meanwhile falls on
those that calibrate and on those that test alike. A run is several calls in a row, on real text for routing that is
real; how many experts ran, and how many distinct ones a call read, comes from the routing of these very tokens.

The mixes need no statistics of a corpus. A policy of order 0 plans every token and keeps what it says; one of orders 1
and 2 plans the tokens that the table holds, and leaves the rest open. What the table predicts, and the answers that
stand in for experts, are drawn at random: they are looked up and added like any others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.text.corpus import load_documents
from analysis.text.encoding import iter_encode
from models import Model
from profiling.step_bench import NEVER, ORDERS, as_step, decoding, random_stats
from profiling.throughput import used_experts
from profiling.timing import compare, typical
from profiling.workload import Mix, Workload, table_bytes
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.answers import Answers
from varjax.table import build

EVERY = (0, *ORDERS)  # every token is planned, those that the table knows from their own rows


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of call to time."""

    batch: int  # B
    length: int  # T of a prefill; 1 is a step of decoding
    cached: int = 0  # S, of a step of decoding
    policy: str = "plain"  # one of `policies`
    calibrates: bool = False  # else it tests

    def __post_init__(self) -> None:
        if (self.length == 1) != (self.cached > 0):
            raise ValueError(f"{self}: a prefill has cached=0 and length > 1, a step of decoding length=1 and cached > 0")

    @property
    def decodes(self) -> bool:
        return self.length == 1

    @property
    def name(self) -> str:
        shape = f"decode {self.batch} x 1 after {self.cached}" if self.decodes else f"prefill {self.batch} x {self.length}"
        return f"{shape}, {self.policy}"


@dataclasses.dataclass(frozen=True)
class Point:
    """What one call was and how long it took."""

    name: str
    workload: Workload
    mix: Mix
    seconds: float  # of a call, median over rounds
    low: float  # of its 95 % bootstrap interval
    high: float


def policies(num_layers: int) -> Mapping[str, VARConfig]:
    """Ways to run a model with different numbers of experts. Those that begin with "answers" add answers back."""
    halves = num_layers // 2

    def config(kept: Sequence[int], *, answers: bool, orders: tuple[int, ...] = EVERY, often: int = 1) -> VARConfig:
        layers = {
            layer: LayerPolicy(kept=number, residual=answers, orders=orders) for layer, number in enumerate(kept)
        }
        return VARConfig(
            frequency_threshold=often, entropy_threshold=100.0, confidence_threshold=1.0, cache_size=0, layers=layers
        )

    none, one = [0] * num_layers, [1] * num_layers
    rising = [0] * halves + [1] * (num_layers - halves)
    return {
        "plain": VARConfig(enable_var=False),
        "open": config(one, answers=False, orders=ORDERS, often=NEVER),
        "none": config(none, answers=False),
        "one": config(one, answers=False),
        "one if known": config(one, answers=False, orders=ORDERS),
        "answers, none": config(none, answers=True),
        "answers, one": config(one, answers=True),
        "answers, rising": config(rising, answers=True),
    }


def tasks() -> list[Task]:
    """What the reference model is calibrated and tested on: lengths, batches and mixes that do not coincide."""
    calibrating = [
        (1, 48, 0, "plain"), (1, 256, 0, "plain"), (8, 128, 0, "plain"), (4, 256, 0, "one"), (8, 128, 0, "none"),
        (2, 128, 0, "answers, rising"),
        (1, 1, 64, "plain"), (1, 1, 224, "one"), (4, 1, 128, "plain"), (8, 1, 64, "answers, none"),
        (16, 1, 128, "plain"), (16, 1, 128, "one"), (32, 1, 64, "plain"),
    ]  # fmt: skip
    testing = [
        *((batch, length, 0, "plain") for batch, length in ((1, 96), (1, 160), (2, 64), (2, 256), (4, 128), (8, 256), (16, 64))),
        *((batch, length, 0, "one") for batch, length in ((1, 96), (2, 256), (8, 128), (16, 64))),
        *((batch, length, 0, "none") for batch, length in ((1, 160), (4, 128), (8, 256))),
        *((batch, length, 0, "one if known") for batch, length in ((2, 64), (8, 256))),
        *((batch, length, 0, "answers, one") for batch, length in ((1, 160), (8, 128))),
        (4, 128, 0, "answers, rising"),
        *((batch, 1, cached, "plain") for batch, cached in ((1, 160), (2, 96), (4, 224), (8, 64), (8, 192), (24, 96))),
        *((batch, 1, cached, "one") for batch, cached in ((1, 64), (2, 96), (8, 192), (24, 96))),
        *((batch, 1, cached, "none") for batch, cached in ((1, 160), (8, 64), (24, 96))),
        *((batch, 1, cached, "open") for batch, cached in ((2, 96), (8, 192))),
        *((batch, 1, cached, "answers, one") for batch, cached in ((1, 160), (4, 224), (24, 96))),
        *((batch, 1, cached, "answers, rising") for batch, cached in ((2, 96), (8, 64))),
    ]  # fmt: skip
    return [Task(*one, calibrates=True) for one in calibrating] + [Task(*one) for one in testing]


def measure(
    model: Model,
    wanted: Sequence[Task],
    texts: Sequence[np.ndarray] | None = None,
    *,
    keys: int = 2000,
    repeats: int = 15,
    run_tokens: int = 256,
    seed: int = 0,
) -> list[Point]:
    """Times every task, interleaved; the points are in the order of `wanted`.

    Args:
        texts: token ids of documents, for the tokens that the model reads; None: the embedded corpus.
        keys: contexts of orders 1 and 2 that the table holds.
        repeats: rounds, each of which times every task once.
        run_tokens: a timed run makes as many calls as it takes to read so many tokens, 2 to 16.
    """
    texts = embedded_texts(model) if texts is None else texts
    stream = np.concatenate(texts)
    configs = policies(model.config.num_layers)
    var_models = _var_models(model, {task.policy: configs[task.policy] for task in wanted}, texts, keys)
    runs: dict[str, Callable[[], Any]] = {}
    about: dict[str, tuple[Workload, Mix]] = {}
    rng = np.random.default_rng(seed)
    longest = max((task.cached + _calls(task, run_tokens) for task in wanted if task.decodes), default=0)
    for task in wanted:
        calls = _calls(task, run_tokens)
        var_model = var_models[task.policy]
        if task.decodes:
            ids = _draw(stream, (task.batch, longest), rng)
            step = as_step(var_model)
            run = decoding(model, ids[:, : task.cached + calls], step, var_model.init(task.batch), task.cached)
        else:
            ids = _draw(stream, (calls, task.batch, task.length), rng)
            run = _prefilling(var_model, ids)
        runs[task.name] = run
        about[task.name] = _workload(model, task, calls), _mix(var_model, task, ids, calls)
    seconds = compare(runs, repeats, warmup=1, seed=seed)
    found = []
    for task in wanted:
        one = typical(seconds[task.name] / _calls(task, run_tokens))
        found.append(Point(task.name, *about[task.name], one.value, one.low, one.high))
    return found


def _calls(task: Task, run_tokens: int) -> int:
    return min(max(math.ceil(run_tokens / (task.batch * task.length)), 2), 16)


def embedded_texts(model: Model, documents: int = 1500) -> list[np.ndarray]:
    """Token ids of the embedded corpus' first documents of the build split."""
    found = load_documents("embedded", split="build", limit=documents)
    return [document.ids for document in iter_encode(found, model.tokenizer, model.config)]


def _var_models(
    model: Model, configs: Mapping[str, VARConfig], texts: Sequence[np.ndarray], keys: int
) -> dict[str, VARModel]:
    stats = random_stats(model, list(texts), keys)
    rng = np.random.default_rng(0)
    answers = None
    if any(name.startswith("answers") for name in configs):
        empty = Answers.empty(stats.keys, range(model.config.num_layers), model.config.num_experts, model.config.hidden_size)
        answers = dataclasses.replace(
            empty,
            mean=rng.standard_normal(empty.mean.shape, np.float32) * np.float32(1e-3),
            mass=np.ones(empty.mass.shape),
            count=np.ones_like(empty.count),
        )
    found = {}
    for name, config in configs.items():
        table = None
        if config.enable_var:
            known = answers if name.startswith("answers") else None
            table = build(stats, config, model.config.top_k, known, keep_shapes=True)
        found[name] = VARModel(model, config, table=table)
    return found


def _draw(stream: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """int32 [*shape]: stretches of a stream of ids, from anywhere."""
    length = shape[-1]
    starts = rng.integers(0, len(stream) - length, shape[:-1])
    return stream[starts[..., None] + np.arange(length)].astype(np.int32)


def _prefilling(var_model: VARModel, texts: np.ndarray) -> Callable[[], Any]:
    """Reads texts int32 [calls, B, T] one after the other."""
    batches = [jnp.asarray(ids) for ids in texts]
    mask = jnp.ones(texts.shape[1:], bool)
    held = [var_model.init(texts.shape[1])]

    def run() -> Any:
        for ids in batches:
            out, held[0] = var_model.advance(held[0], ids, mask)
        return out.logits

    return run


def _workload(model: Model, task: Task, calls: int) -> Workload:
    itemsize = model.dtype.itemsize
    if not task.decodes:
        return Workload(task.batch, task.length, itemsize=itemsize)
    return Workload(
        task.batch,
        1,
        cached=task.cached + (calls - 1) // 2,
        capacity=task.cached + calls,
        last_logits_only=True,
        itemsize=itemsize,
    )


def _mix(var_model: VARModel, task: Task, ids: np.ndarray, calls: int) -> Mix:
    """What ran, read from the routing of the tokens that are timed."""
    config = var_model.model.config
    if task.decodes:
        # Text by text and all of one length, which compiles once; what comes later changes nothing before it.
        used = np.concatenate([used_experts(var_model, text[None]) for text in ids], axis=1)
        rows = used[:, :, task.cached : task.cached + calls].sum(axis=1)  # [L, calls, E]
    else:
        used = np.stack([used_experts(var_model, text) for text in ids], axis=1)
        rows = used.sum(axis=(2, 3))
    distinct = float((rows > 0).sum(-1).mean())
    experts = float(rows.sum(-1).mean()) / (task.batch * task.length)
    if var_model.table is None:
        return Mix(experts, distinct, spread=_spread(rows))
    answered = var_model.table.answers is not None
    return Mix(
        experts,
        distinct,
        spread=_spread(rows),
        answers=config.top_k - experts if answered else 0.0,
        planned=True,
        table_bytes=table_bytes(config, task.batch * task.length, orders=len(ORDERS)),
    )


def _spread(rows: np.ndarray) -> float:
    """Of rows int [..., E] of a call: their coefficient of variation over the experts hit, less what chance gives."""
    hit = rows[rows > 0]
    if not len(hit):
        return 0.0
    calls = rows.sum(axis=-1, keepdims=True) / np.maximum((rows > 0).sum(axis=-1, keepdims=True), 1)  # mean of each
    relative = (rows / np.maximum(calls, 1))[rows > 0]
    return math.sqrt(max(float(relative.var()) - 1 / float(hit.mean()), 0.0))
