"""How much of the first choice the last token ids leave open: H(first choice | last n ids), in nats.

Letters: N tokens, D documents, O context orders, L layers, E experts, R keys, c(k, e) first choices of e at key k,
n(k) occurrences of k.

| measure | tokens | what |
|---|---|---|
| `coverage` | all | share of the tokens whose key occurs `min_count` times or more in the trace; no null |
| `plug_in` | at such keys | mean of -ln(c / n): too low, the more so the rarer the keys |
| `conditional_entropy` | at such keys | the same with Grassberger's correction |
| `explained` | at such keys | in sample: 1 - `conditional_entropy` / its mean under the null; needs permutations |
| `held_out_coverage` | held-out | share of them whose key occurs `min_count` times in the build documents; no null |
| `cross_entropy` | held-out, at such keys | loss of a table of the build documents |
| `explained_held_out` | held-out, at such keys | 1 - `cross_entropy` / its mean under the null; needs permutations |

Grassberger's estimate (2003, arXiv physics/0307138) replaces ln c by G(c) = psi(c) + (-1)^c / 2 (psi((c + 1) / 2) -
psi(c / 2)). It was chosen over Miller and Madow's and over Zhang's psi(n) - psi(c) because it loses least where n is
below E: of ln 32 = 3.47 nats, seen through 10 draws, plug-in finds 2.1, Miller-Madow 2.5, Zhang 2.6, Grassberger 3.1;
over Chao and Shen's because it is a sum over tokens, so that documents can be resampled. Where a key always has the
same choice it errs by about 1 / (2 n) toward more entropy: it does not flatter. What bias is left is met by the null,
which has the same keys with the same counts. With E far above `min_count` the estimate reaches nowhere near ln E (of
ln 128 = 4.85 nats 10 draws show 3.4), the null as little as the data: that compresses `explained` toward 0.

`explained` is in sample: a phrase that a document repeats word for word, routed alike each time, counts as explained
although it says nothing of other documents. `explained_held_out` is the figure to go by; it is negative where the table
misleads. It too can flatter, where held-out documents are near-duplicates of build documents. The loss of a table is
on average no lower than the entropy at the same tokens, but the two are taken over other tokens here: neither bounds
the other as printed.

Orders look at different tokens, the longer at fewer and more frequent phrases, and no `explained` removes that
selection: a longer order can explain more because its tokens are easier. At equal tokens they are compared by
`agreement_of_shortest` of `analysis.estimators.predictability`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

from analysis.estimators.predictability import known_keys
from analysis.resampling import (
    Measure,
    check_permutations,
    document_sums,
    measure,
    permutation,
    ratio,
    ratio_with_interval,
)
from analysis.traces.trace import Trace
from varjax.errors import NotTestableError
from varjax.progress import progress_bar

PRIOR = 2.0  # occurrences that the layer's marginal counts for in the table of the cross entropy; 1 to 8 do as well


@dataclass(frozen=True)
class ChoiceEntropy:
    """Entropies of one trace, per context order and layer, and what they rest on."""

    orders: tuple[int, ...]
    measures: dict[str, Measure]  # name -> one row per order
    unconditional: Measure  # one row: H(first choice), whatever the ids
    min_count: int
    permutations: int
    tokens: int
    documents: int


def conditional_entropy(
    trace: Trace,
    orders: Sequence[int] = (1, 2, 3),
    *,
    min_count: int = 10,
    permutations: int = 39,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> ChoiceEntropy:
    """H(first choice | last n ids) per order and layer, against the permutation null, and H(first choice).

    Intervals draw documents and keep each token's contribution as it is (to first order an entropy is a mean over
    tokens); those of what is explained take the null as known. The cross entropy and what comes with it are NaN where
    all documents are on one side of the split into build and held-out documents.

    Args:
        orders: context orders; order n looks at the last n ids.
        min_count: occurrences that a key needs.
        permutations: 0 for no null, or at least 19; p is at least 1 / (permutations + 1).
        samples: draws of the bootstrap over documents.

    Raises:
        NotTestableError: no ranking tells the first choice, or no key occurs often enough.
        InputError: too few permutations.
    """
    check_permutations(permutations)
    check_ranked(trace)
    orders = tuple(sorted(set(orders)))
    choices = _Choices(trace)
    everywhere = np.ones(len(trace.token_id), bool)
    contexts = [trace.contexts(order) for order in orders]
    keys = [known_keys(context, everywhere, min_count) for context in contexts]
    if all(np.all(key < 0) for key in keys):
        raise NotTestableError(
            f"no context of {', '.join(map(str, orders))} ids occurs {min_count} times; "
            "give a longer trace or a lower min_count"
        )
    build = trace.build_documents()[trace.document]
    build_keys = [known_keys(context, build, min_count) for context in contexts]

    def sums(shuffled: np.ndarray | slice) -> dict[str, np.ndarray]:
        inside = choices.entropies([key[shuffled] for key in keys])
        return inside | {"cross_entropy": choices.cross_entropies([key[shuffled] for key in build_keys], build)}

    rng = np.random.default_rng(seed)
    observed = sums(slice(None))
    null: dict[str, list[np.ndarray]] = {name: [] for name in observed}
    for _ in progress_bar(range(permutations), unit="permutation", desc="choice entropy", show=progress):
        for name, one in sums(permutation(trace.document, rng)).items():
            null[name].append(one.sum(axis=0))

    every, held_out = choices.count(keys, everywhere), choices.count(build_keys, ~build)
    known = {"plug_in": every, "conditional_entropy": every, "cross_entropy": held_out}
    measures = {}
    for name, covered, counted in (
        ("coverage", every, everywhere),
        ("held_out_coverage", held_out, ~build),
    ):
        size = np.broadcast_to(document_sums(counted, trace.document)[:, None, None], covered.shape)
        measures[name] = measure(name, "share", *ratio_with_interval(covered, size, samples, seed))
    for name, one in observed.items():
        permuted = ratio(np.reshape(null[name], (-1, *one.shape[1:])), known[name].sum(axis=0))
        value = ratio_with_interval(one, known[name], samples, seed)
        measures[name] = measure(name, "nats", *value, permuted, limits=(0, math.inf))
    if permutations:
        measures["explained"] = _explained("explained", measures["conditional_entropy"])
        measures["explained_held_out"] = _explained("explained_held_out", measures["cross_entropy"])
    empty = [np.zeros(len(trace.token_id), np.int64)]
    alone = ratio_with_interval(
        choices.entropies(empty)["conditional_entropy"], choices.count(empty, everywhere), samples, seed
    )
    return ChoiceEntropy(
        orders=orders,
        measures=measures,
        unconditional=measure("entropy", "nats", *alone),
        min_count=min_count,
        permutations=permutations,
        tokens=len(trace.token_id),
        documents=choices.documents,
    )


def check_ranked(trace: Trace) -> None:
    """Raises NotTestableError where a trace does not say which of its experts is the first choice."""
    if not (trace.ranked or trace.top_k == 1):
        raise NotTestableError(
            "the trace's experts are not ranked, so nobody knows the first choice; record the trace with probabilities "
            "or with the experts best first (ranked)"
        )


class _Choices:
    """First choices of a trace, laid out for counting. All sums are float64 [D, O, L]."""

    def __init__(self, trace: Trace):
        self.first = np.ascontiguousarray(trace.experts[:, :, 0].T).astype(np.int64)  # [L, N]
        self.document = trace.document
        self.num_experts = trace.num_experts
        self.documents = len(np.unique(trace.document))
        self.correction = grassberger(len(trace.token_id))

    def count(self, keys: Sequence[np.ndarray], counted: np.ndarray) -> np.ndarray:
        """Tokens among `counted` that have a key."""
        known = np.stack([(key >= 0) & counted for key in keys], axis=-1)
        return np.repeat(document_sums(known, self.document)[..., None], len(self.first), axis=-1)

    def entropies(self, keys: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Sums of each token's contribution to the plug-in and to the corrected entropy."""
        sums = {name: self._empty(keys) for name in ("plug_in", "conditional_entropy")}
        for order, key in enumerate(keys):
            rows = np.flatnonzero(key >= 0)
            occurrences = np.log(np.bincount(key[rows]))[key[rows]]
            for layer, first in enumerate(self.first):
                cells = key[rows] * self.num_experts + first[rows]
                chosen = np.bincount(cells)[cells]
                self._put(sums["plug_in"], order, layer, rows, occurrences - np.log(chosen))
                self._put(sums["conditional_entropy"], order, layer, rows, occurrences - self.correction[chosen])
        return sums

    def cross_entropies(self, keys: Sequence[np.ndarray], build: np.ndarray) -> np.ndarray:
        """Sums of -ln p(first choice) over the tokens outside `build`, p from a table of those inside.

        p = (c + PRIOR * m) / (n + PRIOR), m the layer's share of the expert in the build part (half a count added).
        """
        sums = self._empty(keys)
        for order, key in enumerate(keys):
            inside, outside = np.flatnonzero(build & (key >= 0)), np.flatnonzero(~build & (key >= 0))
            size = int(key.max(initial=-1)) + 1
            occurrences = np.bincount(key[inside], minlength=size)[key[outside]]
            for layer, first in enumerate(self.first):
                load = np.bincount(first[build], minlength=self.num_experts) + 0.5
                counts = np.bincount(key[inside] * self.num_experts + first[inside], minlength=size * self.num_experts)
                chosen = counts[key[outside] * self.num_experts + first[outside]]
                marginal = (load / load.sum())[first[outside]]
                loss = -np.log((chosen + PRIOR * marginal) / (occurrences + PRIOR))
                self._put(sums, order, layer, outside, loss)
        return sums

    def _empty(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((self.documents, len(keys), len(self.first)))

    def _put(self, sums: np.ndarray, order: int, layer: int, rows: np.ndarray, values: np.ndarray) -> None:
        every = np.zeros(len(self.document))
        every[rows] = values
        sums[:, order, layer] = document_sums(every, self.document)


def grassberger(largest: int) -> np.ndarray:
    """float64 [largest + 1]: G(c), Grassberger's stand-in for ln c; 0 at c = 0, which no token has."""
    c = np.arange(1, largest + 1)
    sign = np.where(c % 2 == 0, 1, -1)
    return np.r_[0.0, digamma(c) + sign / 2 * (digamma((c + 1) / 2) - digamma(c / 2))]


def _explained(name: str, entropy: Measure) -> Measure:
    """1 - H / mean H under the null: 0 where the ids say nothing, 1 where they say all; NaN where all is constant."""
    assert entropy.null is not None

    def share(nats: np.ndarray | None) -> np.ndarray:
        return 1 - ratio(np.asarray(nats), np.asarray(entropy.null))

    return Measure(
        name=name,
        unit="share",
        value=share(entropy.value),
        low=share(entropy.high),
        high=share(entropy.low),
        null=share(entropy.null),
        null_low=share(entropy.null_high),
        null_high=share(entropy.null_low),
        p=entropy.p,
    )
