"""Text generation with a key/value cache: one prefill, then one jitted step per token.

Letters: B sequences, T positions, V vocabulary.

What runs the decoder is a `Step`, so that plain and adaptive routing share this loop: the loop owns sampling and the
end of texts, the step owns the model and whatever it threads through its calls.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.kv_cache import KVCache
from varjax.errors import InputError, require_integer
from varjax.transfer import passing_scalars, random_key, to_device


class Step(Protocol):
    """`(kv, carry, ids int32[B, T], mask bool[B, T]) -> (logits float32[B, V] of the last position, kv, carry)`.

    The step jits its own work; `kv` and `carry` are spent by the call.
    """

    def __call__(self, kv: KVCache, carry: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, KVCache, Any]: ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most probable one."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k most probable tokens
    top_p: float | None = None  # only the most probable tokens that reach this mass (Holtzman et al. 2019)
    seed: int | tuple[int, ...] = 0  # one for the batch; or one for each text, which is then drawn alike in any batch

    def __post_init__(self) -> None:
        # Asked so that NaN, which compares false with everything, is refused.
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
) -> tuple[np.ndarray, Any]:
    """The loop behind `Model.generate`; see there.

    Args:
        kv: empty, with room for T + max_new_tokens - 1 positions.
        mask: bool [B, T], true at every text's last position; a row without any is padding, and stays it.
        end_ids: a text ends with any of these; from there on it is filled with `fill_id`.
    """
    key, live = _key(sampling.seed, len(ids)), _going_on(mask)
    sampling = dataclasses.replace(sampling, seed=0)  # it is static in `_pick`, where another seed compiles nothing
    pieces = [ids]
    for index in range(max_new_tokens):
        logits, kv, carry = step(kv, carry, ids, mask)
        with passing_scalars():
            ids, mask, live = _pick(logits, live, key, np.int32(index), sampling, end_ids, fill_id)
        pieces.append(ids)
        if end_ids and not jax.device_get(live).any():
            break
    return np.concatenate(jax.device_get(pieces), axis=1), carry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


@jax.jit
def _going_on(mask: jax.Array) -> jax.Array:
    """bool [B]: the texts that are to be continued; a row that is padding from end to end is not."""
    return mask[:, -1]


@partial(jax.jit, static_argnames=("sampling", "end_ids", "fill_id"))
def _pick(
    logits: jax.Array,
    live: jax.Array,
    key: jax.Array,
    index: jax.Array,
    sampling: Sampling,
    end_ids: tuple[int, ...],
    fill_id: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token int32[B, 1], its mask bool[B, 1], and which texts go on after it bool[B].

    A text that has ended is padding from there on: it runs no expert, and no tier counts or remembers it.
    """
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, in_axes=(0, None))
    token = jnp.where(live, choose(logits, fold(key, index), sampling), fill_id)
    ended = jnp.isin(token, jnp.asarray(end_ids, jnp.int32)) if end_ids else jnp.zeros_like(live)
    live = live & ~ended
    return token[:, None], live[:, None], live


def choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """int32[B]: the next token of each sequence, from logits float32[B, V] and one key, or one for each sequence."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # the most probable token always stays
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
