"""Does the text stay the same when the model writes it under VAR, and if not, is it worse or only different?

Letters: P prompts, S tokens of a prompt, T new tokens, B prompts at a time, V vocabulary.

Both sides decode greedily. After one different token the two texts have different pasts, so agreement in free
generation falls with every position even where the error of a single step does not grow. Single-step agreement is
measured as well: the model under VAR reads the plain model's own text and says what it would have written next. Without
a cached tier a text is the same up to a position exactly if every single step up to there agreed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from analysis.evaluate.losses import INDEPENDENT, Caching, token_nll
from analysis.evaluate.points import Subject
from analysis.questions.question import Question
from analysis.report.figures import subplots
from analysis.report.report import Column, ReportFigure, Section, Table
from analysis.resampling import Estimate, bootstrap, ratio_with_interval
from analysis.text.encoding import Encoded
from models import Model
from varjax.errors import NotTestableError
from varjax.model import VARModel

NOTHING = -1  # after the end of a text


@dataclasses.dataclass(frozen=True)
class Curve:
    """A share of the prompts at each new position, with its 95% interval over prompts, position by position."""

    value: np.ndarray  # float64 [T], NaN where no text goes on
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The model under VAR against the plain model's text, as far as that goes."""

    free: Curve  # the token at the position is the same, whatever came before
    together: Curve  # the token and every token before it are the same
    single_step: Curve  # fed the plain model's text, the model under VAR would write the same token
    free_mean: Estimate  # over all positions
    single_step_mean: Estimate


@dataclasses.dataclass(frozen=True)
class Drift:
    """Agreement, and the mean log probability per new token that the plain model gives to texts, nats."""

    prompts: int
    prompt_tokens: int
    new_tokens: int  # at most
    agreement: Agreement
    plain: Estimate  # of its own texts
    var: Estimate  # of those written under VAR
    document: Estimate  # of the documents' own continuations
    difference: Estimate  # var - plain, paired by prompt


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
    """Continue the beginnings of documents with and without VAR.

    Args:
        var_model: the model under the policy.
        documents: the first ones that go on for `new_tokens` after the prompt are taken.
        prompts: at most this many.
        prompt_tokens: S.
        new_tokens: T.
        batch_size: B.
        samples: bootstrap draws of prompts.
        seed: of the draws.
        caching: whether the prompts share a cached tier, where there is one, and how fast it ages.

    Returns:
        Agreement and log probabilities.

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
    parts = []
    carry = caching.init(var_model, batch_size)
    for start in range(0, len(ids), batch_size):
        rows = np.resize(np.arange(start, min(start + batch_size, len(ids))), batch_size)  # the last batch is filled up
        own = min(batch_size, len(ids) - start)
        prompt, document = np.split(ids[rows], [prompt_tokens], axis=1)
        real = np.broadcast_to((np.arange(batch_size) < own)[:, None], prompt.shape)  # what fills up is padding
        ends = model.generation.end_ids
        plain = _ended(model.generate(prompt, new_tokens, attention_mask=real)[0][:, prompt_tokens:], ends, new_tokens)
        now = 0.0 if carry is None else caching.now(carry)
        clock = caching.clock(now)  # texts may have ended before the tokens for which the last one was read
        written, carry = var_model.generate(prompt, carry, new_tokens, attention_mask=real, clock=clock)
        texts = (plain, _ended(written[:, prompt_tokens:], ends, new_tokens), document)
        scores = [_log_probability(model, prompt, text) for text in texts]
        parts.append([one[:own] for one in (_next_tokens(var_model, prompt, plain), *texts, *scores)])
    taught, plain, var, document, *scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts = [(text != NOTHING).sum(axis=1) for text in (plain, var, document)]
    sums = [np.stack([total, count], axis=1) for total, count in zip(scores, counts, strict=True)]
    low, high = bootstrap(_mean_difference, *sums[:2], samples=samples, seed=seed)
    value = _mean_difference(*(one.sum(axis=0) for one in sums[:2]))
    of_plain, of_var, of_document = (_mean(*both, samples, seed) for both in zip(scores, counts, strict=True))
    return Drift(
        prompts=len(ids),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        agreement=_agreement(plain, var, taught, samples, seed),
        plain=of_plain,
        var=of_var,
        document=of_document,
        difference=Estimate(float(value), float(low), float(high)),
    )


def _agreement(plain: np.ndarray, var: np.ndarray, taught: np.ndarray, samples: int = 1000, seed: int = 0) -> Agreement:
    """Agreement of texts int32 [P, T], NOTHING after their ends, at the positions that the plain one reaches.

    `taught` is what the model under VAR would write after the plain model's text.
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


def _ended(text: np.ndarray, ends: Sequence[int], length: int) -> np.ndarray:
    """int32 [B, length]: text [B, <= length] up to and including each row's first end id, then NOTHING."""
    full = np.full((len(text), length), NOTHING, np.int32)
    stop = np.isin(text, ends)
    full[:, : text.shape[1]] = np.where(np.cumsum(stop, axis=1) - stop > 0, NOTHING, text)
    return full


