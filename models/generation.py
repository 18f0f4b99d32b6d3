"""Text generation with a key/value cache: one prefill, then several tokens with each call of a compiled loop.

Letters: B sequences, T positions, V vocabulary, N tokens per dispatch.

The decoder is run by a `Step`, so plain and adaptive routing share this loop: the loop owns sampling and the end of
texts, the step owns the model and the state that it threads through its calls. A call from Python takes as long as a
small model's step, so the loop runs on the device and returns to Python only every N tokens.

A checkpoint says which ids begin, end and pad a text, and recommends a sampling (`GenerationDefaults`). As in
transformers, `generation_config.json` alone decides where it exists. Otherwise the ids are those of config.json with
the family's defaults, as in transformers' `GenerationConfig.from_model_config`. The ids always apply; generation is
greedy unless the caller passes `sampling`, so that a run without arguments can be repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.config import TOKEN_IDS, ConfigError, MoEConfig
from models.fields import FLAG, INTEGER, NUMBER, TOKEN, TOKENS, Kind, read_object, without_negative_ids, wrong_types
from models.kv_cache import KVCache
from models.placement import ONE_DEVICE, Placement
from varjax.errors import InputError, require_integer
from varjax.transfer import passing_scalars, random_key, to_device

GENERATION_FILE = "generation_config.json"
TOKENS_PER_DISPATCH = 16  # generated with each call from Python

_KINDS: dict[str, Kind] = {
    "bos_token_id": TOKEN.or_null(),
    "eos_token_id": TOKENS.or_null(),
    "pad_token_id": TOKEN.or_null(),
    "do_sample": FLAG.or_null(),
    "temperature": NUMBER.or_null(),
    "top_k": INTEGER.or_null(),
    "top_p": NUMBER.or_null(),
}
_DEFAULT_TOP_K = 50  # of transformers, where a file that asks for sampling does not name it; 0 or less is all tokens
# Settings with which transformers chooses other tokens and which `Sampling` lacks, and the value that changes nothing.
_NOT_APPLIED: dict[str, Any] = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "stop_strings", "suppress_tokens", "top_h")),
    "watermarking_config": None,
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens", "min_p", "penalty_alpha"), 0),
    "no_repeat_ngram_size": 0,
    **dict.fromkeys(("guidance_scale", "num_beams", "repetition_penalty", "typical_p"), 1),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default, temperature 0, takes the most probable one.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None  # only the k most probable tokens
    top_p: float | None = None  # only the most probable tokens that reach this mass (Holtzman et al. 2019)
    seed: int | tuple[int, ...] = 0  # one for the batch; or one per text, which is then drawn alike in any batch

    def __post_init__(self) -> None:
        # The conditions are written so that NaN, which compares false with everything, is refused.
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise InputError(f"temperature={self.temperature!r}; expected 0 (greedy) or more, and not infinity")
        if self.top_k is not None:
            require_integer("top_k", self.top_k, least=1)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p={self.top_p!r}; expected more than 0 and at most 1, or None for all tokens")
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            require_integer("seed", seed, least=0)
            if seed >= 2**32:  # JAX would cut it off
                raise InputError(f"seed={seed}; expected less than 2^32")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint begins, ends, pads and samples texts."""

    begin_id: int | None
    end_ids: tuple[int, ...]  # a text ends with any of these; empty: texts do not end
    pad_id: int | None
    sampling: Sampling = GREEDY  # the recommendation; greedy where the checkpoint asks for no sampling
    not_applied: tuple[str, ...] = ()  # other settings of the file that would change what transformers generates

    @classmethod
    def of(cls, config: MoEConfig) -> GenerationDefaults:
        """Take the ids of an architecture, for a model that comes from no file.

        Args:
            config: the architecture.

        Returns:
            Its ids, without a recommendation.
        """
        return cls(config.bos_token_id, config.eos_token_ids, config.pad_token_id)

    @property
    def token_ids(self) -> frozenset[int]:
        """All ids named here."""
        return frozenset({self.begin_id, self.pad_id, *self.end_ids} - {None})  # type: ignore[arg-type]


