"""What the loss under VAR is made of: one question, one function.

Letters: L layers, R table rows, K experts per token, M scored tokens, N documents, G groups, V vocabulary.

    subject = prepare(model, stats, answers, config, documents)
    found = examine(subject)                      # every question; or one of them: layers_alone(subject), ...

Every run reads the same tokens, and all runs share one table of fixed shapes: the same tokens are planned, only what
is done with them differs. Changes are paired with the plain model, and their intervals draw whole documents
(`analysis.resampling`). A cached tier plays no part but in `groups`: what it answers depends on what it
read before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from analysis.evaluate.caching import INDEPENDENT, Caching
from analysis.evaluate.token_losses import BY_CACHE, BY_ROUTER, TokenLosses, differences, token_losses
from analysis.resampling import Estimate, ratio_with_interval
from analysis.text.encoding import Encoded
from models import Model
from varjax.answers import Answers
from varjax.config import VARConfig
from varjax.model import VARModel, build_for
from varjax.progress import progress_bar
from varjax.routing import LayerRules
from varjax.stats import RoutingStats
from varjax.table import RouteTable

DECILES = 10
_BINS = 12  # of the number of experts, at most


@dataclasses.dataclass(frozen=True)
class Change:
    """One way of routing against the plain model, on the same tokens."""

    name: str
    nats: Estimate  # mean loss added per token
    experts: float  # run per token and layer

    @property
    def perplexity(self) -> Estimate:
        """Relative change."""
        return Estimate(*(math.expm1(value) for value in dataclasses.astuple(self.nats)))


@dataclasses.dataclass(frozen=True)
class LayersAlone:
    """Each planned layer with all others left to the router, and all of them together."""

    layers: tuple[int, ...]
    alone: tuple[Change, ...]
    joint: Change
    total: Estimate  # nats per token, the sum of `alone`
    excess: Estimate  # nats per token, the joint change without that sum; 0 where layers add up


@dataclasses.dataclass(frozen=True)
class Group:
    """Some of the tokens."""

    name: str
    tokens: int
    change: Estimate  # nats per token of the group
    part: Estimate  # nats per token of all: the parts of all groups add up to the whole change


@dataclasses.dataclass(frozen=True)
class Groups:
    """The tokens under the policy as it was given, by what happened where the loss was predicted."""

    whole: Change
    key: tuple[Group, ...]
    experts: tuple[Group, ...]
    frequency: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class ErrorSources:
    """The answers to every question."""

    documents: int
    tokens: int
    perplexity: float  # of the plain model, per token
    kinds: tuple[Change, ...]
    layers: LayersAlone
    dropping: tuple[Change, ...]
    groups: Groups


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the questions are asked of."""

    model: Model
    config: VARConfig
    table: RouteTable  # of fixed shapes
    frequency: np.ndarray  # int64 [V], occurrences of each id in the text of the statistics
    documents: tuple[Encoded, ...]
    reading: dict[str, Any]  # arguments of `token_losses`
    samples: int  # bootstrap draws
    seed: int
    plain: TokenLosses
    policy: TokenLosses  # the fast tier alone


def prepare(
    model: Model,
    stats: RoutingStats,
    answers: Answers | None,
    config: VARConfig,
    documents: Sequence[Encoded],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    stride: int | None = None,
    samples: int = 1000,
    seed: int = 0,
    caching: Caching = INDEPENDENT,
) -> Subject:
    """Build the table and read the documents, plainly and under the policy.

    Args:
        stats, answers: from documents other than these.
        config: the policy in question.
        batch_size, max_length, stride: as in `analysis.evaluate.quality.score`.
        samples: bootstrap draws.
        caching: which documents share a cached tier, where the config has one.
        seed: of the draws.
    """
    table = build_for(model, config, stats, answers, keep_shapes=True)
    reading: dict[str, Any] = {
        "batch_size": batch_size,
        "max_length": max_length,
        "stride": stride,
        "caching": caching,
    }
    plain = token_losses(VARModel(model, dataclasses.replace(config, enable_var=False)), documents, **reading)
    without = VARModel(model, _fast_alone(config), table=table)
    return Subject(
        model=model,
        config=config,
        table=table,
        frequency=id_frequency(stats, model.config.vocab_size),
        documents=tuple(documents),
        reading=reading,
        samples=samples,
        seed=seed,
        plain=plain,
        policy=token_losses(without, documents, **reading),
    )


