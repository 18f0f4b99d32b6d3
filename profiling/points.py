"""Calls of known shape and tier mix, and how long they take: what a performance model is fitted to and tested on.

Letters: B sequences, T positions of a call, S positions in the key/value cache before it, L layers, E experts, K slots.

    points = measure(model, tasks(), keys=2000)

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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.resampling import median_estimate
from analysis.text.corpus import load_documents
from analysis.text.encoding import iter_encode
from models import Model
from profiling.compiling import at_once
from profiling.step_bench import NEVER, ORDERS, as_step, decoding, random_stats
from profiling.throughput import used_experts
from profiling.timing import compare
from profiling.workload import Mix, Workload, table_bytes
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.answers import Answers
from varjax.errors import InputError
from varjax.model import build_for
from varjax.table import RouteTable, with_policies

Shapes = dict[str, list[tuple[int, ...]]]  # policy -> (B, T) of prefills, (B, 1, S) of steps of decoding
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
            raise InputError(
                f"{self}: a prefill has cached=0 and length > 1, a step of decoding length=1 and cached > 0"
            )

    @property
    def decodes(self) -> bool:
        return self.length == 1

    @property
    def name(self) -> str:
        shape = (
            f"decode {self.batch} x 1 after {self.cached}" if self.decodes else f"prefill {self.batch} x {self.length}"
        )
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
            layer: LayerPolicy(experts_kept=number, use_answers=answers, ngram_orders=orders)
            for layer, number in enumerate(kept)
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


def tasks(quick: bool = False) -> list[Task]:
    """What the reference model is calibrated on (13) and tested on (41; 9 if `quick`): no shape is on both sides.

    The form of `performance_model` was chosen on other shapes than those that test it, so these test form and numbers.
    """
    calibrating: Shapes = {
        "plain": [(1, 48), (1, 256), (8, 128), (1, 1, 64), (4, 1, 128), (16, 1, 128), (32, 1, 64)],
        "one": [(4, 256), (1, 1, 224), (16, 1, 128)],
        "none": [(8, 128)],
        "answers, none": [(8, 1, 64)],
        "answers, rising": [(2, 128)],
    }
    testing: Shapes = {
        "plain": [
            *((1, 80), (1, 192), (2, 96), (2, 160), (4, 64), (4, 192), (8, 192), (16, 96)),
            *((1, 1, 96), (2, 1, 160), (3, 1, 64), (6, 1, 128), (12, 1, 192), (20, 1, 64), (28, 1, 128)),
        ],
        "one": [(1, 192), (2, 160), (4, 64), (16, 96), (1, 1, 96), (3, 1, 64), (12, 1, 192), (20, 1, 64)],
        "none": [(1, 80), (4, 192), (8, 64), (2, 1, 160), (12, 1, 192)],
        "one if known": [(4, 64), (8, 192)],
        "open": [(3, 1, 64), (12, 1, 192)],
        "answers, one": [(2, 96), (8, 64), (1, 1, 96), (6, 1, 128), (20, 1, 64)],
        "answers, rising": [(1, 192), (4, 192), (3, 1, 64), (12, 1, 192)],
    }
    if quick:
        sizes = [testing["plain"][at] for at in (0, 3, 6, 8, 10, 12)]  # three of each phase, so that scaling is seen
        testing = {"plain": sizes, "one": testing["one"][::3]}
    return [
        Task(shape[0], shape[1], shape[2] if len(shape) > 2 else 0, policy, calibrates=shapes is calibrating)
        for shapes in (calibrating, testing)
        for policy, several in shapes.items()
        for shape in several
    ]


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

    Raises:
        InputError: a task is there twice, or the texts are too short for the longest.
    """
    if len({task.name for task in wanted}) < len(wanted):
        raise InputError("a task is there twice; a point that calibrates must not also test")
    texts = embedded_texts(model) if texts is None else texts
    stream = np.concatenate(texts)
    configs = policies(model.config.num_layers)
    var_models = _var_models(model, {task.policy: configs[task.policy] for task in wanted}, texts, keys)
    rng = np.random.default_rng(seed)
    longest = max((task.cached + _calls(task, run_tokens) for task in wanted if task.decodes), default=0)
    jobs = []
    for task in wanted:
        calls = _calls(task, run_tokens)
        shape = (task.batch, longest) if task.decodes else (calls, task.batch, task.length)
        jobs.append(partial(_prepared, model, var_models[task.policy], task, _draw(stream, shape, rng), calls))
    prepared = at_once(jobs)
    runs = {task.name: run for task, (run, _, _) in zip(wanted, prepared, strict=True)}
    seconds = compare(runs, repeats, warmup=1, seed=seed)
    found = []
    for task, (_, workload, mix) in zip(wanted, prepared, strict=True):
        one = median_estimate(seconds[task.name] / _calls(task, run_tokens))
        found.append(Point(task.name, workload, mix, one.value, one.low, one.high))
    return found


