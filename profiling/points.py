"""Calls of known shape and tier mix, and how long they take: what a performance model is fitted to and tested on.

Letters: B sequences, T positions of a call, S positions in the key/value cache before it, L layers, E experts, K slots.

    points = measure(model, tasks(), keys=2000)

All tasks are timed in the same rounds in random order, so disturbances affect calibration and test alike.
A run is several calls in a row on real text, so that its routing is real; how many experts ran, and how many distinct
ones a call read, comes from the routing of these tokens.

The mixes need no statistics of a corpus. A policy of order 0 plans every token; one of orders 1 and 2 plans the tokens
that the table knows and leaves the rest to the router. What the table predicts, and the answers that replace experts,
with or without maps, are random: looking them up and adding them takes as long as for any others.
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
from models.kv_cache import KVCache
from models.model import plain_step
from profiling.calls import at_once, planned, used_experts
from profiling.costs import Mix, Workload
from profiling.timing import compare
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.affine import Maps
from varjax.answers import Answers
from varjax.errors import InputError
from varjax.keys import count_contexts
from varjax.model import build_for
from varjax.stats import RoutingStats
from varjax.table import RouteTable, with_policies

ORDERS = (1, 2)  # of the contexts that the table knows
NEVER = 10**9  # a frequency threshold that no key reaches
RANK = 64  # of the maps of affine answers, at most the hidden size


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of call to time."""

    batch: int  # B
    length: int  # T of a prefill; 1 is a decoding step
    cached: int = 0  # S, of a decoding step
    policy: str = "plain"  # a key of `policies`
    calibrates: bool = False  # otherwise it tests

    def __post_init__(self) -> None:
        if (self.length == 1) != (self.cached > 0):
            raise InputError(f"{self}: a prefill has cached=0 and length > 1, a decoding step length=1 and cached > 0")

    @property
    def decodes(self) -> bool:
        """Whether this is a decoding step."""
        return self.length == 1

    @property
    def name(self) -> str:
        """Shape and policy in words."""
        shape = f"{self.batch} x {self.length}"
        return (f"decode {shape} after {self.cached}" if self.decodes else f"prefill {shape}") + f", {self.policy}"


@dataclasses.dataclass(frozen=True)
class Point:
    """The shapes and mix of one call, and how long it took."""

    name: str
    workload: Workload
    mix: Mix
    seconds: float  # of a call, median over rounds
    low: float  # of its 95% bootstrap interval
    high: float


