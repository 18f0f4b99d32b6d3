"""Distillation: answers are trained so that the model under VAR comes close to the full model.

Letters: L layers, N answers of a layer, M trained ones, C steps of a line of descent, D hidden size, B sequences, T
positions, V vocabulary.

Means are the best answers one by one, but not together, where layers above read what layers below answered. Here every
answer gets a correction, found by gradient descent (Adam, Kingma and Ba 2015) on the Kullback-Leibler divergence from
the full model's next-token distribution to that of the model under its plan, on the documents that the tables were
built from. Rare answers cannot be trained: an answer is corrected by the sum of the corrections along its line of
descent (the same expert at the token alone, at the bigram, ...), and only those with enough occurrences have a
correction of their own. The plan, the gate and the experts do not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from analysis.checkpoints import Checkpoints
from analysis.text.batches import Batch, batches
from analysis.text.encoding import Encoded
from models import Model
from models.decoder import Network
from models.parameters import Params
from varjax import step as var_step
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import build_for
from varjax.progress import progress_bar
from varjax.routing import NO_ANSWER, Dropped, LayerAnswers
from varjax.shrinkage import lineage, shrunk
from varjax.stats import RoutingStats
from varjax.step import Settings
from varjax.table import RouteTable


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The settings of a training run.

    Raises:
        InputError: a setting is out of its range.
    """

    steps: int = 300
    batch_size: int = 16  # windows of a batch at `max_length`
    max_length: int = 256  # tokens
    learning_rate: float = 3e-3  # at the start; falls to 0 as a cosine
    min_count: int = 50  # occurrences that an answer needs for a correction of its own
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "max_length": 2, "min_count": 1}
        faults = [
            f"{name}={getattr(self, name)}: expected at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if not self.learning_rate > 0:
            faults.append(f"learning_rate={self.learning_rate}: expected more than 0")
        if faults:
            raise InputError("; ".join(faults))


@dataclasses.dataclass(frozen=True)
class Distilled:
    """The result of a training run."""

    answers: Answers  # the given ones, with trained means
    divergence: np.ndarray  # float64 [steps], nats per token, of each batch before its step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Corrected(LayerAnswers):
    """Answers with the corrections along their lines of descent."""

    correction: Array  # float32 [M, D]
    line: Array  # int32 [N, C], the corrections that count for an answer, M where there are no more

    def total(self, dropped: Dropped) -> Array:
        """float32 [..., D]: the answers of the dropped experts, corrected and weighted."""
        known = dropped.answer != NO_ANSWER
        weight = jnp.where(known, dropped.weights, 0.0)
        line = self.line[dropped.answer]  # [..., K, C]
        rows = self.answers[dropped.answer] + jnp.sum(self.correction.at[line].get(mode="fill", fill_value=0), axis=-2)
        return jnp.sum(rows * weight[..., None], axis=-2)


def distill(
    model: Model,
    stats: RoutingStats,
    answers: Answers,
    documents: Sequence[Encoded],
    config: VARConfig,
    settings: DistillConfig | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    save_steps: int = 50,
    progress: bool = True,
) -> Distilled:
    """Train the answers for the policy of `config`.

    Args:
        model: the full model, which teaches.
        stats: as they were collected.
        answers: as they were collected, not distilled already.
        documents: to train on, the build documents.
        config: the policy under which the model will run; its cached tier is not used.
        settings: of the training; None: the defaults.
        checkpoints: where to resume from and to save to.
        save_steps: steps between checkpoints.
        progress: show a bar on standard error.

    Returns:
        The trained answers.

    Raises:
        InputError: the answers were distilled before, or a layer has none of enough occurrences.
    """
    settings = settings or DistillConfig()
    if answers.distilled:
        raise InputError("these answers were distilled already; give the means that were collected")
    config = dataclasses.replace(config, cache_size=0, answer_dtype="float32")
    table = model.place(build_for(model, config, stats, answers, keep_shapes=True))
    lines = [_lines(answers, layer, settings.min_count) for layer in answers.layers]
    trained = [int((count >= settings.min_count).sum()) for count in answers.count]
    if 0 in trained:
        raise InputError(
            f"layer {answers.layers[trained.index(0)]} has no answer of min_count={settings.min_count} occurrences to "
            "train; collect over more text, or lower min_count"
        )
    corrections = [jnp.zeros((number, model.config.hidden_size), jnp.float32) for number in trained]
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))
    state: Any = (corrections, optimizer.init(corrections), jnp.zeros(settings.steps, jnp.float32))
    done, state = (checkpoints and checkpoints.newest(state)) or (0, state)
    state = model.place(jax.tree.map(jnp.asarray, state))
    update = _make_step(model.network, optimizer, config, answers.layers)
    on_device = model.place([jnp.asarray(line) for line in lines])

    numbered = zip(range(settings.steps), _endless(documents, settings), strict=False)
    with progress_bar(numbered, total=settings.steps, unit="step", desc="distillation", show=progress) as bar:
        for number, batch in bar:
            if number < done:
                continue
            ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
            state = update(state, np.int32(number), model.params, table, on_device, ids, mask)
            if number % 10 == 0:  # not at every step: reading it waits for the device
                bar.set_postfix(nats=f"{float(state[2][number]):.4f}")
            if checkpoints and (number + 1) % save_steps == 0:
                checkpoints.save(number + 1, state)
    mean, m2 = np.array(answers.mean, np.float32), np.array(answers.m2)
    for a, layer in enumerate(answers.layers):
        padded = np.concatenate([np.asarray(state[0][a]), np.zeros((1, mean.shape[-1]), np.float32)])
        estimate = shrunk(answers, layer, config.answer_shrinkage)
        mean[a] = estimate.answers + padded[lines[a]].sum(axis=1)
        m2[a] = answers.mass[a] * np.square(estimate.deviation, dtype=np.float64)
    found = dataclasses.replace(answers, mean=mean, m2=m2, distilled=True)
    return Distilled(found, np.asarray(state[2], np.float64))


