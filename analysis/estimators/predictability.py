"""How well the last token ids foretell the routing of documents that were not looked at.

Letters: N tokens, H scored tokens, D documents, O context orders, L layers, E experts, K experts per token, R keys.

Per layer and context order a table is built on the trace's build documents (`Trace.build_documents`): for every key
(the last n ids) its commonest first choice, and the K experts that it chose most often (that got most of the
probability, where probabilities are known). The other documents score the table, at the keys that occur `min_count`
times or more in the build part; what share of their tokens that is, is the coverage. A figure says little without it.

| measure | what, at the known keys of the held-out documents |
|---|---|
| `coverage` | share of all held-out tokens that have a known key; the same in every layer, no null |
| `agreement` | share of tokens whose first choice is the predicted one; only where the experts are ranked |
| `agreement_of_shortest` | the same by the shortest order's table, at the keys of the longer order |
| `recall` | share of the chosen experts that are among the K predicted |
| `mass` | share of the chosen experts' probability that the K predicted catch; only where probabilities are known |

Orders look at different tokens: a long context that is frequent is an easy one. `agreement` rises with the order even
where the added ids say nothing; what they add is its distance from `agreement_of_shortest`, at the same tokens (of
unranked experts `recall_of_shortest`). `longest` takes each token by its longest known key. It covers the same tokens
as the shortest order, because who knows the last three ids knows the last one.

Probabilities count as shares of the chosen experts' sum, whether the trace's are over all experts or over the chosen.
Tables score their own documents too well (a bigram seen once is never wrong there), so nothing is scored on the build
part. The null shuffles routing among each document's tokens, builds the tables anew and scores them anew: what is above
the band is not due to the load of the experts or to what the documents are about. It is due to the token ids, but for
one thing: the null also breaks the likeness of neighbors. Where routing persists from token to token and ids come in
bursts, a table can pass the band a little though no id decides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class Predictability:
    """Held-out figures of one trace, per context order and layer, and what they rest on."""

    orders: tuple[int, ...]
    measures: dict[str, Measure]  # name -> one row per order
    longest: dict[str, Measure]  # name -> one row: each token by its longest known key
    min_count: int
    permutations: int
    build_documents: int
    held_out_documents: int
    build_tokens: int
    held_out_tokens: int


def predictability(
    trace: Trace,
    orders: Sequence[int] = (1, 2, 3),
    *,
    min_count: int = 10,
    permutations: int = 39,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Predictability:
    """Coverage, agreement, recall and mass on held-out documents, each but coverage against the permutation null.

    Without a ranking of the experts there is no agreement.

    A band and its p values hold for all figures of one measure together, the row of the longest keys included. The
    intervals draw held-out documents and keep the tables as they are.

    Args:
        orders: context orders; order n looks at the last n ids.
        min_count: occurrences that a key needs in the build documents.
        permutations: 0 for no null, or at least 19; p is at least 1 / (permutations + 1).
        samples: draws of the bootstrap over documents.

    Raises:
        NotTestableError: all documents are on one side of the split, or no key has enough evidence.
        InputError: too few permutations.
    """
    check_permutations(permutations)
    orders = tuple(sorted(set(orders)))
    build = trace.build_documents()[trace.document]
    if build.all() or not build.any():
        raise NotTestableError(
            f"the trace's {len(np.unique(trace.document))} documents are all on one side of the split into build and "
            "held-out documents; give a trace of more documents"
        )
    keys = [known_keys(trace.contexts(order), build, min_count) for order in orders]
    if all(np.all(key < 0) for key in keys):
        raise NotTestableError(
            f"no context of {', '.join(map(str, orders))} ids occurs {min_count} times in the build documents; "
            "give a longer trace or a lower min_count"
        )
    scored = _Scored(trace, build)
    known, sums = scored.known(keys), scored.sums(keys)
    rng = np.random.default_rng(seed)
    null: dict[str, list[np.ndarray]] = {name: [] for name in sums}
    for _ in progress_bar(range(permutations), unit="permutation", desc="predictability", show=progress):
        # Moving the keys is the same as moving the routing, and cheaper.
        shuffled = permutation(trace.document, rng)
        for name, one in scored.sums([key[shuffled] for key in keys]).items():
            null[name].append(one.sum(axis=0))

    tokens = np.broadcast_to(scored.tokens[:, None, None], known.shape)
    coverage = measure("coverage", "share", *ratio_with_interval(known, tokens, samples, seed))
    measures = {"coverage": coverage}
    for name, one in sums.items():
        permuted = ratio(np.reshape(null[name], (-1, *one.shape[1:])), known.sum(axis=0))
        measures[name] = measure(name, "share", *ratio_with_interval(one, known, samples, seed), permuted)
    return Predictability(
        orders=orders,
        measures={name: _rows(one, slice(None, -1)) for name, one in measures.items()},
        longest={name: _rows(one, slice(-1, None)) for name, one in measures.items()},
        min_count=min_count,
        permutations=permutations,
        build_documents=len(np.unique(trace.document[build])),
        held_out_documents=len(scored.tokens),
        build_tokens=int(build.sum()),
        held_out_tokens=int(np.sum(~build)),
    )


def known_keys(contexts: np.ndarray, counted: np.ndarray, min_count: int) -> np.ndarray:
    """int64 [N]: the keys with enough evidence numbered from 0 on, -1 at any other.

    Args:
        contexts: int64 [N], as `Trace.contexts` gives them.
        counted: bool [N], the tokens whose occurrences are evidence.
        min_count: occurrences that a key needs among them.
    """
    often = np.bincount(contexts[counted & (contexts >= 0)], minlength=int(contexts.max(initial=0)) + 1) >= min_count
    number = np.where(often, np.cumsum(often) - 1, -1)
    return np.where(contexts >= 0, number[contexts], -1)


class _Scored:
    """A trace laid out for scoring: the held-out tokens, and routing with the tokens last.

    Sums over documents are [D, O + 1, L]; the last row takes each token by its longest known key.
    """

    def __init__(self, trace: Trace, build: np.ndarray):
        self.build, self.held_out = np.flatnonzero(build), np.flatnonzero(~build)
        self.document = trace.document[self.held_out]
        self.tokens = document_sums(np.ones(len(self.held_out)), self.document)  # [D]
        self.experts = np.ascontiguousarray(trace.experts.transpose(1, 2, 0))  # [L, K, N]
        self.num_experts = trace.num_experts
        self.ranked = trace.ranked or trace.top_k == 1
        self.shares = None if trace.probs is None else np.ascontiguousarray(_shares(trace.probs).transpose(1, 2, 0))

    def known(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [D, O + 1, L]: tokens with a known key."""
        known = np.stack([key[self.held_out] >= 0 for key in keys], axis=-1)
        known = np.concatenate([known, known.any(axis=-1, keepdims=True)], axis=-1)
        return np.repeat(document_sums(known, self.document)[..., None], len(self.experts), axis=-1)

    def sums(self, keys: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """name -> float64 [D, O + 1, L]: the scores of tables from the build part, summed over each document."""
        names = ["agreement"] * self.ranked + ["recall"] + ["mass"] * (self.shares is not None)
        judged = names[0]
        of_shortest = f"{judged}_of_shortest"
        sums = {name: np.empty((len(self.tokens), len(keys) + 1, len(self.experts))) for name in [*names, of_shortest]}
        split = []  # per order: tokens of the build part, their keys, places in the held-out part, their keys
        for key in keys:
            rows = self.build[key[self.build] >= 0]
            places = np.flatnonzero(key[self.held_out] >= 0)
            split.append((rows, key[rows], places, key[self.held_out[places]]))
        for layer in range(len(self.experts)):
            longest = {name: np.zeros(len(self.held_out)) for name in names}
            for row, (rows, build_keys, places, held_keys) in enumerate(split):
                predicted = self._table(layer, rows, build_keys)
                scores = self._scores(layer, self.held_out[places], held_keys, *predicted)
                for name in names:
                    alone = np.zeros(len(self.held_out))
                    alone[places] = longest[name][places] = scores[name]
                    sums[name][:, row, layer] = document_sums(alone, self.document)
                if row == 0:
                    shortest = longest[judged].copy()
                there = np.zeros(len(self.held_out))
                there[places] = shortest[places]  # a token with a known key has a known shorter one
                sums[of_shortest][:, row, layer] = document_sums(there, self.document)
            for name in names:
                sums[name][:, -1, layer] = document_sums(longest[name], self.document)
            sums[of_shortest][:, -1, layer] = sums[judged][:, 0, layer]
        return sums

    def _table(self, layer: int, rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per key the first choice [R], and which experts are predicted, bool [R, E]; the lowest id among equals."""
        size, top_k = int(keys.max(initial=-1)) + 1, self.experts.shape[1]
        cells = keys * self.num_experts + self.experts[layer][:, rows]  # [K, n]
        weights = None if self.shares is None else self.shares[layer][:, rows].ravel()
        chosen = np.bincount(cells.ravel(), weights, size * self.num_experts).reshape(size, self.num_experts)
        members = np.zeros((size, self.num_experts), bool)
        np.put_along_axis(members, np.argsort(-chosen, axis=-1, kind="stable")[:, :top_k], True, axis=-1)
        first = np.bincount(cells[0], minlength=size * self.num_experts).reshape(members.shape)
        return first.argmax(axis=-1), members

    def _scores(
        self, layer: int, rows: np.ndarray, keys: np.ndarray, first: np.ndarray, members: np.ndarray
    ) -> dict[str, np.ndarray]:
        """name -> [h]: each held-out token's score by the table."""
        experts = self.experts[layer][:, rows]  # [K, h]
        caught = members[keys, experts]
        scores = {"agreement": first[keys] == experts[0], "recall": caught.mean(axis=0)}
        if self.shares is not None:
            scores["mass"] = np.sum(caught * self.shares[layer][:, rows], axis=0)
        return scores


def _shares(probs: np.ndarray) -> np.ndarray:
    """float32 [N, L, K]: probabilities as shares of the chosen experts' sum; equal shares where that is 0."""
    total = probs.sum(axis=-1, keepdims=True, dtype=np.float32)
    return np.where(total > 0, probs / np.where(total > 0, total, 1), np.float32(1 / probs.shape[-1]))


def _rows(one: Measure, rows: slice) -> Measure:
    """Some rows of a measure; its band stays that of the whole family."""
    null, null_low, null_high, p = (
        None if array is None else array[rows] for array in (one.null, one.null_low, one.null_high, one.p)
    )
    return Measure(one.name, one.unit, one.value[rows], one.low[rows], one.high[rows], null, null_low, null_high, p)
