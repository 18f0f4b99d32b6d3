"""What a call of the decoder is asked to do: its shapes, and the tiers' mix that decides how many experts run.

Letters: B sequences, T positions of the call, N = B * T tokens, S positions in the key/value cache before it, L layers,
E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.config import MoEConfig
from varjax.errors import InputError

FLOAT32 = 4  # bytes; of gate probabilities, logits and what an expert engine adds up


@dataclass(frozen=True)
class Workload:
    """The shapes of one call. All positions are real tokens."""

    batch: int  # B
    length: int  # T
    cached: int = 0  # S, positions of every sequence before this call
    capacity: int | None = None  # slots of the key/value cache; None: there is no cache, or it is full after the call
    last_logits_only: bool = False
    itemsize: int = FLOAT32  # bytes of a parameter and of an activation

    def __post_init__(self) -> None:
        if min(self.batch, self.length, self.itemsize) < 1 or self.cached < 0:
            raise InputError(f"{self}: batch, length and itemsize must be at least 1, cached at least 0")
        if self.capacity is not None and self.capacity < self.cached + self.length:
            raise InputError(
                f"capacity={self.capacity} holds {self.cached} + {self.length} positions only if it is "
                f"{self.cached + self.length} or more; widen it, or leave it out"
            )

    @property
    def tokens(self) -> int:
        """N."""
        return self.batch * self.length


@dataclass(frozen=True)
class Mix:
    """What VAR made of the call's tokens: means over the layers."""

    experts: float  # that run per token and layer, 0 to K
    distinct: float  # experts of a layer that any token of the call runs, 0 to E: their weights are read
    answers: float = 0.0  # gathered per token and layer
    answer_itemsize: int = FLOAT32  # bytes of an answer's number
    planned: bool = False  # there are a plan and a commit
    table_bytes: float = 0.0  # read from table and cache by the plan, all layers; see `table_bytes`
    spread: float = 0.0  # of the rows that a call gives the experts it hits: coefficient of variation beyond chance

    @classmethod
    def plain(cls, config: MoEConfig, tokens: int, skew: np.ndarray | None = None) -> Mix:
        """VAR switched off: K experts for each of N tokens."""
        return cls(config.top_k, distinct_experts(config.num_experts, config.top_k, tokens, skew))

    @classmethod
    def even(
        cls, config: MoEConfig, tokens: int, experts: float, skew: np.ndarray | None = None, orders: int = 1
    ) -> Mix:
        """VAR at `experts` per token in every layer, an answer for each that is left out, `orders` look-ups a token."""
        return cls(
            experts=experts,
            distinct=distinct_experts(config.num_experts, experts, tokens, skew),
            answers=config.top_k - experts,
            planned=True,
            table_bytes=table_bytes(config, tokens, orders),
        )


def distinct_experts(num_experts: int, k: float, tokens: int, skew: np.ndarray | None = None) -> float:
    """How many experts of a layer are hit, on average, by tokens that each draw k different ones independently.

    A token hits expert e with probability k s_e, where s_e is the share of all assignments that go to e; so the mean is
    the sum over e of 1 - (1 - k s_e)^tokens, whatever the joint law of a token's k draws. Tokens of one text are not
    independent (they favor the same experts), so a real batch hits fewer.

    Args:
        k: experts per token; a fraction is a mean over tokens.
        skew: float [E], measured shares of the assignments, summing to 1; None: all alike.
    """
    if not 0 <= k <= num_experts or tokens < 0:
        raise InputError(f"k={k} of {num_experts} experts for {tokens} tokens: expected 0 <= k <= E and tokens >= 0")
    shares = np.full(num_experts, 1 / num_experts) if skew is None else np.asarray(skew, np.float64)
    if shares.shape != (num_experts,) or shares.min() < 0 or not np.isclose(shares.sum(), 1):
        raise InputError(f"skew has shape {shares.shape} and sum {shares.sum():.6g}; expected [{num_experts}], sum 1")
    hit = k * shares
    if hit.max() > 1 + 1e-9:
        raise InputError(
            f"an expert with {shares.max():.3g} of the assignments cannot be: a token draws it at most once, "
            f"so at k={k} its share is at most {1 / k:.3g}; measure the shares at this k"
        )
    return float((1 - (1 - np.minimum(hit, 1)) ** tokens).sum())


def table_bytes(config: MoEConfig, tokens: int, orders: int, width: int = 4, bucket: int = 4) -> float:
    """Bytes that the fast tier reads for N tokens: per order a bucket and its keys, and what each layer says of a row.

    Args:
        orders: context orders that are looked up.
        width: ids per key.
        bucket: keys per bucket of the index.
    """
    look_up = bucket * 4 * (1 + width) + config.num_layers  # rows, keys, `eligible`
    row = config.num_layers * (1 + 8 * config.top_k)  # `experts_kept`, experts, weights
    return float(tokens * (orders * look_up + row))