def policies(num_layers: int) -> Mapping[str, VARConfig]:
    """Ways to run a model with different numbers of experts.

    Args:
        num_layers: L.

    Returns:
        Name -> config; names that start with "answers" add answers for the experts left out, those that start with
        "affine" affine ones.
    """

    def config(kept: Sequence[int], *, answers: bool, orders: tuple[int, ...], often: int = 1) -> VARConfig:
        layers = {
            layer: LayerPolicy(experts_kept=number, use_answers=answers, ngram_orders=orders)
            for layer, number in enumerate(kept)
        }
        return VARConfig(
            frequency_threshold=often, entropy_threshold=100.0, confidence_threshold=1.0, cache_size=0, layers=layers
        )

    none, one, every = [0] * num_layers, [1] * num_layers, (0, *ORDERS)
    rising = [0] * (num_layers // 2) + [1] * (num_layers - num_layers // 2)
    return {
        "plain": VARConfig(enable_var=False),
        "open": config(one, answers=False, orders=ORDERS, often=NEVER),
        "none": config(none, answers=False, orders=every),
        "one": config(one, answers=False, orders=every),
        "one if known": config(one, answers=False, orders=ORDERS),
        "answers, none": config(none, answers=True, orders=every),
        "answers, one": config(one, answers=True, orders=every),
        "answers, rising": config(rising, answers=True, orders=every),
        "affine, one": config(one, answers=True, orders=every),
    }


def tasks(quick: bool = False) -> list[Task]:
    """The calls that the reference model is calibrated on (13) and tested on (43; 9 if `quick`), in different shapes.

    The form of the performance model was chosen on other shapes than the test, so the test covers form and numbers.

    Args:
        quick: test on fewer calls.

    Returns:
        The tasks, those that calibrate first.
    """
    calibrating: dict[str, list[tuple[int, ...]]] = {  # (B, T) of prefills, (B, 1, S) of decoding steps
        "plain": [(1, 48), (1, 256), (8, 128), (1, 1, 64), (4, 1, 128), (16, 1, 128), (32, 1, 64)],
        "one": [(4, 256), (1, 1, 224), (16, 1, 128)],
        "none": [(8, 128)],
        "answers, none": [(8, 1, 64)],
        "answers, rising": [(2, 128)],
    }
    testing: dict[str, list[tuple[int, ...]]] = {
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
        "affine, one": [(4, 96), (6, 1, 128)],
    }
    if quick:
        sizes = [testing["plain"][at] for at in (0, 3, 6, 8, 10, 12)]  # three of each phase, to show how time grows
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
    """Time every task, interleaved.

    Args:
        model: the plain model.
        wanted: the tasks, all different.
        texts: token ids of documents for the model to read; None: the embedded corpus.
        keys: contexts of orders 1 and 2 that the table holds.
        repeats: rounds, each of which times every task once.
        run_tokens: a timed run makes 2 to 16 calls, enough to read this many tokens.
        seed: of the choice of tokens and of the order within rounds.

    Returns:
        One point per task, in order.

    Raises:
        InputError: a task is given twice, or the texts are too short for the longest.
    """
    if len({task.name for task in wanted}) < len(wanted):
        raise InputError("a task is given twice; a point that calibrates must not also test")
    texts = embedded_texts(model) if texts is None else texts
    stream = np.concatenate(texts)
    configs = policies(model.config.num_layers)
    var_models = _var_models(model, {task.policy: configs[task.policy] for task in wanted}, texts, keys)
    rng = np.random.default_rng(seed)
    numbers = [min(max(math.ceil(run_tokens / (task.batch * task.length)), 2), 16) for task in wanted]
    longest = max((task.cached + calls for task, calls in zip(wanted, numbers, strict=True) if task.decodes), default=0)
    jobs = []
    for task, calls in zip(wanted, numbers, strict=True):
        shape = (task.batch, longest) if task.decodes else (calls, task.batch, task.length)
        jobs.append(partial(_prepared, model, var_models[task.policy], task, _draw(stream, shape, rng), calls))
    prepared = at_once(jobs)
    runs = {task.name: run for task, (run, _, _) in zip(wanted, prepared, strict=True)}
    seconds = compare(runs, repeats, warmup=1, seed=seed)
    found = []
    for task, calls, (_, workload, mix) in zip(wanted, numbers, prepared, strict=True):
        one = median_estimate(seconds[task.name] / calls)
        found.append(Point(task.name, workload, mix, one.value, one.low, one.high))
    return found


def embedded_texts(model: Model, documents: int = 1500) -> list[np.ndarray]:
    """The first documents of the build split of the embedded corpus.

    Args:
        model: whose tokenizer encodes them.
        documents: how many at most.

    Returns:
        Token ids, int32 [n] each.
    """
    found = load_documents("embedded", split="build", limit=documents)
    return [document.ids for document in iter_encode(found, model.tokenizer, model.config)]


def random_stats(model: Model, documents: Sequence[np.ndarray], num_keys: int) -> RoutingStats:
    """Statistics of the most frequent contexts of some documents: their true counts with random gate probabilities.

    Args:
        model: whose layers and experts they describe.
        documents: token ids.
        num_keys: contexts at most.

    Returns:
        The statistics.
    """
    counted = count_contexts(list(documents), ORDERS, max_keys=num_keys)
    stats = RoutingStats.empty(counted.keys, ORDERS, model.config.num_layers, model.config.num_experts)
    count = np.broadcast_to(counted.counts, stats.count.shape).copy()
    probs = np.random.default_rng(0).dirichlet(np.ones(model.config.num_experts), count.shape)
    entropy = dataclasses.replace(stats.entropy, mean=np.ones(count.shape))
    return dataclasses.replace(stats, count=count, entropy=entropy, sum_probs=probs * count[..., None])


def decoding(model: Model, var_model: VARModel, ids: np.ndarray, cached: int, steps: int) -> Callable[[], Any]:
    """A run that feeds texts token by token, with the first ones already in the key/value cache.

    VAR's state continues from run to run. Of the key/value cache only the count of positions is reset: what is stored
    after it is never read.

    Args:
        model: the plain model, which fills the cache.
        var_model: the model that decodes, VAR on or off.
        ids: int32 [B, n].
        cached: tokens of each text that are in the cache.
        steps: tokens that a run feeds.

    Returns:
        The run, which returns the last logits.
    """
    tokens = [jnp.asarray(ids[:, at : at + 1]) for at in range(cached, cached + steps)]
    held: list[Any] = [_cache_of(model, ids, cached, cached + steps), var_model.init(len(ids))]
    begin = {name: np.asarray(getattr(held[0], name)) for name in ("mask", "positions", "length")}
    one = jnp.ones((len(ids), 1), bool)

    def run() -> Any:
        kv, state = dataclasses.replace(held[0], **begin), held[1]
        for following in tokens:
            out, state = var_model.advance(state, following, one, kv, last_logits_only=True, donate=True)
            kv = out.kv
        held[:] = kv, state
        return out.logits

    return run


def _cache_of(model: Model, ids: np.ndarray, cached: int, capacity: int) -> KVCache:
    """A key/value cache with the first `cached` positions of texts int32 [B, n] of `capacity`.

    The texts are read whole and one by one: one program for any number of texts and of cached positions.
    """
    real = jnp.ones((1, ids.shape[1]), bool)

    def read(row: np.ndarray) -> KVCache | None:
        _, kv = plain_step(model.params, model.empty_cache(1, len(row)), jnp.asarray(row[None]), real, model.network)
        return kv

    def joined(*rows: Any) -> Any:
        """Of `capacity` slots: those of keys and values are their third axis, those of the rest the second."""
        if not rows[0].ndim:
            return rows[0]
        whole = np.concatenate(rows)
        return whole[:, :, :capacity] if whole.ndim == 4 else whole[:, :capacity]

    whole = jax.tree.map(joined, *map(read, ids))
    there = np.broadcast_to(np.arange(capacity) < cached, (len(ids), capacity))
    return jax.tree.map(jnp.asarray, dataclasses.replace(whole, mask=there, length=np.int32(cached)))


def _prepared(
    model: Model, var_model: VARModel, task: Task, ids: np.ndarray, calls: int
) -> tuple[Callable[[], Any], Workload, Mix]:
    """The run of a task, compiled, and what it computes; ids [B, n] of decoding, [calls, B, T] of prefills."""
    itemsize = model.dtype.itemsize
    if task.decodes:
        run = decoding(model, var_model, ids, task.cached, calls)
        middle = task.cached + (calls - 1) // 2
        workload = Workload(task.batch, 1, middle, task.cached + calls, last_logits_only=True, itemsize=itemsize)
    else:
        run = prefilling(var_model, ids)
        workload = Workload(task.batch, task.length, itemsize=itemsize)
    jax.block_until_ready(run())
    return run, workload, _mix(var_model, task, ids, calls)


def _var_models(
    model: Model, configs: Mapping[str, VARConfig], texts: Sequence[np.ndarray], keys: int
) -> dict[str, VARModel]:
    """Policies with answers of one kind share a table, so that another policy compiles nothing new."""
    stats = random_stats(model, texts, keys)
    ranks = {"answers": 0, "affine": min(RANK, model.config.hidden_size)}
    tables: dict[str, tuple[RouteTable, Answers | None]] = {}
    found = {}
    for name, config in configs.items():
        table = None
        if config.enable_var:
            kind = name.partition(",")[0]
            kind = kind if kind in ranks else "none"
            if kind not in tables:
                answers = random_answers(model, stats.keys, ranks[kind]) if kind in ranks else None
                tables[kind] = build_for(model, config, stats, answers, keep_shapes=True), answers
            shared, answers = tables[kind]
            table = with_policies(shared, config, stats, answers)
        found[name] = VARModel(model, config, table=table)
    return found


def random_answers(model: Model, keys: np.ndarray, rank: int = 0) -> Answers:
    """An answer for every expert of every layer at every key: small, so that the text continues as before.

    Args:
        model: whose layers and experts they describe.
        keys: int32 [R, C].
        rank: r of random maps, at most the hidden size; 0: the answers are constant.

    Returns:
        The answers; their means are the same with maps and without.
    """
    config, rng = model.config, np.random.default_rng(0)
    layers, experts, width = range(config.num_layers), config.num_experts, config.hidden_size
    empty = Answers.empty(keys, layers, experts, width, inputs=rank > 0)
    mean = rng.standard_normal(empty.mean.shape, np.float32) * np.float32(1e-3)
    maps = None
    if rank:
        read, write = rng.standard_normal((2, len(layers), width, rank), np.float32)
        mix = rng.standard_normal((len(layers), experts, rank, rank), np.float32) * np.float32(1e-3 / width)
        write = np.linalg.qr(write)[0].swapaxes(1, 2)
        maps = Maps(read, mix, write, np.full((len(layers), experts), 0.5))
    ones = np.ones(empty.mass.shape)
    return dataclasses.replace(empty, mean=mean, mass=ones, count=np.ones_like(empty.count), maps=maps)


def _draw(stream: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """int32 [*shape]: stretches of a stream of ids from random places."""
    length = shape[-1]
    if len(stream) <= length:
        raise InputError(f"the texts hold {len(stream)} tokens, but a task reads {length} in a row; give more text")
    starts = rng.integers(0, len(stream) - length, shape[:-1])
    return stream[starts[..., None] + np.arange(length)].astype(np.int32)


def prefilling(var_model: VARModel, texts: np.ndarray) -> Callable[[], Any]:
    """A run that reads texts one after the other.

    VAR's state continues from run to run.

    Args:
        var_model: the model, VAR on or off.
        texts: int32 [calls, B, T].

    Returns:
        The run, which returns the last logits.
    """
    batches = [jnp.asarray(ids) for ids in texts]
    mask = jnp.ones(texts.shape[1:], bool)
    held = [var_model.init(texts.shape[1])]

    def run() -> Any:
        for ids in batches:
            out, held[0] = var_model.advance(held[0], ids, mask, donate=True)
        return out.logits

    return run


def _mix(var_model: VARModel, task: Task, ids: np.ndarray, calls: int) -> Mix:
    """What ran, read from the routing of the tokens that are timed."""
    config, table = var_model.model.config, var_model.table
    if task.decodes:
        # Text by text and all of one length, which compiles once; what comes later changes nothing before it.
        used = np.concatenate([used_experts(var_model, text[None]) for text in ids], axis=1)
        rows = used[:, :, task.cached : task.cached + calls].sum(axis=1)  # [L, calls, E]
    else:
        used = np.stack([used_experts(var_model, text) for text in ids], axis=1)
        rows = used.sum(axis=(2, 3))
    experts = float(rows.sum(-1).mean()) / (task.batch * task.length)
    mix = Mix(experts, distinct=float((rows > 0).sum(-1).mean()), spread=_spread(rows))
    return mix if table is None else planned(mix, config, table, task.batch * task.length, orders=len(ORDERS))


def _spread(rows: np.ndarray) -> float:
    """`Mix.spread` of the rows int [..., E] that calls gave the experts of their layers."""
    hit = rows > 0
    mean = rows.sum(axis=-1, keepdims=True) / np.maximum(hit.sum(axis=-1, keepdims=True), 1)
    chance = np.broadcast_to(mean - 1, rows.shape)[hit]  # variance of a Poisson number of rows after the first
    scale = float((chance**2).sum())
    beyond = float(((rows - mean)[hit] ** 2 - chance).sum())
    return math.sqrt(max(beyond, 0.0) / scale) if scale else 0.0
