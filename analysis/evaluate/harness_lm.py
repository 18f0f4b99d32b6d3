"""A plain or a VAR model for lm-evaluation-harness (EleutherAI). Needs the extra `eval`.

Letters: B requests of a batch, T positions, V vocabulary.

Tokens, prefixes, windows and truncation follow the harness's class HFLM: context and continuation are encoded together;
a context that is too long loses its beginning; an empty one is the prefix id (begin id, else end id); perplexity is
`analysis.evaluate.losses.score` with that prefix and full last windows.

The result of a request does not depend on other requests, neither on those in its batch nor on those before it. Under
VAR each request starts with a cached tier of its own, which learns from one window of its text to the next, or from
token to token. A sampled text is drawn from the seed and the context alone. `Caching(shared=True)` lets all requests
share one cached tier instead, as in a service; then their order and the batch size matter.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from analysis.evaluate.losses import INDEPENDENT, Caching, Runner, plain_runner, token_nll, var_runner
from analysis.text.batches import Window, cut, in_order, packed
from models import Model, Sampling
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.step import VARState

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lm-evaluation-harness is not installed ({error}); pip install 'varjax[eval]' brings it"
    ) from error

_SHORTEST = 32  # tokens; lengths of batches are powers of two from here on, so that a run compiles few programs
_MAX_NEW_TOKENS = 256  # where a task names none, as the harness has it


class HarnessLM(TemplateLM):
    """A model with the methods that the harness calls. They update `state`, the VARState, and nothing else."""

    def __init__(
        self,
        model: Model | VARModel,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        caching: Caching = INDEPENDENT,
        seed: int = 0,
        progress: bool = True,
    ):
        """Wrap a model.

        Args:
            model: with a tokenizer.
            batch_size: requests at a time.
            max_length: tokens that the model reads at most; None: `max_position_embeddings`.
            add_bos_token: whether texts get the begin id in front; None: as the tokenizer does.
            caching: which requests share a cached tier, and how fast it ages; the model's own clock is not used.
            seed: of the tasks that sample.
            progress: show bars on standard error.

        Raises:
            InputError: the model has no tokenizer or no id to begin with, or a size is out of range.
        """
        super().__init__()
        self._clock = caching.clock()
        self.var_model = model if isinstance(model, VARModel) else None
        plain: Any = model if self.var_model is None else self.var_model.model
        self.model = plain
        self.tokenizer: Any = getattr(self.model, "tokenizer", None)
        if self.tokenizer is None:
            raise InputError(
                "the model has no tokenizer, so the harness's texts cannot be read; put its tokenizer.json next "
                "to config.json"
            )
        if self.prefix_token_id is None:
            raise InputError("the tokenizer has neither a begin nor an end id to score a first token after; name one")
        self.max_length: int = self.model.config.max_position_embeddings if max_length is None else max_length
        if batch_size < 1 or self.max_length < 2:
            raise InputError(f"batch_size={batch_size}, max_length={max_length}: expected at least 1 and 2")
        self.batch_size, self.add_bos_token, self.caching = batch_size, add_bos_token, caching
        self.seed, self.progress = seed, progress
        self.state: VARState | None = None
        self._run: Runner = plain_runner(self.model)
        if self.var_model is not None:
            self.state = caching.init(self.var_model, batch_size)
            self._run = var_runner(self.var_model, caching)

    @property
    def settings(self) -> dict[str, Any]:
        """How texts are read; every result file states it."""
        return {
            "max_length": self.max_length,
            "stride": self.max_length,  # of perplexity's windows
            "prefix_id": self.prefix_token_id,
            "full_last": True,
            "add_bos_token": self.add_bos_token,
            "batch_size": self.batch_size,
            "shared_cache": self.caching.shared,
            "seconds_per_token": self.caching.seconds_per_token,
        }

    @property
    def eot_token_id(self) -> int:
        """The end id."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id before each text: the begin id, else the end id."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer."""
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Encode a text; a begin id that the text spells out is not added again."""
        if add_special_tokens is None:
            spelled = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if spelled else self.add_bos_token
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        # Not verbose: it would warn of long texts, which are cut into windows later.
        ids = self.tokenizer.encode(string, verbose=False, **options)
        if max(ids, default=0) >= self.model.config.vocab_size:
            raise InputError(
                f"a text holds {self.tokenizer.convert_ids_to_tokens(max(ids))!r}, id {max(ids)}, but the model's "
                f"vocab_size is {self.model.config.vocab_size}: take the added token out of the text"
            )
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each text, nats; requests hold (text,)."""
        texts = [request.args[0] for request in requests]
        cuts = [
            list(
                cut(
                    np.array([self.prefix_token_id, *self.tok_encode(text)], np.int32),
                    index,
                    self.max_length,
                    None,
                    True,
                )
            )
            for index, text in enumerate(texts)
        ]
        sums, _ = self._score(cuts, disable_tqdm)
        for text, logprob in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), logprob)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, nats, and whether greedy decoding would give it."""
        cuts = []
        for index, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens; expected 1 to max_length {self.max_length}: "
                    "fix the task, or raise max_length"
                )
            ids = np.asarray([*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :], np.int32)
            size = len(ids) - 1
            cuts.append([Window(ids, size, size - len(continuation), index)])
        answers = list(zip(*self._score(cuts, disable_tqdm), strict=True))
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first stop string; requests hold (context, settings).

        A batch runs for as many tokens as its task allows, or until all of its texts have ended; stop strings are cut
        afterwards.
        """
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found = [""] * len(requests)
        bar = progress_bar(total=len(requests), unit="request", show=self.progress and not disable_tqdm)
        for members in alike.values():
            until, new_tokens, sampling = _wanted(requests[members[0]].args[1], self)
            room = self.max_length - new_tokens
            prompts = {
                index: (self.tok_encode(requests[index].args[0]) or [self.prefix_token_id])[-room:] for index in members
            }
            seeds = _seeds(prompts, self.seed)
            order = sorted(prompts, key=lambda index: len(prompts[index]))  # texts of about equal length together
            for start in range(0, len(order), self.batch_size):
                group = order[start : start + self.batch_size]
                drawn = [seeds[index] for index in group] + [0] * (self.batch_size - len(group))
                length = min(self._length(len(prompts[group[-1]])), room)  # the last prompt is the longest
                ids, mask = _left_padded([prompts[index] for index in group], self.batch_size, length)
                seeded = dataclasses.replace(sampling, seed=tuple(drawn))
                tokens = self._generate(ids, mask, new_tokens, seeded)[: len(group), length:]
                for index, row in zip(group, tokens.tolist(), strict=True):
                    text = self.tokenizer.decode(self._until_end(row), skip_special_tokens=True)
                    found[index] = postprocess_generated_text(text, until, None)
                    self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                bar.update(len(group))
        bar.close()
        return found

    def _score(self, cuts: list[list[Window]], quiet: bool) -> tuple[list[float], list[bool]]:
        """For each text: the log probability of what its windows score, and whether greedy decoding would give it."""
        logprob, greedy = np.zeros(len(cuts)), np.ones(len(cuts), bool)
        lengths = sorted({self._length(window.size) for windows in cuts for window in windows})
        read = progress_bar(cuts, unit="request", show=self.progress and not quiet)
        batches = (
            in_order(read, self.batch_size, lengths)
            if self.state is not None and self.state.own_caches
            else packed((window for windows in read for window in windows), dict.fromkeys(lengths, self.batch_size))
        )
        for batch in batches:
            logits, self.state = self._run(self.state, batch)
            targets, scored = jnp.asarray(batch.targets), jnp.asarray(batch.scored)
            losses = np.asarray(token_nll(logits, targets, scored), np.float64).sum(1)
            owned = batch.documents >= 0
            np.add.at(logprob, batch.documents[owned], -losses[owned])
            np.logical_and.at(greedy, batch.documents[owned], np.asarray(_likeliest(logits, targets, scored))[owned])
            del logits  # frees them: the next call would need memory for both
        return logprob.tolist(), greedy.tolist()

    def _generate(self, ids: np.ndarray, mask: np.ndarray, new_tokens: int, sampling: Sampling) -> np.ndarray:
        options: dict[str, Any] = {"attention_mask": mask, "sampling": sampling}
        if self.var_model is None:
            return self.model.generate(ids, new_tokens, **options)[0]
        if self.state is not None and not self.state.own_caches:  # its time continues where the requests before ended
            self._clock = self.caching.clock(self.caching.now(self.state))
        tokens, self.state = self.var_model.generate(ids, self.state, new_tokens, clock=self._clock, **options)
        return tokens

    def _length(self, tokens: int) -> int:
        """The length of a batch that holds this many tokens."""
        length = _SHORTEST
        while length < tokens:
            length *= 2
        return min(length, self.max_length)

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = {*self.model.generation.end_ids, self.eot_token_id}
        return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _wanted(given: Mapping[str, Any], lm: HarnessLM) -> tuple[list[str], int, Sampling]:
    """A task's stop strings, number of new tokens and sampling.

    Raises InputError for a setting that is not known, or that leaves no room for the context.
    """
    settings = dict(normalize_gen_kwargs(dict(given), min(_MAX_NEW_TOKENS, lm.max_length // 2)))
    until = handle_stop_sequences(settings.pop("until"), lm.tokenizer.decode(lm.eot_token_id))
    new_tokens, sample = settings.pop("max_gen_toks"), settings.pop("do_sample")
    temperature = float(settings.pop("temperature", 0.0))  # taken out even where it is not used
    sampling = Sampling(temperature if sample else 0.0, settings.pop("top_k", None), settings.pop("top_p", None))
    if settings:
        raise InputError(
            f"the task asks for {settings} in generation; expected until, max_gen_toks, do_sample, temperature, "
            "top_k and top_p"
        )
    if not 1 <= new_tokens < lm.max_length:
        raise InputError(
            f"the task asks for {new_tokens} new tokens; expected 1 to less than max_length {lm.max_length}: "
            "lower its max_gen_toks or raise max_length"
        )
    return until, new_tokens, sampling


def _seeds(prompts: Mapping[int, list[int]], seed: int) -> dict[int, int]:
    """A seed for each prompt, from its ids and from how many like it come before."""
    found, seen = {}, Counter[bytes]()
    for index, prompt in prompts.items():
        ids = np.asarray(prompt, np.int32).tobytes()
        found[index] = crc32(ids, crc32(f"{seed} {seen[ids]}".encode()))
        seen[ids] += 1
    return found


def _left_padded(prompts: Sequence[list[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 and bool [rows, length]: ids and which of them are real; the rows that are left are padding."""
    ids, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return ids, mask


@jax.jit
def _likeliest(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
    """bool [B]: whether each scored target of float32 [B, T, V] is the most probable token."""
    return jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~scored, axis=-1)