def examine(subject: Subject, progress: bool = True) -> ErrorSources:
    """Every question."""
    asked = {"kinds": kinds, "layers": layers_alone, "dropping": dropping, "groups": groups}
    bar = progress_bar(asked.items(), unit="question", desc="error sources", show=progress)
    found: dict[str, Any] = {name: ask(subject) for name, ask in bar}
    tokens = len(subject.plain.nll)
    return ErrorSources(len(subject.documents), tokens, math.exp(subject.plain.nll.mean()), **found)


def kinds(subject: Subject) -> tuple[Change, ...]:
    """Choice, weight and answer error: at the tokens that the policy plans, all K experts run, chosen or weighed by
    the table; and the policy itself, where the gate chooses and weighs, and answers stand in for experts.
    """
    all_run = jnp.full_like(subject.table.experts_kept, subject.table.top_k)
    neutral = LayerRules.neutral(subject.table.num_layers)
    changes = []
    for name, choice, weights in (
        ("the table chooses, the gate weighs", True, False),
        ("the gate chooses, the table weighs", False, True),
        ("the table chooses and weighs", True, True),
    ):
        rules = dataclasses.replace(
            neutral,
            choice_from_table=jnp.full_like(neutral.choice_from_table, choice),
            weights_from_table=jnp.full_like(neutral.weights_from_table, weights),
        )
        table = dataclasses.replace(subject.table, experts_kept=all_run, rules=rules)
        changes.append(_change(subject, name, _run(subject, table)))
    return (*changes, _change(subject, "the policy", subject.policy))


def layers_alone(subject: Subject) -> LayersAlone:
    """The policy in one layer at a time, and how nearly the layers' changes add up to the joint one."""
    eligible = np.asarray(subject.table.eligible)
    layers = tuple(np.flatnonzero(eligible.any(axis=1)).tolist())
    runs = [_run(subject, dataclasses.replace(subject.table, eligible=_only(eligible, layer))) for layer in layers]
    joint = differences(subject.plain, subject.policy)
    total = sum((differences(subject.plain, run) for run in runs), np.zeros_like(joint))
    return LayersAlone(
        layers=layers,
        alone=tuple(_change(subject, f"layer {layer} alone", run) for layer, run in zip(layers, runs, strict=True)),
        joint=_change(subject, "all together", subject.policy),
        total=_per_token(subject, total),
        excess=_per_token(subject, joint - total),
    )


def dropping(subject: Subject) -> tuple[Change, ...]:
    """What stands in for the experts that are dropped: their answers, nothing, or the others with more weight.

    First as the policy drops, by the same rules each time; which experts it drops may differ a little, since the layers
    above see something else. Then, as such rules often drop all experts of a token and nothing is left to rescale, the
    first expert alone at the tokens that the policy plans.
    """
    table, rules = subject.table, subject.table.rules
    silent = None
    if table.answers is not None:
        silent = tuple(dataclasses.replace(one, answers=jnp.zeros_like(one.answers)) for one in table.answers)
    quiet = dataclasses.replace(table, answers=silent)
    neutral = LayerRules.neutral(table.num_layers)
    first = dataclasses.replace(table, experts_kept=jnp.ones_like(table.experts_kept), rules=neutral)
    changes = [_change(subject, "the policy, with answers", subject.policy)]
    for name, base, rescale in (
        ("the policy, without", quiet, False),
        ("the policy, without, rescaled", quiet, True),
        ("the first expert, without", first, False),
        ("the first expert, without, rescaled", first, True),
    ):
        ruled = dataclasses.replace(base.rules, renormalize=jnp.full_like(rules.renormalize, rescale))
        changes.append(_change(subject, name, _run(subject, dataclasses.replace(base, rules=ruled))))
    return tuple(changes)


