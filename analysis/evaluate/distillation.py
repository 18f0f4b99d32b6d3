"""Distillation: answers are trained so that the model under VAR comes close to the full model.

Letters: A layers that are collected, N answers of a layer, M trained ones, C steps of a line of descent, D hidden size,
r rank, E experts, K experts per token, B sequences, T positions.

Means are the best answers one by one, but not together, where layers above read what layers below answered. Here every
answer gets a correction, found by gradient descent (Adam, Kingma and Ba 2015) on the Kullback-Leibler divergence from
the full model's next-token distribution to that of the model under its plan, on the documents that the tables were
built from. Rare answers cannot be trained: an answer is corrected by the sum of the corrections along its line of
descent (the same expert at the token alone, at the bigram, ...), and only those with enough occurrences have a
correction of their own. Where answers are affine (`varjax.affine`), their maps are trained as well. The policy, the
gate and the experts do not change.

What is trained is relative: corrections are in units of the typical answer, changes of a map in units of its entries.
Adam moves every number by about the learning rate, whatever its gradient, so one rate suits models with outputs of any
size. All layers have the same unit, because they add to the same hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

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
from models.placement import to_host
from varjax import step as var_step
from varjax.affine import AffineMap
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.model import build_for
from varjax.progress import progress_bar
from varjax.routing import NO_ANSWER, LayerAnswers
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
    learning_rate: float = 0.01  # at the start, relative to what is trained; falls to 0 as a cosine
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

    answers: Answers  # the given ones, with trained means and maps
    divergence: np.ndarray  # float64 [steps], nats per token, of each batch before its step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Changes:
    """What is trained in one layer; 0 at first."""

    means: Array  # float32 [M, D], corrections in units of `_unit`
    maps: tuple[Array, ...]  # float32, of read, mix and write, in units of their entries; () if answers are constant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layer:
    """What the changes of one layer refer to. On the host or the device."""

    line: Any  # int32 [N, C], the corrections that count for an answer, M where there are no more
    unit: Any  # float32 [], of the corrections
    inputs: Any  # float32 [N, D], the mean input of each answer; None if answers are constant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _ChangedMap(AffineMap):
    """A map whose centers follow from what it reads and mixes now, for the answers that are looked up."""

    inputs: Array  # float32 [N, D]

    def centers(self, experts: Array, answer: Array) -> Array:
        """float32 [..., K, r]: the answers' mean inputs behind `read` and their experts' `mix`."""
        read = self.inputs.at[answer].get(mode="clip") @ self.read
        # A token's experts are distinct, so each has a place of its own: K times smaller than every slot by every mix.
        placed = jnp.einsum("...ke,...kr->...er", jax.nn.one_hot(experts, self.mix.shape[1]), read)
        every = jnp.einsum("...er,res->...es", placed, self.mix)
        return jnp.take_along_axis(every, experts[..., None], axis=-2, mode="clip")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Changed(LayerAnswers):
    """Answers with the corrections along their lines of descent, and a changed map."""

    correction: Array  # float32 [M, D], in units of `unit`
    unit: Array  # float32 []
    line: Array  # int32 [N, C]

    @classmethod
    def of(cls, known: LayerAnswers, layer: _Layer, changes: _Changes) -> Self:
        """The answers of a table under the changes."""
        own = dict(vars(known))
        if known.affine is not None:
            own["affine"] = _ChangedMap(**vars(_moved(known.affine, changes.maps)), inputs=layer.inputs)
        return cls(**own, correction=changes.means, unit=layer.unit, line=layer.line)

    def rows(self, answer: Array) -> Array:
        """float32 [..., D]: the means of some answers, corrected."""
        found = self.correction.at[self.line[answer]].get(mode="fill", fill_value=0)  # [..., C, D]
        return super().rows(answer) + self.unit * jnp.sum(found, axis=-2)


@jax.jit
def _moved(affine: AffineMap, changes: tuple[Array, ...]) -> AffineMap:
    """A map after its changes, written by orthonormal rows again; its centers are those of the map before.

    The length of a deviation predicts the error, in training as in the table that is built from the result.
    """
    parts = (affine.read, affine.mix, affine.write)
    read, mix, write = (
        part + jnp.sqrt(jnp.mean(jnp.square(part))) * change for part, change in zip(parts, changes, strict=True)
    )
    root = jnp.linalg.cholesky(jnp.matmul(write, write.T, precision="highest"))
    write = jax.scipy.linalg.solve_triangular(root, write, lower=True)
    return dataclasses.replace(affine, read=read, mix=mix @ root, write=write)


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
    assert table.answers is not None
    known = [table.answers[layer] for layer in answers.layers]
    trained = [int((count >= settings.min_count).sum()) for count in answers.count]
    if 0 in trained:
        raise InputError(
            f"layer {answers.layers[trained.index(0)]} has no answer of min_count={settings.min_count} occurrences to "
            "train; collect over more text, or lower min_count"
        )
    unit = _unit([to_host(one.answers) for one in known], answers.mass)
    layers = [
        _Layer(
            line=_lines(answers, layer, settings.min_count),
            unit=unit,
            inputs=None if one.affine is None else shrunk(answers, layer, config.answer_shrinkage).inputs,
        )
        for layer, one in zip(answers.layers, known, strict=True)
    ]
    changes = [_unchanged(one, number) for one, number in zip(known, trained, strict=True)]
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))
    state: Any = (changes, optimizer.init(changes), jnp.zeros(settings.steps, jnp.float32))
    done, begun = (checkpoints and checkpoints.newest(state)) or (0, state)
    # The dtypes are named because a checkpoint gives numbers of Python, for which JAX would compile the step again.
    state = model.place(jax.tree.map(lambda like, leaf: jnp.asarray(leaf, like.dtype), state, begun))
    update = _make_step(model.network, optimizer, config, answers.layers)
    on_device = model.place(jax.tree.map(jnp.asarray, layers))

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
    return Distilled(_with_changes(answers, config, known, layers, state[0]), np.asarray(state[2], np.float64))


def _with_changes(
    answers: Answers, config: VARConfig, known: list[LayerAnswers], layers: list[_Layer], changes: list[_Changes]
) -> Answers:
    """The answers after training, on the host. `known` are those that the changes refer to."""
    mean, inputs, m2 = np.array(answers.mean, np.float32), np.array(answers.inputs, np.float32), np.array(answers.m2)
    maps = None if answers.maps is None else jax.tree.map(np.array, answers.maps)
    for a, number in enumerate(answers.layers):
        estimate = shrunk(answers, number, config.answer_shrinkage)
        correction = np.concatenate([to_host(changes[a].means), np.zeros((1, mean.shape[-1]), np.float32)])
        mean[a] = estimate.answers + layers[a].unit * correction[layers[a].line].sum(axis=1)
        inputs[a] = estimate.inputs
        m2[a] = answers.mass[a] * np.square(estimate.deviation, dtype=np.float64)
        affine = known[a].affine
        if maps is not None and affine is not None:
            moved = _moved(affine, changes[a].maps)
            maps.read[a], maps.write[a] = to_host(moved.read), to_host(moved.write)
            maps.mix[a] = to_host(moved.mix).transpose(1, 0, 2)
    return dataclasses.replace(answers, mean=mean, inputs=inputs, m2=m2, maps=maps, distilled=True)


def _unit(rows: Sequence[np.ndarray], mass: np.ndarray) -> np.ndarray:
    """float32 []: the root mean square of the answers in the median layer, weighted by the mass [A, N].

    `rows` are the answers of each layer, [N, D].
    """
    pairs = list(zip(mass, rows, strict=True))
    squares = [np.einsum("n,nd,nd->", own, row, row, dtype=np.float64) / own.sum() for own, row in pairs]
    return np.asarray(np.sqrt(np.median(squares) / rows[0].shape[1]), np.float32)


def _unchanged(known: LayerAnswers, trained: int) -> _Changes:
    """No changes, for the answers of a layer of which some number is trained."""
    maps = () if known.affine is None else (known.affine.read, known.affine.mix, known.affine.write)
    return _Changes(jnp.zeros((trained, known.answers.shape[-1]), jnp.float32), tuple(map(jnp.zeros_like, maps)))


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
    """A jitted `step(state, number, params, table, given, ids, mask) -> state`, where `given` is a list of `_Layer`.

    The state is (list of `_Changes`, optimizer state, divergence float32 [steps] of each step's batch), and is donated.
    """

    def objective(
        changes: list[_Changes], params: Params, table: RouteTable, given: list[_Layer], ids: Array, mask: Array
    ) -> Array:
        assert table.answers is not None
        known = list(table.answers)
        for layer, one, change in zip(layers, given, changes, strict=True):
            known[layer] = _Changed.of(known[layer], one, change)
        state = var_step.init(table, config, ids.shape[0])
        rules = Settings.of(config, table.num_layers)
        plan = dataclasses.replace(var_step.plan(table, state, ids, 0.0, rules, mask), answers=tuple(known))
        teacher = jax.lax.stop_gradient(network.forward(params, ids, attention_mask=mask).logits)
        student = network.forward(params, ids, attention_mask=mask, plan=plan).logits
        target = jax.nn.log_softmax(teacher, axis=-1)
        divergence = jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(student, axis=-1)), axis=-1)
        return jnp.sum(jnp.where(mask, divergence, 0)) / jnp.sum(mask, dtype=jnp.float32)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, number: Array, *rest: Any) -> Any:
        changes, inner, history = state
        divergence, grads = jax.value_and_grad(objective)(changes, *rest)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = optimizer.update(grads, inner)
        return optax.apply_updates(changes, updates), inner, history.at[number].set(divergence)

    return step