def _next_tokens(var_model: VARModel, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """int32 [B, T]: the most probable token under VAR at each position of text [B, T], all in one call."""
    ids, mask = _joined(prompt, text)
    out, _ = var_model.advance(var_model.init(len(ids)), jnp.asarray(ids), jnp.asarray(mask))
    return np.asarray(jnp.argmax(out.logits[:, prompt.shape[1] - 1 : -1], axis=-1), np.int32)


def _log_probability(model: Model, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """float64 [B]: the plain model's log probability of text [B, T] after its prompt, nats, without NOTHING."""
    ids, mask = _joined(prompt, text)
    logits = model(ids, mask).logits[:, prompt.shape[1] - 1 : -1]
    there = text != NOTHING
    losses = token_nll(logits, jnp.asarray(np.where(there, text, 0)), jnp.asarray(there))
    return -np.asarray(losses, np.float64).sum(axis=1)


def _joined(prompt: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and bool mask [B, S + T]."""
    ids = np.concatenate([prompt, text], axis=1)
    return np.where(ids == NOTHING, 0, ids), ids != NOTHING


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


def _section(found: Drift) -> Section:
    """Agreement and log probabilities, with the figure."""
    agreed = found.agreement
    shown = np.unique(np.linspace(1, found.new_tokens, min(found.new_tokens, 8)).astype(int))
    curves = {"single step": agreed.single_step, "free": agreed.free, "together": agreed.together}
    likely = {
        "the plain model's text": found.plain,
        "the text under VAR": found.var,
        "the document itself": found.document,
        "under VAR, less plain": found.difference,
    }
    agreements = Table(
        "agreement with the plain model's text [share of prompts]",
        (Column("new token"), *(Column(name, ".1%") for name in curves)),
        tuple((int(i), *(float(curve.value[i - 1]) for curve in curves.values())) for i in shown),
    )
    probabilities = Table(
        "mean log probability under the plain model [nats per token]",
        (Column(""), *(Column(name, ".3f") for name in ("value", "low", "high"))),
        tuple((name, *dataclasses.astuple(one)) for name, one in likely.items()),
    )
    figure = ReportFigure(
        QUESTION.name,
        "Agreement with the plain model's text",
        "Share of the prompts, by position in the generated text, with 95% intervals. Free: the token is the plain "
        "model's. Together: all tokens so far are the plain model's. Single step: after the plain model's text up to "
        "here, VAR chooses the plain model's next token. Only the single-step curve shows how good a step is.",
        "Greedy texts diverge at near-ties, where either token is as good, so a low curve is not a loss of quality by "
        "itself. Later positions include only the prompts whose plain text goes on, so the curve of those still "
        "together may even rise.",
        partial(_draw, found),
    )
    return QUESTION.section(
        "reported",
        f"single steps agree at {agreed.single_step_mean:.1%} of positions, free texts at {agreed.free_mean:.1%}; the "
        f"plain model gives the text under VAR {found.difference:+.3f} nats per token",
        (
            f"Greedy continuations of {found.prompts} beginnings of {found.prompt_tokens} tokens, {found.new_tokens} "
            "new tokens at most, as far as the plain model's text goes. The plain model's log probability favors its "
            "own greedy text; a difference near 0 says that the text is only different, not worse.",
        ),
        (agreements, probabilities),
        (figure,),
    )


def _draw(found: Drift) -> Figure:
    figure, axis = subplots(figsize=(5.6, 3.8))
    agreed, position = found.agreement, np.arange(1, found.new_tokens + 1)
    named = {"single step": agreed.single_step, "free": agreed.free, "together": agreed.together}
    for style, (name, curve) in zip(("-", "--", ":"), named.items(), strict=True):
        axis.fill_between(position, curve.low, curve.high, color="0.5", alpha=0.2, linewidth=0)
        axis.plot(position, curve.value, style, color="0", label=name)
    axis.set(xlabel="new token", ylabel="share of prompts", ylim=(0, 1.02), title=f"{found.prompts} prompts, greedy")
    axis.legend(fontsize="small")
    figure.tight_layout()
    return figure


def _measure(sizes: Mapping[str, int], subject: Subject) -> Drift:
    var_model = VARModel(subject.model, subject.config, table=subject.build(keep_shapes=False))
    return drift(var_model, subject.documents, seed=subject.seed, caching=subject.caching, **sizes)  # type: ignore[arg-type]


def question(**sizes: int) -> Question[Subject]:
    """Make the question for other sizes than the usual ones.

    Args:
        sizes: arguments of `drift`, such as `prompts`.

    Returns:
        The question.
    """
    title, measure = "Drift in free generation", partial(_measure, sizes)
    return Question("generation_drift", title, measure, kind=Drift, present=lambda found: [_section(found)])


QUESTION = question()