def read_generation(directory: Path, config: MoEConfig) -> GenerationDefaults:
    """Read how a checkpoint generates texts.

    Args:
        directory: the folder of the checkpoint.
        config: its architecture.

    Returns:
        The ids and the recommended sampling; a recommendation that cannot be followed is listed in `not_applied`.

    Raises:
        ConfigError: the file cannot be read, or a field has a value of a wrong type; names file and fields.
    """
    own = (directory / GENERATION_FILE).exists()
    path = directory / (GENERATION_FILE if own else "config.json")
    fields = read_object(path, ConfigError)
    fields |= {name: without_negative_ids(fields.get(name)) for name in TOKEN_IDS}
    if wrong := wrong_types(fields, _KINDS):
        raise ConfigError(f"{path}: {'; '.join(wrong)}; correct the file or fetch it again")
    sampling, impossible = _sampling(fields)
    unknown = [name for name, neutral in _NOT_APPLIED.items() if fields.get(name, neutral) not in (neutral, None)]
    if own:
        config = dataclasses.replace(config, **{name: fields[name] for name in TOKEN_IDS})
    found = GenerationDefaults.of(config)
    return dataclasses.replace(found, sampling=sampling, not_applied=(*impossible, *sorted(unknown)))


def _sampling(fields: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """The sampling that the fields recommend, and the names of those whose value is out of range."""
    impossible = []
    temperature, top_k, top_p = (fields.get(name) for name in ("temperature", "top_k", "top_p"))
    if temperature is not None and temperature < 0:
        impossible.append("temperature")
        temperature = None
    if top_p is not None and not 0 < top_p <= 1:
        impossible.append("top_p")
        top_p = None
    if not fields.get("do_sample") or temperature == 0:
        return GREEDY, impossible
    top_k = _DEFAULT_TOP_K if top_k is None else max(top_k, 0) or None
    return Sampling(1.0 if temperature is None else float(temperature), top_k, top_p), impossible


def generation_to_hf(generation: GenerationDefaults) -> dict[str, Any]:
    """Convert the ids and the sampling to the fields of a `generation_config.json`.

    Args:
        generation: what the file is to say; `not_applied` is left out.

    Returns:
        The fields that are not null.
    """
    fields: dict[str, Any] = {
        "bos_token_id": generation.begin_id,
        "eos_token_id": list(generation.end_ids) or None,
        "pad_token_id": generation.pad_id,
    }
    sampling = generation.sampling
    if sampling.temperature:
        named = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
        fields |= {"do_sample": True, **named}
    return {name: value for name, value in fields.items() if value is not None}


class Step(Protocol):
    """One call of a model: a pure function, and a pytree whose arrays are the model.

    As an argument of a compiled loop it must not make it compile again, so what is not an array is static and compares
    by value (`jax.tree_util.register_dataclass`).
    """

    def __call__(
        self, kv: KVCache, carry: Any, ids: jax.Array, mask: jax.Array, now: jax.Array
    ) -> tuple[jax.Array, KVCache, Any]:
        """Run the next ids of each text.

        Args:
            kv: the cache so far.
            carry: the step's own state.
            ids: int32[B, T].
            mask: bool[B, T], true for real tokens.
            now: int32[], what the clock said.

        Returns:
            The logits float32[B, V] of the last position, and the next `kv` and `carry`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Choice:
    """How the next token follows from the logits. Static under jit."""

    sampling: Sampling  # without a seed, so that another one compiles nothing
    end_ids: tuple[int, ...]
    fill_id: int


def generate(
    step: Step,
    kv: KVCache,
    carry: Any,
    ids: jax.Array,
    mask: jax.Array,
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: tuple[int, ...],
    fill_id: int,
    clock: Callable[[], np.int32] = np.int32,
    tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
    placement: Placement = ONE_DEVICE,
) -> tuple[np.ndarray, Any]:
    """Run the loop of `Model.generate`.

    Args:
        step: runs the model.
        kv: an empty cache with room for T + max_new_tokens - 1 positions; donated.
        carry: the step's first state; donated.
        ids: int32[B, T].
        mask: bool[B, T], true at every text's last position; a row without any true value stays padding.
        max_new_tokens: the largest number of new tokens per text.
        sampling: how tokens are chosen.
        end_ids: a text ends with any of these.
        fill_id: the id after the end of a text.
        clock: gives `now` of each step. It is read before a dispatch, once for each step, although texts may end early.
        tokens_per_dispatch: N.
        placement: the devices.

    Returns:
        int32[B, T + new], and the step's last state.

    Raises:
        InputError: the number of seeds is not the number of texts.
    """
    key = _key(sampling.seed, len(ids))
    static = {"choice": _Choice(dataclasses.replace(sampling, seed=0), end_ids, fill_id), "placement": placement}
    with passing_scalars():
        token, live, kv, carry = _first(step, kv, carry, ids, mask, key, clock(), **static)
    pieces, ran, begun = [ids, token], [], 1
    while begun < max_new_tokens and not (end_ids and not jax.device_get(live).any()):
        count = min(tokens_per_dispatch, max_new_tokens - begun)
        now = np.zeros(tokens_per_dispatch, np.int32)
        now[:count] = [clock() for _ in range(count)]
        now = to_device(now)
        with passing_scalars():
            tokens, done, token, live, kv, carry = _next(
                step, kv, carry, token, live, key, np.int32(begun), np.int32(count), now, **static
            )
        pieces.append(tokens)
        ran.append(done)
        begun += count
    made, ran = jax.device_get((pieces, ran))
    return np.concatenate(made, axis=1)[:, : ids.shape[1] + 1 + sum(ran)], carry


@partial(jax.jit, static_argnames=("choice", "placement"), donate_argnames=("kv", "carry"))
def _first(
    step: Step,
    kv: KVCache,
    carry: Any,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    now: jax.Array,
    *,
    choice: _Choice,
    placement: Placement,
) -> tuple[jax.Array, jax.Array, KVCache, Any]:
    """The first new token int32[B, 1] of texts int32[B, T], which texts continue after it bool[B], `kv` and `carry`."""
    logits, kv, carry = step(kv, carry, ids, mask, now)
    # A row of padding only is not continued.
    token, live = _pick(logits, mask[:, -1], key, jnp.int32(0), choice)
    return _placed(placement, token, live, kv, carry)


@partial(jax.jit, static_argnames=("choice", "placement"), donate_argnames=("kv", "carry"))
def _next(
    step: Step,
    kv: KVCache,
    carry: Any,
    token: jax.Array,
    live: jax.Array,
    key: jax.Array,
    begun: jax.Array,
    count: jax.Array,
    now: jax.Array,
    *,
    choice: _Choice,
    placement: Placement,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, KVCache, Any]:
    """At most `count` tokens more, after `begun` new ones of which `token` int32[B, 1] is the last.

    Returns the tokens int32[B, N], how many of the N steps ran, the last token int32[B, 1], which texts continue after
    it bool[B], `kv` and `carry`. A text that has ended is padding from then on: it runs no expert, and no tier counts
    or remembers it. `now` is int32[N].
    """

    def more(loop: Any) -> jax.Array:
        done, _, live, *_ = loop
        return (done < count) & (live.any() if choice.end_ids else True)

    def run(loop: Any) -> Any:
        done, tokens, live, token, kv, carry = loop
        logits, kv, carry = step(kv, carry, token, live[:, None], now[done])
        token, live = _pick(logits, live, key, begun + done, choice)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token, done, axis=1)
        return done + 1, tokens, live, token, kv, carry

    tokens = jnp.full((len(token), len(now)), choice.fill_id, jnp.int32)
    start = jnp.int32(0), tokens, live, token, kv, carry
    done, tokens, live, token, kv, carry = jax.lax.while_loop(more, run, start)
    return tokens, done, *_placed(placement, token, live, kv, carry)


def _placed(
    placement: Placement, token: jax.Array, live: jax.Array, kv: KVCache, carry: Any
) -> tuple[jax.Array, jax.Array, KVCache, Any]:
    """What the next call takes, divided over the devices as the call before took it, so that nothing is compiled."""
    if placement.mesh is None:
        return token, live, kv, carry
    token, live, carry = placement.whole((token, live, carry))
    return token, live, kv.constrain(placement), carry


def _pick(
    logits: jax.Array, live: jax.Array, key: jax.Array, index: jax.Array, choice: _Choice
) -> tuple[jax.Array, jax.Array]:
    """The next token int32[B, 1] of the texts that are `live` bool[B], and which of them remain live bool[B].

    `index` counts the new tokens before it.
    """
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, in_axes=(0, None))
    token = jnp.where(live, _choose(logits, fold(key, index), choice.sampling), choice.fill_id)
    ended = jnp.isin(token, jnp.asarray(choice.end_ids, jnp.int32)) if choice.end_ids else jnp.zeros_like(live)
    return token[:, None], live & ~ended


def _choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """int32[B]: the next token of each sequence, from logits float32[B, V] and one key, or one key per sequence."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # the mass ahead of each token; 0 for the first, which always stays
        smallest = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    draw = jax.random.categorical if key.ndim == 0 else jax.vmap(jax.random.categorical)
    return draw(key, logits).astype(jnp.int32)


def _key(seed: int | tuple[int, ...], batch_size: int) -> jax.Array:
    """A PRNG key for the batch, or [B] of them."""
    if not isinstance(seed, tuple):
        return random_key(seed)
    if len(seed) != batch_size:
        raise InputError(f"seed holds {len(seed)} seeds for {batch_size} texts; expected one for each, or a single one")
    return jax.vmap(jax.random.key)(to_device(np.asarray(seed, np.uint32)))
