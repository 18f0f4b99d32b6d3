"""Small random statistics and answers that several test files build tables from."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from varjax.answers import Answers, pruned
from varjax.keys import ANY
from varjax.stats import RoutingStats

VOCABULARY = 4


@pytest.fixture(scope="session")
def random_stats() -> Callable[..., RoutingStats]:
    """(rng, num_layers, num_experts) -> statistics of 15 of the 20 keys of orders 1 and 2, with gaps."""

    def make(rng: np.random.Generator, num_layers: int, num_experts: int) -> RoutingStats:
        unigrams = [(ANY, i) for i in range(VOCABULARY)]
        keys = np.array(unigrams + list(product(range(VOCABULARY), repeat=2)), np.int32)
        keys = keys[rng.permutation(len(keys))[:15]]
        stats = RoutingStats.empty(keys, (1, 2), num_layers, num_experts)
        count = rng.integers(0, 20, size=(num_layers, len(keys)))
        entropy = np.where(count > 0, rng.random(count.shape), np.nan)
        probs = rng.dirichlet(np.full(num_experts, 0.3), size=count.shape)
        return replace(
            stats,
            count=count,
            entropy=replace(stats.entropy, mean=entropy),
            sum_probs=probs * count[..., None],
        )

    return make


@pytest.fixture(scope="session")
def random_answers() -> Callable[..., Answers]:
    """(rng, stats, layers, hidden_size) -> answers at 10 of the keys of `stats` and at order 0, in another order."""

    def make(rng: np.random.Generator, stats: RoutingStats, layers: tuple[int, ...], hidden_size: int) -> Answers:
        keys = stats.keys[rng.permutation(len(stats.keys))[:10]]
        answers = Answers.empty(keys, layers, stats.num_experts, hidden_size)
        count = np.maximum(rng.integers(-3, 4, size=answers.count.shape), 0)  # half of the pairs never occurred
        mass, m2 = (count * rng.random(count.shape) for _ in range(2))
        mean = rng.normal(size=answers.mean.shape) * (count > 0)[..., None]
        return pruned(replace(answers, mean=mean, mass=mass, m2=m2, count=count))

    return make
