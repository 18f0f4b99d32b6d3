"""Free generation under VAR: how soon its text leaves the plain model's, and whether it is worse or only different.

Letters: P prompts, S tokens of a prompt, T new tokens, B prompts at a time, V vocabulary.

Greedy on both sides. One wrong token and the two texts have different pasts, so agreement in free generation falls with
every position even where the error of a single step does not grow. Single-step agreement is measured beside it: the
model under VAR reads the plain model's own text and says what it would have written next. Without a cached tier a text
is still the same at a position exactly if every single step up to there agreed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from analysis.evaluate.caching import INDEPENDENT, Caching
from analysis.evaluate.quality import token_nll
from analysis.resampling import Estimate, bootstrap, ratio_with_interval
from analysis.text.encoding import Encoded
from models import Model
from varjax.errors import NotTestableError
from varjax.model import VARModel

NOTHING = -1  # after the end of a text


@dataclasses.dataclass(frozen=True)
class Curve:
    """A share of the prompts at each new position, with its 95 % interval over prompts, position by position."""

    value: np.ndarray  # float64 [T], NaN where no text goes on
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The model under VAR against the plain model's text, as far as that goes."""

    free: Curve  # the token at the position is the same, whatever came before
    together: Curve  # and so is every token before it
    single_step: Curve  # fed the plain model's text, the model under VAR would write the same token
    free_mean: Estimate  # over all positions
    single_step_mean: Estimate


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Mean log probability per new token that the plain model gives to texts, nats."""

    plain: Estimate  # its own
    var: Estimate  # that written under VAR
    document: Estimate  # how the documents really go on
    difference: Estimate  # var - plain, paired by prompt


@dataclasses.dataclass(frozen=True)
class Drift:
    """What became of the prompts."""

    prompts: int
    prompt_tokens: int
    new_tokens: int  # at most
    agreement: Agreement
    likelihood: Likelihood


def drift(
    var_model: VARModel,
    documents: Sequence[Encoded],
    *,
    prompts: int = 64,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    batch_size: int = 16,
    samples: int = 1000,
    seed: int = 0,
    caching: Caching = INDEPENDENT,
) -> Drift:
    """Continue the beginnings of `documents` with and without VAR.

    Args:
        documents: the first ones that are long enough are taken: they must go on for `new_tokens` after the prompt.
        prompts: at most so many.
        batch_size: prompts at a time.
        samples, seed: bootstrap draws of prompts.
        caching: whether the prompts share a cached tier, where there is one, and how fast it ages.

    Raises:
        NotTestableError: no document is long enough.
    """
    model = var_model.model
    assert isinstance(model, Model)
    var_model = VARModel(model, var_model.config, table=var_model.table, clock=caching.clock())
    whole = [document.ids for document in documents if len(document.ids) >= prompt_tokens + new_tokens][:prompts]
    if not whole:
        longest = max((len(document.ids) for document in documents), default=0)
        raise NotTestableError(
            f"no document has prompt_tokens + new_tokens = {prompt_tokens} + {new_tokens} tokens, the longest has "
            f"{longest}; give longer documents or smaller numbers"
        )
    ids = np.stack([one[: prompt_tokens + new_tokens] for one in whole])
    texts: list[list[np.ndarray]] = [[], [], [], []]
    scores: list[list[np.ndarray]] = [[], [], []]
    carry = caching.init(var_model, batch_size)
    for start in range(0, len(ids), batch_size):
        rows = np.resize(np.arange(start, min(start + batch_size, len(ids))), batch_size)  # the last batch is filled up
        own = min(batch_size, len(ids) - start)
        prompt, document = np.split(ids[rows], [prompt_tokens], axis=1)
        real = np.broadcast_to((np.arange(batch_size) < own)[:, None], prompt.shape)  # what fills up is padding
        ends = model.generation.end_ids
        plain = ended(model.generate(prompt, new_tokens, attention_mask=real)[0][:, prompt_tokens:], ends, new_tokens)
        written, carry = var_model.generate(prompt, carry, new_tokens, attention_mask=real)
        var = ended(written[:, prompt_tokens:], ends, new_tokens)
        for column, one in zip(texts, (plain, var, next_tokens(var_model, prompt, plain), document), strict=True):
            column.append(one[:own])
        for column, one in zip(scores, (plain, var, document), strict=True):
            column.append(log_probability(model, prompt, one)[:own])
    plain, var, taught, document = (np.concatenate(column) for column in texts)
    likelihood = [np.concatenate(column) for column in scores]
    return Drift(
        prompts=len(ids),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        agreement=agreement(plain, var, taught, samples, seed),
        likelihood=_likelihood(likelihood, [plain, var, document], samples, seed),
    )


def agreement(plain: np.ndarray, var: np.ndarray, taught: np.ndarray, samples: int = 1000, seed: int = 0) -> Agreement:
    """How far texts agree, at the positions that the plain model's text reaches.

    Args:
        plain, var: int32 [P, T], the texts, NOTHING after their ends.
        taught: int32 [P, T], what the model under VAR would write after the plain model's text.
        samples, seed: bootstrap draws of prompts.
    """
    there = plain != NOTHING
    free, single = (plain == var) & there, (plain == taught) & there
    together = np.logical_and.accumulate(free | ~there, axis=1) & there
    return Agreement(
        free=_curve(free, there, samples, seed),
        together=_curve(together, there, samples, seed),
        single_step=_curve(single, there, samples, seed),
        free_mean=_mean(free.sum(axis=1), there.sum(axis=1), samples, seed),
        single_step_mean=_mean(single.sum(axis=1), there.sum(axis=1), samples, seed),
    )


def ended(text: np.ndarray, ends: Sequence[int], length: int) -> np.ndarray:
    """int32 [B, length]: text [B, <= length] up to each row's first end id, that included; then NOTHING."""
    full = np.full((len(text), length), NOTHING, np.int32)
    stop = np.isin(text, ends)
    full[:, : text.shape[1]] = np.where(np.cumsum(stop, axis=1) - stop > 0, NOTHING, text)
    return full


