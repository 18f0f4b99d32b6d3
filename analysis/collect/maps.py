"""The third pass of phase 1: maps that make the answers affine (`varjax.fitting`).

The maps are fitted to deviations from the means of the second pass on the same documents, each token left out of its
own mean, and other documents choose the ridge. They have far fewer parameters than the means, so a part of the
documents is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Unpack

import numpy as np

from analysis.collect.passes import PassSums, Reading, run_pass
from analysis.text.encoding import Encoded
from models import Model, MoEConfig
from varjax import fitting
from varjax.answers import Answers
from varjax.errors import InputError
from varjax.fitting import Moments


def collect_moments(
    model: Model,
    answers: Answers,
    documents: Iterable[Encoded],
    held_out: Iterable[Encoded],
    shrinkage: float,
    basis: np.ndarray | None = None,
    **reading: Unpack[Reading],
) -> tuple[tuple[Moments, ...], tuple[Moments, ...]]:
    """Sum up what the fit of maps needs (`varjax.fitting.fit`).

    Args:
        model: the model.
        answers: of this model, with the experts' mean inputs.
        documents: those that the means were taken over, or some of them.
        held_out: others, which the means have not seen; results must not be reported on them.
        shrinkage: of the answers, as in `varjax.shrinkage.shrunk`.
        basis: float32 [A, D, Q], the directions of the inputs that are looked at; None: all.
        reading: see `analysis.collect.passes.Reading`; checkpoints are those of `documents`.

    Returns:
        The moments of each layer over `documents` and over `held_out`.

    Raises:
        InputError: the answers hold no mean inputs.
    """
    num_experts, hidden_size = answers.entry.shape[2], answers.mean.shape[2]
    seen = None if basis is None else basis.shape[-1]
    empty = (Moments.empty(num_experts, hidden_size, seen),) * len(answers.layers)

    def summed(name: str, text: Iterable[Encoded], own_text: bool, how: Reading) -> tuple[Moments, ...]:
        known = fitting.targets(answers, shrinkage, own_text=own_text, basis=basis)
        of = answers.ngram_orders, answers.layers, True
        sums = PassSums(name, fitting.init, fitting.update, fitting.merge, *of, again=fitting.emptied)
        return run_pass(model, text, answers.keys, empty, sums, (known,), **how)[0]

    own = summed("maps", documents, True, reading)
    return own, summed("maps, held out", held_out, False, {**reading, "checkpoints": None})


def with_maps(
    model: Model,
    answers: Answers,
    documents: Iterable[Encoded],
    held_out: Iterable[Encoded],
    rank: int,
    shrinkage: float,
    memory: int = 1 << 32,
    **reading: Unpack[Reading],
) -> Answers:
    """Fit a map to every layer of some answers.

    Args:
        model, answers, documents, held_out, shrinkage, reading: see `collect_moments`.
        rank: r of the maps.
        memory: bytes for the sums on each device, which also holds the means. Where all directions of the inputs do
            not fit, only those are looked at in which the mean inputs differ most.

    Returns:
        The answers with their maps.

    Raises:
        InputError: the answers hold no mean inputs, or `rank` is out of range or too large for the memory.
    """
    seen = directions_for(rank, memory, model.config, len(answers.layers))
    basis = fitting.leading_directions(answers, seen)
    moments = collect_moments(model, answers, documents, held_out, shrinkage, basis, **reading)
    return replace(answers, maps=fitting.fit(*moments, rank, basis))


def directions_for(rank: int, memory: int, config: MoEConfig, num_layers: int) -> int:
    """How many directions of the inputs are looked at when maps are fitted.

    Args:
        rank: r of the maps.
        memory: bytes for the sums on each device.
        config: of the model.
        num_layers: A, which are fitted.

    Returns:
        Q, at least `rank`.

    Raises:
        InputError: maps of this rank are impossible, or their sums do not fit.
    """
    if rank > config.hidden_size:
        raise InputError(f"rank={rank} of the maps: expected at most the hidden size, {config.hidden_size}")
    seen = fitting.directions_within(memory, num_layers, config.num_experts, config.hidden_size)
    if rank > seen:
        raise InputError(
            f"rank={rank} of the maps: the memory of {memory / (1 << 30):.2f} GiB holds the sums of rank {seen} at "
            "most; allow more, or fewer layers"
        )
    return seen


def first_tokens(documents: Iterable[Encoded], tokens: int) -> Iterator[Encoded]:
    """The first documents of a text, until they have a number of tokens.

    Args:
        documents: the text.
        tokens: enough of them.

    Yields:
        The documents.
    """
    for document in documents:
        yield document
        tokens -= len(document.ids)
        if tokens <= 0:
            return