def groups(subject: Subject) -> Groups:
    """Where the loss falls: by the key that answered, by how many experts ran, by how frequent the token's id is.

    A token's loss also suffers from what was dropped at the tokens before it, so a part belongs to the position that
    made the prediction, and is not all of its own making.
    """
    run = subject.policy
    if subject.config.cache_size > 0:
        var_model = VARModel(subject.model, subject.config, table=subject.table)
        run = token_losses(var_model, subject.documents, **subject.reading)
    orders = [order for order in np.unique([*subject.table.ngram_orders, *run.order]) if order >= 0]
    names = {BY_ROUTER: "the router", BY_CACHE: "the cache"} | {int(order): f"order {order}" for order in orders}
    keys = np.array(sorted(names))
    most = subject.table.num_layers * subject.table.top_k
    edges = np.unique(np.linspace(0, most + 1, min(most + 1, _BINS) + 1).astype(int))
    deciles = _deciles(run.token_id, subject.frequency)
    return Groups(
        whole=_change(subject, "the policy as given", run),
        key=_grouped(subject, run, np.searchsorted(keys, run.order), [names[int(key)] for key in keys]),
        experts=_grouped(
            subject,
            run,
            np.searchsorted(edges, run.experts, side="right") - 1,
            [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(edges)],
        ),
        frequency=_grouped(subject, run, deciles, _decile_names(run.token_id, deciles, subject.frequency)),
    )


def id_frequency(stats: RoutingStats, vocab_size: int) -> np.ndarray:
    """int64 [V]: occurrences of each token id, from the keys of the shortest order; 0 where it is in none."""
    shortest = stats.row_orders == min(stats.ngram_orders)
    counted = np.zeros(vocab_size, np.int64)
    np.add.at(counted, stats.keys[shortest, -1], stats.count.max(axis=0)[shortest])
    return counted


def _run(subject: Subject, table: RouteTable) -> TokenLosses:
    var_model = VARModel(subject.model, _fast_alone(subject.config), table=table)
    return token_losses(var_model, subject.documents, **subject.reading)


def _fast_alone(config: VARConfig) -> VARConfig:
    return dataclasses.replace(config, enable_var=True, cache_size=0)


def _only(eligible: np.ndarray, layer: int) -> Any:
    """bool [L, R]: rows that only one layer may answer from."""
    return jnp.asarray(eligible & (np.arange(len(eligible)) == layer)[:, None])


def _change(subject: Subject, name: str, run: TokenLosses) -> Change:
    experts = run.experts.mean() / subject.table.num_layers
    return Change(name, _per_token(subject, differences(subject.plain, run)), float(experts))


def _per_token(subject: Subject, values: np.ndarray) -> Estimate:
    """The mean of values [M] over tokens."""
    return _means(subject, values[:, None], np.ones((len(values), 1)))[0]


def _grouped(subject: Subject, run: TokenLosses, group: np.ndarray, names: Sequence[str]) -> tuple[Group, ...]:
    """The groups that have tokens. `group` int [M] says which one each token is in."""
    inside = group[:, None] == np.arange(len(names))
    added = np.where(inside, differences(subject.plain, run)[:, None], 0.0)
    changes, parts = _means(subject, added, inside), _means(subject, added, np.ones_like(inside))
    rows = zip(names, inside.sum(axis=0).tolist(), changes, parts, strict=True)
    return tuple(Group(*row) for row in rows if row[1])


def _means(subject: Subject, values: np.ndarray, counts: np.ndarray) -> list[Estimate]:
    """Sums of values [M, G] over sums of counts [M, G], with 95 % intervals over documents."""
    total, count = (subject.plain.per_document(np.asarray(one, np.float64)) for one in (values, counts))
    value, (low, high) = ratio_with_interval(total, count, subject.samples, subject.seed)
    return [Estimate(*map(float, row)) for row in zip(value, low, high, strict=True)]


def _deciles(token_id: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """int64 [M], 0 the rarest: tenths of the ids that were read, by their frequency int64 [V]."""
    ids, place = np.unique(token_id, return_inverse=True)
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(frequency[ids], kind="stable")] = np.arange(len(ids))
    return (rank * DECILES // len(ids))[place]


def _decile_names(token_id: np.ndarray, deciles: np.ndarray, frequency: np.ndarray) -> list[str]:
    """How often the ids of each tenth were seen."""
    names = []
    for decile in range(DECILES):
        seen = frequency[token_id[deciles == decile]]
        names.append(f"{seen.min():,} to {seen.max():,}" if len(seen) else "none")
    return names