def _lines(answers: Answers, layer: int, min_count: int) -> np.ndarray:
    """int32 [N, C]: for each answer of a layer, which of the M corrections are in it; M where there are no more."""
    a = answers.layers.index(layer)
    trained = answers.count[a] >= min_count
    number = np.where(trained, np.cumsum(trained) - 1, trained.sum()).astype(np.int32)
    parent, depth = lineage(answers.keys, answers.entry[a], len(trained))
    line, here = [number], parent
    for _ in range(depth.max(initial=0)):
        line.append(np.where(here == NO_ANSWER, trained.sum(), number[here]).astype(np.int32))
        here = np.where(here == NO_ANSWER, NO_ANSWER, parent[here])
    return np.stack(line, axis=1)


def _endless(documents: Sequence[Encoded], settings: DistillConfig) -> Iterator[Batch]:
    """Batches without end: the documents in a new random order for every epoch."""
    epoch = 0
    while True:
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(documents))
        yield from batches((documents[index] for index in order), settings.batch_size, settings.max_length)
        epoch += 1


def _make_step(
    network: Network, optimizer: optax.GradientTransformation, config: VARConfig, layers: tuple[int, ...]
) -> Callable[..., Any]:
    """A jitted `step(state, number, params, table, lines, ids, mask) -> state`.

    The state is (corrections, optimizer state, divergence float32 [steps] of each step's batch), and is donated.
    """

    def objective(
        corrections: list[Array], params: Params, table: RouteTable, lines: list[Array], ids: Array, mask: Array
    ) -> Array:
        assert table.answers is not None
        known = list(table.answers)
        for layer, correction, line in zip(layers, corrections, lines, strict=True):
            own = {field.name: getattr(known[layer], field.name) for field in dataclasses.fields(LayerAnswers)}
            known[layer] = _Corrected(**own, correction=correction, line=line)
        state = var_step.init(table, config, ids.shape[0])
        how = Settings.of(config, table.num_layers)
        plan = dataclasses.replace(var_step.plan(table, state, ids, 0.0, how, mask), answers=tuple(known))
        teacher = jax.lax.stop_gradient(network.forward(params, ids, attention_mask=mask).logits)
        student = network.forward(params, ids, attention_mask=mask, plan=plan).logits
        target = jax.nn.log_softmax(teacher, axis=-1)
        divergence = jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(student, axis=-1)), axis=-1)
        return jnp.sum(jnp.where(mask, divergence, 0)) / jnp.sum(mask, dtype=jnp.float32)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, number: Array, *rest: Any) -> Any:
        corrections, inner, history = state
        divergence, grads = jax.value_and_grad(objective)(corrections, *rest)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = optimizer.update(grads, inner)
        return optax.apply_updates(corrections, updates), inner, history.at[number].set(divergence)

    return step