def next_tokens(var_model: VARModel, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """int32 [B, T]: the most probable token under VAR at each position of text [B, T], given what stands before it.

    From a fresh state, all positions in one call.
    """
    ids, mask = _joined(prompt, text)
    out, _ = var_model.advance(var_model.init(len(ids)), jnp.asarray(ids), jnp.asarray(mask))
    return np.asarray(jnp.argmax(out.logits[:, prompt.shape[1] - 1 : -1], axis=-1), np.int32)


def log_probability(model: Model, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """float64 [B]: the plain model's log probability of text [B, T] after its prompt, nats; NOTHING is left out."""
    ids, mask = _joined(prompt, text)
    logits = model(ids, mask).logits[:, prompt.shape[1] - 1 : -1]
    there = text != NOTHING
    losses = token_nll(logits, jnp.asarray(np.where(there, text, 0)), jnp.asarray(there))
    return -np.asarray(losses, np.float64).sum(axis=1)


def _joined(prompt: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and bool mask [B, S + T]."""
    ids = np.concatenate([prompt, text], axis=1)
    return np.where(ids == NOTHING, 0, ids), ids != NOTHING


def _likelihood(totals: Sequence[np.ndarray], texts: Sequence[np.ndarray], samples: int, seed: int) -> Likelihood:
    """Of the plain model's text, that under VAR and the document's: totals [P] and texts [P, T] of each."""
    counts = [(text != NOTHING).sum(axis=1).astype(np.float64) for text in texts]
    own, written, document = (_mean(*both, samples, seed) for both in zip(totals, counts, strict=True))
    plain, var = (np.stack([total, count], axis=1) for total, count in zip(totals[:2], counts[:2], strict=True))
    low, high = bootstrap(_mean_difference, plain, var, samples=samples, seed=seed)
    value = _mean_difference(plain.sum(axis=0), var.sum(axis=0))
    return Likelihood(own, written, document, Estimate(float(value), float(low), float(high)))


def _mean_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[...]: mean of b less mean of a, from total and count in [..., 2]."""
    return b[..., 0] / b[..., 1] - a[..., 0] / a[..., 1]


def _mean(totals: np.ndarray, counts: np.ndarray, samples: int, seed: int) -> Estimate:
    """The sum of totals [P] over that of counts [P]."""
    curve = _curve(totals[:, None], counts[:, None], samples, seed)
    return Estimate(float(curve.value[0]), float(curve.low[0]), float(curve.high[0]))


def _curve(numerator: np.ndarray, denominator: np.ndarray, samples: int, seed: int) -> Curve:
    """Sums over prompts, numerator over denominator [P, T]."""
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    value, (low, high) = ratio_with_interval(top, bottom, samples, seed)
    return Curve(value, low, high)