def _prepared(
    model: Model, var_model: VARModel, task: Task, ids: np.ndarray, calls: int
) -> tuple[Callable[[], Any], Workload, Mix]:
    """The run of a task, compiled, and what it is asked to do; ids [B, T] of decoding, [calls, B, T] of prefills."""
    if task.decodes:
        run = decoding(model, ids, as_step(var_model), var_model.init(task.batch), task.cached, calls)
    else:
        run = _prefilling(var_model, ids)
    jax.block_until_ready(run())
    return run, _workload(model, task, calls), _mix(var_model, task, ids, calls)


def _calls(task: Task, run_tokens: int) -> int:
    return min(max(math.ceil(run_tokens / (task.batch * task.length)), 2), 16)


def embedded_texts(model: Model, documents: int = 1500) -> list[np.ndarray]:
    """Token ids of the embedded corpus' first documents of the build split."""
    found = load_documents("embedded", split="build", limit=documents)
    return [document.ids for document in iter_encode(found, model.tokenizer, model.config)]


def _var_models(
    model: Model, configs: Mapping[str, VARConfig], texts: Sequence[np.ndarray], keys: int
) -> dict[str, VARModel]:
    """One table with answers and one without, which the policies share: other policies compile nothing anew."""
    stats = random_stats(model, list(texts), keys)
    tables: dict[bool, tuple[RouteTable, Answers | None]] = {}
    found = {}
    for name, config in configs.items():
        table = None
        if config.enable_var:
            answered = name.startswith("answers")
            if answered not in tables:
                answers = _random_answers(model, stats.keys) if answered else None
                tables[answered] = build_for(model, config, stats, answers, keep_shapes=True), answers
            shared, answers = tables[answered]
            table = with_policies(shared, config, stats, answers)
        found[name] = VARModel(model, config, table=table)
    return found


def _random_answers(model: Model, keys: np.ndarray) -> Answers:
    """One for every expert of every layer at every key int32 [R, C]: small, so that the text goes on as before."""
    empty = Answers.empty(keys, range(model.config.num_layers), model.config.num_experts, model.config.hidden_size)
    mean = np.random.default_rng(0).standard_normal(empty.mean.shape, np.float32) * np.float32(1e-3)
    return dataclasses.replace(empty, mean=mean, mass=np.ones(empty.mass.shape), count=np.ones_like(empty.count))


def _draw(stream: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """int32 [*shape]: stretches of a stream of ids, from anywhere."""
    length = shape[-1]
    if len(stream) <= length:
        raise InputError(f"the texts hold {len(stream)} tokens, a task wants {length} in a row; give more text")
    starts = rng.integers(0, len(stream) - length, shape[:-1])
    return stream[starts[..., None] + np.arange(length)].astype(np.int32)


def _prefilling(var_model: VARModel, texts: np.ndarray) -> Callable[[], Any]:
    """Reads texts int32 [calls, B, T] one after the other."""
    batches = [jnp.asarray(ids) for ids in texts]
    mask = jnp.ones(texts.shape[1:], bool)
    held = [var_model.init(texts.shape[1])]

    def run() -> Any:
        for ids in batches:
            out, held[0] = var_model.advance(held[0], ids, mask, donate=True)
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
    """`Mix.spread` of the rows int [..., E] that calls gave the experts of their layers."""
    hit = rows > 0
    mean = rows.sum(axis=-1, keepdims=True) / np.maximum(hit.sum(axis=-1, keepdims=True), 1)
    chance = np.broadcast_to(mean - 1, rows.shape)[hit]  # variance, of a Poisson number behind the first row
    scale = float((chance**2).sum())
    beyond = float(((rows - mean)[hit] ** 2 - chance).sum())
    return math.sqrt(max(beyond, 0.0) / scale) if scale else 0.0
