"""Training of a decoder as a language model: one pure step, and a loop that can be killed and resumed.

Letters: B sequences, T positions, L layers, E experts, K experts per token, V vocabulary.

The loss is next-token cross entropy plus the load-balancing loss of Switch Transformers (Fedus et al. 2021, arXiv
2101.03961, equation 4), per layer. The optimizer is AdamW with warm-up and cosine decay (optax), checkpoints are
written by orbax. The order of the data depends on the step alone, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from models.config import MoEConfig
from models.decoder import forward
from models.experts import Engine
from models.parameters import Params, init_params, param_shardings, prepare
from models.placement import ONE_DEVICE, Placement
from varjax.errors import InputError
from varjax.files import named_errors


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run, apart from the architecture and the data."""

    steps: int = 1000
    batch_size: int = 16  # sequences per step
    length: int = 256  # tokens per sequence
    learning_rate: float = 3e-3  # peak
    warmup_steps: int = 80  # at most half of all
    final_learning_rate: float = 1e-4
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0
    balance: float = 0.01  # weight of the load-balancing loss
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run after a step."""

    params: Params  # canonical layout, float32
    optimizer: Any
    step: jax.Array  # int32[]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainInfo:
    """Measurements of a training step."""

    loss: jax.Array  # float32[], nats per token
    balance: jax.Array  # float32[], 1 = perfectly even load
    load: jax.Array  # float32[L, E], fraction of the assignments


def _optimizer(train: TrainConfig) -> optax.GradientTransformation:
    warmup = min(train.warmup_steps, train.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, warmup, train.steps, train.final_learning_rate
    )

    def matrices(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=train.weight_decay, mask=matrices),
    )


def _init_state(config: MoEConfig, train: TrainConfig, placement: Placement = ONE_DEVICE) -> TrainState:
    """The initial state on the devices of `placement`; the optimizer's arrays are divided like their parameters."""
    params = init_params(config, jax.random.key(train.seed))
    state = _optimizer(train).init(params)
    if placement.mesh is not None:
        shardings = param_shardings(config, placement)
        params = jax.device_put(params, shardings)
        state = optax.tree.map_params(
            _optimizer(train), jax.device_put, state, shardings, transform_non_params=placement.place
        )
    return TrainState(params, state, placement.place(jnp.zeros((), jnp.int32)))


def _make_step(
    config: MoEConfig, train: TrainConfig, engine: Engine, placement: Placement = ONE_DEVICE
) -> Callable[[TrainState, jax.Array], tuple[TrainState, TrainInfo]]:
    """A jitted `step(state, tokens int32[B, T + 1]) -> (state, info)` that donates the state."""
    update = _optimizer(train).update

    def objective(params: Params, tokens: jax.Array) -> tuple[jax.Array, TrainInfo]:
        own = {"config": config, "engine": engine, "placement": placement}
        out = forward(prepare(params, engine), tokens[:, :-1], **own)
        nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean()
        chosen = jax.nn.one_hot(out.routing.experts, config.num_experts).mean(axis=(1, 2, 3))
        balance = config.num_experts * (chosen * out.router_probs.mean(axis=(1, 2))).sum(-1).mean()
        return nll + train.balance * balance, TrainInfo(nll, balance, chosen)

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, TrainInfo]:
        grads, info = jax.grad(objective, has_aux=True)(state.params, tokens)
        updates, opt_state = update(grads, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), info

    return jax.jit(step, donate_argnums=0)


def pack(documents: list[np.ndarray], length: int) -> np.ndarray:
    """Join documents end to end and cut them into rows.

    Args:
        documents: int[n] token ids each.
        length: T.

    Returns:
        int32[rows, T + 1]; the last token of a row is the first one of the next.

    Raises:
        InputError: the documents hold fewer tokens than one row.
    """
    stream = np.concatenate(documents).astype(np.int32)
    rows = (len(stream) - 1) // length
    if rows < 1:
        raise InputError(
            f"the training documents hold {len(stream)} tokens, fewer than one row of {length + 1}; add text"
        )
    starts = np.arange(rows)[:, None] * length
    return stream[starts + np.arange(length + 1)]


def _batch_of(rows: np.ndarray, step: int, train: TrainConfig) -> np.ndarray:
    """int32[B, T + 1]: the batch of a step. Every row is seen once per epoch, in an order drawn for the epoch."""
    taken = np.arange(step * train.batch_size, (step + 1) * train.batch_size)
    epochs, places = np.divmod(taken, len(rows))
    orders = {
        epoch: np.random.default_rng((train.seed, epoch)).permutation(len(rows)) for epoch in set(epochs.tolist())
    }
    return rows[[orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]]


def restore(config: MoEConfig, train: TrainConfig, checkpoints: Path, placement: Placement = ONE_DEVICE) -> TrainState:
    """Read the newest state of a run.

    Args:
        config: the architecture.
        train: the settings of the run.
        checkpoints: the folder with its checkpoints.
        placement: the devices.

    Returns:
        The state; the initial one if there is no checkpoint yet.
    """
    with _manager(checkpoints) as manager:
        return _newest(manager, config, train, placement)


def train_steps(
    config: MoEConfig,
    train: TrainConfig,
    engine: Engine,
    rows: np.ndarray,
    checkpoints: Path,
    save_every: int = 200,
    placement: Placement = ONE_DEVICE,
) -> Iterator[tuple[int, TrainState, TrainInfo]]:
    """Run the training, or resume it from its newest checkpoint.

    Args:
        config: the architecture.
        train: the settings of the run.
        engine: what runs the experts.
        rows: int32[rows, T + 1] (`pack`).
        checkpoints: the folder for checkpoints; the newest two are kept.
        save_every: steps between checkpoints.
        placement: the devices.

    Yields:
        `(step, state, info)` after each step. The state is donated to the next step: read it before continuing.

    Raises:
        OSError: a checkpoint cannot be written; names the folder.
    """
    with _manager(checkpoints) as manager:
        state = _newest(manager, config, train, placement)
        step = _make_step(config, train, engine, placement)
        for index in range(int(state.step), train.steps):
            state, info = step(state, jnp.asarray(_batch_of(rows, index, train)))
            if (index + 1) % save_every == 0 or index + 1 == train.steps:
                with named_errors(checkpoints):
                    manager.save(index + 1, args=ocp.args.StandardSave(state))
                    manager.wait_until_finished()
            yield index + 1, state, info


def _manager(checkpoints: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(checkpoints.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


def _newest(manager: ocp.CheckpointManager, config: MoEConfig, train: TrainConfig, placement: Placement) -> TrainState:
    state = _init_state(config, train, placement)
    latest = manager.latest_step()
    return state if latest is None else manager.restore(latest, args=ocp.args.StandardRestore(state))
