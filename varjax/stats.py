"""Running statistics of router outputs per layer and context key, in memory that does not grow with the text.

Letters: L layers, R rows (keys), C key width, O orders, B sequences, T positions, E experts.
Units: entropy in nats, of the router's softmax for one token; confidence is its largest probability.

    buffer = init(stats)                                # on the device, float32
    buffer = update(buffer, rows, probs, mask)          # one batch; jitted, the old buffer is donated
    stats = absorb(buffer, stats)                       # into the host's float64, every 2**16 to 2**18 tokens
    stats = merge(stats, other_stats)                   # runs, hosts, devices

The device adds up deviations from a value near each row's mean: the mean that the host knows or, in a new
row, the middle of its first batch (0 for a probability). So neither cancellation in the variance nor the
length of a sum costs digits; the host joins windows by the pairwise formula of Chan, Golub and LeVeque. A
GPU adds equal rows of one batch in no fixed order: there two runs agree to float32 rounding within a
window, and bit for bit only under `--xla_gpu_deterministic_ops=true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import xlogy

from varjax.errors import InputError
from varjax.keys import ANY, distinct

MAX_WINDOW = 2**24  # tokens between flushes: float32 counts are exact up to here


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """One quantity over the occurrences of each key. Where there are none, m2 is 0 and the rest NaN."""

    mean: np.ndarray  # float64 [L, R]
    m2: np.ndarray  # float64 [L, R], sum of squared deviations from the mean
    min: np.ndarray  # float64 [L, R]
    max: np.ndarray  # float64 [L, R]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingStats:
    """What the routers did at each key. Host arrays; row r is `keys[r]`."""

    keys: np.ndarray  # int32 [R, C], as in `varjax.keys`
    ngram_orders: tuple[int, ...] = field(metadata={"static": True})
    count: np.ndarray  # int64 [L, R], occurrences with a finite router output
    entropy: Moments
    confidence: Moments
    top1_counts: np.ndarray  # int64 [L, R, E], how often each expert came first
    sum_probs: np.ndarray  # float64 [L, R, E], gate probabilities summed over occurrences
    nonfinite: np.ndarray  # int64 [L], tokens left out because the router gave NaN or infinity
    absent: np.ndarray  # int64 [O], tokens whose context of that order is not a key
    tokens: int  # all tokens seen, padding not counted
    documents: int

    @classmethod
    def empty(cls, keys: np.ndarray, ngram_orders: Sequence[int], num_layers: int, num_experts: int) -> RoutingStats:
        """Statistics without any occurrence.

        Args:
            keys: int32 [R, C], as in `varjax.keys`.
            ngram_orders: the orders of the keys, ascending.
            num_layers: L.
            num_experts: E.

        Returns:
            Statistics of these keys.
        """
        shape = (num_layers, len(keys))
        unknown = np.full(shape, np.nan)
        nothing = Moments(mean=unknown, m2=np.zeros(shape), min=unknown, max=unknown)
        return cls(
            keys=np.asarray(keys, np.int32),
            ngram_orders=tuple(ngram_orders),
            count=np.zeros(shape, np.int64),
            entropy=nothing,
            confidence=nothing,
            top1_counts=np.zeros((*shape, num_experts), np.int64),
            sum_probs=np.zeros((*shape, num_experts)),
            nonfinite=np.zeros(num_layers, np.int64),
            absent=np.zeros(len(ngram_orders), np.int64),
            tokens=0,
            documents=0,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.sum_probs.shape[-1]

    @property
    def row_orders(self) -> np.ndarray:
        """The order of each key, int64 [R]."""
        return np.sum(self.keys != ANY, axis=1)

    @property
    def std_entropy(self) -> np.ndarray:
        """Population standard deviation (divided by n), nats, float64 [L, R]; NaN without occurrences."""
        return self._std(self.entropy)

    @property
    def std_confidence(self) -> np.ndarray:
        """Population standard deviation (divided by n), float64 [L, R]; NaN without occurrences."""
        return self._std(self.confidence)

    @property
    def mean_probs(self) -> np.ndarray:
        """Mean gate probabilities, float64 [L, R, E]; NaN without occurrences."""
        return self.sum_probs / np.where(self.count > 0, self.count, np.nan)[..., None]

    @property
    def routing_consistency(self) -> np.ndarray:
        """Share of occurrences with the commonest first choice, float64 [L, R]; else NaN."""
        return np.where(self.count > 0, self.top1_counts.max(axis=-1) / _divisor(self.count), np.nan)

    def _std(self, moments: Moments) -> np.ndarray:
        return np.where(self.count > 0, np.sqrt(moments.m2 / _divisor(self.count)), np.nan)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StatsBuffer:
    """One window of observations on the device."""

    sums: Array  # float32 [R, L, 5 + 2E], of 1, deviations [2], squared [2], first choice [E], probs [E]
    lows: Array  # float32 [R, L, 4], least entropy, -entropy, confidence, -confidence; +inf where none
    center: Array  # float32 [R, L, 2], what entropy and confidence deviate from; -inf in a row not yet seen
    center_probs: Array  # float32 [R, L, E], what is taken from the probabilities before they are summed
    nonfinite: Array  # int32 [L]
    absent: Array  # int32 [O]
    tokens: Array  # int32 []


def bytes_a_key(num_layers: int, num_experts: int) -> int:
    """Device memory of a key in all layers together.

    Args:
        num_layers: L.
        num_experts: E.

    Returns:
        Bytes.
    """
    return 4 * num_layers * (11 + 3 * num_experts)


def init(stats: RoutingStats) -> StatsBuffer:
    """An empty window around the means known so far.

    Args:
        stats: what the window will be absorbed into; its keys, layers and experts are the window's.

    Returns:
        A buffer on the device.
    """
    num_layers, num_rows = stats.count.shape
    center = np.stack([stats.entropy.mean.T, stats.confidence.mean.T], axis=-1).astype(np.float32)
    center_probs = stats.mean_probs.astype(np.float32).swapaxes(0, 1)
    return StatsBuffer(
        sums=jnp.zeros((num_rows, num_layers, 5 + 2 * stats.num_experts), jnp.float32),
        lows=jnp.full((num_rows, num_layers, 4), jnp.inf, jnp.float32),
        center=jnp.asarray(np.nan_to_num(center, nan=-np.inf)),
        center_probs=jnp.asarray(np.nan_to_num(center_probs)),
        nonfinite=jnp.zeros(num_layers, jnp.int32),
        absent=jnp.zeros(len(stats.ngram_orders), jnp.int32),
        tokens=jnp.zeros((), jnp.int32),
    )


@partial(jax.jit, donate_argnums=0)
def update(buffer: StatsBuffer, rows: Array, probs: Array, mask: Array) -> StatsBuffer:
    """Add one batch.

    A token counts once for the row of each order. A layer whose probabilities are not all finite is left out and
    counted in `nonfinite`; the other layers of that token count as usual.

    Args:
        buffer: donated, not to be used again.
        rows: int32 [O, B, T], from `find_orders`; negative where there is no key.
        probs: [L, B, T, E], softmax of the gate over all experts.
        mask: bool [B, T], False at padding and at tokens to leave out.

    Returns:
        The buffer with the batch.

    Raises:
        InputError: the shapes do not fit the buffer.
    """
    num_rows, num_layers, num_experts = buffer.center_probs.shape
    num_orders = len(buffer.absent)
    needed = (num_orders, *mask.shape), (num_layers, *mask.shape, num_experts)
    if (rows.shape, probs.shape) != needed:
        raise InputError(
            f"a buffer of {num_orders} orders, {num_layers} layers and {num_experts} experts with a mask "
            f"{mask.shape} needs rows {needed[0]} and probs {needed[1]}, got {rows.shape} and {probs.shape}"
        )
    with jax.named_scope("stats_update"):
        probs = jnp.moveaxis(probs.astype(jnp.float32), 0, 2).reshape(-1, num_layers, num_experts)
        entropy = jnp.maximum(-jnp.sum(xlogy(probs, probs), axis=-1), 0)  # [B*T, L]
        confidence = jnp.max(probs, axis=-1)
        first = jax.nn.one_hot(jnp.argmax(probs, axis=-1), num_experts, dtype=jnp.float32)
        values = jnp.stack([entropy, confidence], axis=-1)
        finite = jnp.all(jnp.isfinite(values), axis=-1, keepdims=True)  # infinity shows in the confidence
        lows = jnp.stack([entropy, -entropy, confidence, -confidence], axis=-1)
        lows = jnp.where(finite, lows, jnp.inf)

        sums, least, center = buffer.sums, buffer.lows, buffer.center
        written = jnp.where(mask[None] & (rows >= 0), rows, num_rows).reshape(num_orders, -1)  # R: nowhere
        for row in written if num_rows else ():  # JAX cannot gather from no rows at all
            least = least.at[row].min(lows, mode="drop")
            middle = (least[row][..., 0::2] - least[row][..., 1::2]) / 2
            new = finite & jnp.isneginf(center[row])
            center = center.at[row].max(jnp.where(new, middle, -jnp.inf), mode="drop")
            deviation = values - center[row]
            parts = (
                jnp.ones_like(finite, jnp.float32),
                deviation,
                jnp.square(deviation),
                first,
                probs - buffer.center_probs[row],
            )
            sums = sums.at[row].add(jnp.where(finite, jnp.concatenate(parts, axis=-1), 0), mode="drop")
        left_out = mask.reshape(-1, 1) & ~finite[..., 0]
        return replace(
            buffer,
            sums=sums,
            lows=least,
            center=center,
            nonfinite=buffer.nonfinite + jnp.sum(left_out, axis=0, dtype=jnp.int32),
            absent=buffer.absent + jnp.sum(mask[None] & (rows < 0), axis=(1, 2), dtype=jnp.int32),
            # No further than one too many: a count that wrapped around would pass for a short window.
            tokens=jnp.minimum(buffer.tokens + jnp.sum(mask, dtype=jnp.int32), MAX_WINDOW + 1),
        )


def absorb(buffer: StatsBuffer, stats: RoutingStats, documents: int = 0) -> RoutingStats:
    """Add a window to the host's statistics. Windows of several devices are absorbed one after the other.

    Args:
        buffer: a window of at most 2**24 tokens; begin the next one with `init`.
        stats: the statistics so far, for the same keys.
        documents: how many documents ended in this window.

    Returns:
        The statistics of both.

    Raises:
        InputError: the window is longer.
    """
    tokens = int(buffer.tokens)
    if tokens > MAX_WINDOW:
        raise InputError(
            f"more than {MAX_WINDOW} tokens since the last flush, where float32 counts become inexact: flush more often"
        )
    sums, lows, center, center_probs = (
        np.asarray(values).swapaxes(0, 1)  # [L, R, ...]
        for values in (buffer.sums, buffer.lows, buffer.center, buffer.center_probs)
    )
    # What there is once per expert stays in float32: whole numbers, and parts of sums that are made in float64.
    sums, top1, probs = np.split(sums, [5, 5 + stats.num_experts], axis=-1)
    sums, lows, center = (values.astype(np.float64) for values in (sums, lows, center))
    count = sums[..., 0]
    seen = count > 0
    lows[~seen] = np.nan

    def moments(i: int) -> Moments:
        deviation = sums[..., 1 + i] / _divisor(count)
        return Moments(
            mean=np.where(seen, center[..., i] + deviation, np.nan),
            m2=np.maximum(sums[..., 3 + i] - count * np.square(deviation), 0),
            min=lows[..., 2 * i],
            max=-lows[..., 2 * i + 1],
        )

    window = RoutingStats(
        keys=stats.keys,
        ngram_orders=stats.ngram_orders,
        count=count.astype(np.int64),
        entropy=moments(0),
        confidence=moments(1),
        top1_counts=top1.astype(np.int64),
        sum_probs=count[..., None] * center_probs + probs,
        nonfinite=np.asarray(buffer.nonfinite, np.int64),
        absent=np.asarray(buffer.absent, np.int64),
        tokens=tokens,
        documents=documents,
    )
    return merge(stats, window)


def merge(a: RoutingStats, b: RoutingStats) -> RoutingStats:
    """The statistics of two collections, over the union of their keys: those of `a`, then the new ones of `b`.

    Exact up to float64 rounding. A key that only one part admitted carries that part's occurrences alone.

    Args:
        a: statistics.
        b: statistics of other text.

    Returns:
        The statistics of both together.

    Raises:
        InputError: different orders, layers or experts.
    """
    ours, theirs = ((s.ngram_orders, len(s.count), s.num_experts) for s in (a, b))
    if ours != theirs:
        raise InputError(
            "statistics merge only over the same orders, layers and experts; "
            f"these have (orders, layers, experts) {ours} and {theirs}"
        )
    if not np.array_equal(a.keys, b.keys):
        keys, rows = distinct(np.concatenate([a.keys, b.keys]))
        a, b = _on_rows(a, keys, rows[: len(a.keys)]), _on_rows(b, keys, rows[len(a.keys) :])
    return RoutingStats(
        keys=a.keys,
        ngram_orders=a.ngram_orders,
        count=a.count + b.count,
        entropy=_merged(a.entropy, a.count, b.entropy, b.count),
        confidence=_merged(a.confidence, a.count, b.confidence, b.count),
        top1_counts=a.top1_counts + b.top1_counts,
        sum_probs=a.sum_probs + b.sum_probs,
        nonfinite=a.nonfinite + b.nonfinite,
        absent=a.absent + b.absent,
        tokens=a.tokens + b.tokens,
        documents=a.documents + b.documents,
    )


def spread(stats: RoutingStats, layers: Sequence[int], num_layers: int) -> RoutingStats:
    """Statistics of some layers as those of the whole model; the other layers have no occurrences.

    Args:
        stats: of some layers.
        layers: the model's layer of each layer of `stats`.
        num_layers: of the model.

    Returns:
        Statistics of `num_layers` layers.
    """
    wide = RoutingStats.empty(stats.keys, stats.ngram_orders, num_layers, stats.num_experts)

    def placed(some: np.ndarray, every: np.ndarray) -> np.ndarray:
        every = every.copy()
        every[np.asarray(layers)] = some
        return every

    by_layer = ("count", "entropy", "confidence", "top1_counts", "sum_probs", "nonfinite")
    return replace(
        stats, **{name: jax.tree.map(placed, getattr(stats, name), getattr(wide, name)) for name in by_layer}
    )


def _merged(a: Moments, count_a: np.ndarray, b: Moments, count_b: np.ndarray) -> Moments:
    """The moments of two samples taken together (Chan, Golub and LeVeque 1979)."""
    share = count_b / _divisor(count_a + count_b)
    delta = np.where((count_a > 0) & (count_b > 0), b.mean - a.mean, 0)
    return Moments(
        mean=np.where(count_a > 0, a.mean, b.mean) + delta * share,
        m2=a.m2 + b.m2 + np.square(delta) * count_a * share,
        min=np.fmin(a.min, b.min),
        max=np.fmax(a.max, b.max),
    )


def _on_rows(stats: RoutingStats, keys: np.ndarray, rows: np.ndarray) -> RoutingStats:
    """The same statistics over more keys; row i becomes row rows[i], the other rows are empty."""
    wide = RoutingStats.empty(keys, stats.ngram_orders, len(stats.count), stats.num_experts)

    def moved(old: np.ndarray, blank: np.ndarray) -> np.ndarray:
        new = blank.copy()
        new[:, rows] = old
        return new

    return replace(
        stats,
        keys=keys,
        count=moved(stats.count, wide.count),
        entropy=jax.tree.map(moved, stats.entropy, wide.entropy),
        confidence=jax.tree.map(moved, stats.confidence, wide.confidence),
        top1_counts=moved(stats.top1_counts, wide.top1_counts),
        sum_probs=moved(stats.sum_probs, wide.sum_probs),
    )


def _divisor(count: np.ndarray) -> np.ndarray:
    """The count, or 1 where there is nothing to divide."""
    return np.maximum(count, 1)
