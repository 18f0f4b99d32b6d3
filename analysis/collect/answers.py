"""The second pass of phase 1: the mean output of every expert at each key (`varjax.answers`).

Letters: A layers, R keys, E experts, D hidden size.

The layers run in full, so the means are those of the plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Unpack

import numpy as np

from analysis.collect.passes import PassSums, Reading, run_pass
from analysis.text.encoding import Encoded
from models import Model
from varjax import answers
from varjax.answers import Answers


def collect_answers(
    model: Model,
    documents: Iterable[Encoded],
    keys: np.ndarray,
    layers: Sequence[int],
    *,
    pairs: np.ndarray | None = None,
    inputs: bool = False,
    **reading: Unpack[Reading],
) -> Answers:
    """Average the outputs of each expert at each key, and at all tokens.

    Args:
        model: the model.
        documents: in the same order whenever they are read.
        keys: int32 [R, C], of order 1 and more.
        layers: the layers to collect, ascending.
        pairs: bool [A, R, E], which experts are collected at which keys; None: all. With N pairs in a layer, those of
            order 0 included, memory is `A * (N * D + R * E)` float32 on each device. The host holds twice as much in
            all, and as much again for each device whose window it absorbs.
        inputs: whether the experts' mean inputs are averaged too, which takes about as much memory again.
        reading: see `analysis.collect.passes.Reading`.

    Returns:
        The answers, without pairs that never occurred.
    """
    empty = Answers.empty(keys, layers, model.config.num_experts, model.config.hidden_size, pairs, inputs)
    absorb = partial(answers.absorb, donate=True)
    of = empty.ngram_orders, empty.layers, True
    sums = PassSums("answers", answers.init, answers.update, absorb, *of, again=answers.emptied)
    found, _ = run_pass(model, documents, empty.keys, empty, sums, **reading)
    return answers.pruned(found)
