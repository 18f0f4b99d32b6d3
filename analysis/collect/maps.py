"""The third pass of phase 1: maps that make the answers affine (`varjax.fitting`).

The maps are fitted to deviations from the means of the second pass on the same documents, each token left out of its
own mean, and other documents choose the ridge. They have far fewer parameters than the means, so a part of the
documents is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Unpack

from analysis.collect.passes import PassSums, Reading, run_pass
from analysis.text.encoding import Encoded
from models import Model
from varjax import fitting
from varjax.answers import Answers
from varjax.fitting import Moments


def with_maps(
    model: Model,
    answers: Answers,
    documents: Iterable[Encoded],
    held_out: Iterable[Encoded],
    rank: int,
    shrinkage: float,
    **reading: Unpack[Reading],
) -> Answers:
    """Fit a map to every layer of some answers.

    Args:
        model: the model.
        answers: of this model, with the experts' mean inputs.
        documents: those that the means were taken over, or some of them.
        held_out: others, which the means have not seen; results must not be reported on them.
        rank: r of the maps.
        shrinkage: of the answers, as in `varjax.shrinkage.shrunk`.
        reading: see `analysis.collect.passes.Reading`; checkpoints are those of `documents`.

    Returns:
        The answers with their maps.

    Raises:
        InputError: the answers hold no mean inputs, or `rank` is out of range.
    """
    num_experts, hidden_size = answers.entry.shape[2], answers.mean.shape[2]
    empty = (Moments.empty(num_experts, hidden_size),) * len(answers.layers)
    found = []
    for own_text, text in ((True, documents), (False, held_out)):
        name = "maps" if own_text else "maps, held out"
        sums = PassSums(name, fitting.init, fitting.update, fitting.merge, answers.ngram_orders, answers.layers, True)
        known = fitting.targets(answers, shrinkage, own_text=own_text)
        how: Reading = reading if own_text else {**reading, "checkpoints": None}
        found.append(run_pass(model, text, answers.keys, empty, sums, (known,), **how)[0])
    return replace(answers, maps=fitting.fit(found[0], found[1], rank))


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
