"""What an error in each layer's output costs, from one backward pass: the price list of a policy.

Letters: L layers, A layers with answers, B sequences, T positions, K experts per token, D hidden size, Q quantiles.

For a small error e of a layer's output at a token, the Kullback-Leibler divergence from the plain model is
(e . g)^2 / 2 in expectation, where g is the gradient of the text's log-likelihood under labels that the model itself
draws: the Fisher information (Amari 1998; it prices weights in Theis et al. 2018, arXiv 1801.05787). One backward pass
gives g of all layers and tokens. With the errors of the answers that would stand in, this says for each layer what a
squared unit of the *expected* error, all that is known when a plan is carried out, costs.

An expert is worth dropping where its expected error is cheap, whatever the layer: at one price for all layers, layer l
has the tolerance sqrt(price / cost[l]). So a policy has one number to choose instead of one per layer.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from analysis.evaluate.points import Subject
from analysis.report.provenance import hash_json
from analysis.text.batches import batches
from models.decoder import Network
from models.parameters import Params
from varjax import checksums
from varjax import step as var_step
from varjax.config import VARConfig
from varjax.progress import progress_bar
from varjax.routing import NO_ANSWER, Dropped, LayerAnswers
from varjax.step import Settings
from varjax.table import RouteTable

_QUANTILES = 256
_SAVED = ("cost", "errors", "slots")
_FORMAT = 1  # of the files of prices; raised whenever the way they are measured changes


class Choice(NamedTuple):
    """What one layer does."""

    layer: int
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Prices:
    """What errors cost, and how large they are. Costs are in nats per token and squared unit of the hidden state."""

    layers: tuple[int, ...]  # [A]
    cost: np.ndarray  # float64 [A], divergence per squared expected error of a slot
    errors: np.ndarray  # float64 [A, Q], quantiles of the slots' expected errors, ascending; 0 without a slot
    slots: np.ndarray  # float64 [A], slots with an answer, per token

    def choices(self, price: float) -> list[Choice]:
        """Every layer drops what costs less than a price.

        Args:
            price: nats per slot.

        Returns:
            The tolerances of the layers in which an answer was of use on the documents.
        """
        if not price > 0:
            return []
        return [
            Choice(layer, tolerance)
            for layer, tolerance, slots in zip(self.layers, self._tolerances(price).tolist(), self.slots, strict=True)
            if slots > 0
        ]

    def expected(self, price: float) -> float:
        """The divergence that is to be expected at a price, if the layers' divergences add up.

        Args:
            price: nats per slot.

        Returns:
            Nats per token.
        """
        dropped = self.errors < self._tolerances(price)[:, None]
        each = np.where(dropped, np.square(self.errors), 0).mean(axis=1)
        return float(np.sum(self.cost * self.slots * each))

    @property
    def highest(self) -> float:
        """A price at which every slot is dropped, except extreme outliers."""
        return float(np.max(self.cost * np.square(2 * self.errors[:, -1]), initial=0.0))

    def at(self, budget: float) -> float:
        """Find the price at which the expected divergence reaches a budget.

        Args:
            budget: nats per token.

        Returns:
            Nats per slot; `highest` if the budget is never reached.
        """
        low, high = 0.0, self.highest
        if self.expected(high) <= budget:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.expected(middle) <= budget else (low, middle)
        return low

    def within(self, budget: float) -> list[Choice]:
        """Find the choices whose expected divergence reaches a budget.

        Args:
            budget: nats per token.

        Returns:
            The choices by layer; none without a budget.
        """
        return self.choices(self.at(budget)) if budget > 0 else []

    def _tolerances(self, price: float) -> np.ndarray:
        return np.sqrt(price / np.maximum(self.cost, np.finfo(np.float64).tiny))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Probe(LayerAnswers):
    """Adds something to the output of a layer, in order to differentiate with respect to it."""

    added: Array  # float32 [B, T, D]

    def total(self, dropped: Dropped) -> Array:
        return self.added


def measure_prices(subject: Subject, everything: VARConfig, table: RouteTable) -> Prices:
    """Measure the prices on the documents of a subject.

    Args:
        subject: tuning documents, from which the table was not built and on which results must not be reported.
        everything: a config under which every key with answers is looked up in every layer that may use them.
        table: of that config, with equal shapes under any policy.

    Returns:
        The prices; kept on disk if the subject has a folder.
    """
    name = hash_json([_FORMAT, subject.digest, subject.seed, everything])[:32]
    path = subject.folder and subject.folder / f"prices-{name}.json"
    if path is not None and path.is_file():
        saved = checksums.read_json(path, "delete it, and the prices are measured again")
        return Prices(subject.answers.layers, *(np.asarray(saved[name]) for name in _SAVED))
    found = _measured(subject, everything, table)
    if path is not None:
        checksums.write_json(path, {name: getattr(found, name).tolist() for name in _SAVED})
    return found


def _measured(subject: Subject, everything: VARConfig, table: RouteTable) -> Prices:
    model, layers = subject.model, subject.answers.layers
    table = model.place(table)
    rules = dataclasses.replace(table.rules, tolerance=jnp.zeros_like(table.rules.tolerance))  # nothing is dropped
    table = dataclasses.replace(table, rules=rules, experts_kept=jnp.full_like(table.experts_kept, table.top_k))
    run = partial(_errors, network=model.network, config=everything, layers=layers)
    key, tokens = jax.random.key(subject.seed), 0
    found: list[list[np.ndarray]] = [[] for _ in layers]  # [2, n]: expected error and divergence of the slots
    windows = (subject.batch_size, subject.max_length, subject.stride)
    with progress_bar(subject.documents, unit="document", show=subject.progress, desc="prices") as documents:
        for number, batch in enumerate(batches(documents, *windows)):
            ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
            expected, divergence, there = jax.device_get(
                run(model.params, table, ids, mask, jax.random.fold_in(key, number))
            )
            tokens += int(batch.mask.sum())
            for a, one in enumerate(there):
                found[a].append(np.stack([expected[a][one], divergence[a][one]]))
    cost, errors, slots = np.zeros(len(layers)), np.zeros((len(layers), _QUANTILES)), np.zeros(len(layers))
    for a, parts in enumerate(found):
        expected, divergence = np.concatenate(parts, axis=1).astype(np.float64)
        slots[a] = len(expected) / max(tokens, 1)
        if len(expected) == 0:
            continue
        errors[a] = np.quantile(expected, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
        cheap = expected <= np.median(expected)  # those that a policy drops; what outliers cost is not the question
        cost[a] = divergence[cheap].sum() / max(np.square(expected[cheap]).sum(), np.finfo(np.float64).tiny)
    return Prices(layers, cost, errors, slots)


@partial(jax.jit, static_argnames=("network", "config", "layers"))
def _errors(
    params: Params,
    table: RouteTable,
    ids: Array,
    mask: Array,
    key: Array,
    *,
    network: Network,
    config: VARConfig,
    layers: tuple[int, ...],
) -> tuple[Array, Array, Array]:
    """float32 [A, B, T, K]: the expected error of each slot's answer and the divergence that it causes; bool: valid."""
    assert table.answers is not None
    state = var_step.init(table, config, ids.shape[0])
    plan = var_step.plan(table, state, ids, 0.0, Settings.of(config, table.num_layers), mask)

    def likelihood(added: tuple[Array, ...]) -> tuple[Array, Any]:
        known = list(table.answers or ())
        for a, layer in enumerate(layers):
            known[layer] = _Probe(**vars(known[layer]), added=added[a])
        changed = dataclasses.replace(plan, answers=tuple(known))
        out = network.forward(params, ids, attention_mask=mask, plan=changed, recorded_layers=layers)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(out.logits))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits), drawn[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(mask, chosen, 0)), (out.recorded, out.routing)

    nothing = jnp.zeros((*ids.shape, table.answers[layers[0]].answers.shape[-1]), jnp.float32)
    grads, (recorded, routing) = jax.grad(likelihood, has_aux=True)((nothing,) * len(layers))
    expected, divergence, valid = [], [], []
    for record, grad, layer in zip(recorded, grads, layers, strict=True):
        known, experts, weights = table.answers[layer], routing.experts[layer], routing.weights[layer]
        answer = known.find(plan.row[layer], experts)
        error, moved = known.deviation[answer], None
        if known.affine is not None:
            deviations = known.affine.deviations(record.inputs, experts, answer)
            error = known.affine.error(error, experts, deviations)
            moved = weights[..., None] * deviations
        # One slot at a time: the slots take the place of the tokens, with one dropped expert each.
        instead = known.total(Dropped(answer[..., None], weights[..., None], moved))
        away = jnp.sum((instead - record.outputs.astype(jnp.float32)) * grad[..., None, :], axis=-1)
        expected.append(weights * error)
        divergence.append(jnp.square(away) / 2)
        valid.append(mask[..., None] & (answer != NO_ANSWER) & (weights > 0))
    return jnp.stack(expected), jnp.stack(divergence), jnp.stack(valid)
