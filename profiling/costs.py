"""The cost of one decoder call, counted from its shapes: floating-point operations and bytes by component.

    costs = component_costs(config, Workload(batch=1, length=1, cached=1023), Mix.even(config, tokens=1, experts=1.0))
    total = sum(costs.values(), Cost())

Letters: B sequences, T positions of the call, N = B * T tokens, S positions in the key/value cache before it, L layers
with experts, D hidden size, F expert size, E experts, K slots per token, V vocabulary, r rank of the maps of affine
answers (`varjax.affine`).

**Operations.** A multiply-add counts as two. In `projections`, `scores`, `gate`, `experts` and `head` only matrix
products are counted; activations and softmaxes are under 1% of a call where D is 512 or more. The other components
have hardly any products, so their elementwise operations are counted, which is an estimate.

**Bytes.** Every array that a component reads from memory or writes to it moves once; intermediate results stay on the
chip. Experts read the weights of the *distinct* experts that the tokens of the call use: with many tokens these are all
experts, however few each token runs. Answers and their maps are counted in float32; other types take fewer bytes.

**As written.** By default a component does only what is needed. With `as_written=True` the extra work of
`models.decoder` is included: attention computes scores that the mask discards and keeps them in memory, a layer with
answers always gathers K of them per token, and a layer with affine answers applies its map to every token and the mixes
of all experts, whose results it keeps in memory. Padding and copies inside an expert engine are never included.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.attention import BLOCKS
from models.config import MoEConfig
from varjax.errors import InputError

COMPONENTS = (
    "plan",  # table look-ups and the arrays of the plan
    "projections",  # query, key, value and output matrices
    "scores",  # queries times keys, weights times values; reads the key/value cache
    "gate",  # its matrix and its probabilities
    "dispatch",  # sorting assignments by expert, summing the outputs of the slots
    "experts",  # the SwiGLU blocks that run, including those of layers without experts
    "answers",  # table rows gathered and added, and the maps that move them
    "norms",  # also the embedding look-up, rotary angles and residual sums
    "head",
    "commit",  # counters and the cached tier
)
FLOAT32 = 4  # bytes of gate probabilities, logits and the accumulators of an expert engine


@dataclass(frozen=True)
class Workload:
    """The shapes of one call. All positions are real tokens."""

    batch: int  # B
    length: int  # T
    cached: int = 0  # S
    capacity: int | None = None  # slots of the key/value cache; None: no cache, or it is full after the call
    last_logits_only: bool = False
    itemsize: int = FLOAT32  # bytes of a parameter and of an activation

    def __post_init__(self) -> None:
        if min(self.batch, self.length, self.itemsize) < 1 or self.cached < 0:
            raise InputError(f"{self}: batch, length and itemsize must be at least 1, cached at least 0")
        if self.capacity is not None and self.capacity < self.cached + self.length:
            raise InputError(
                f"capacity={self.capacity} is too small for {self.cached} + {self.length} positions; give "
                f"{self.cached + self.length} or more, or leave it out"
            )

    @property
    def tokens(self) -> int:
        """N."""
        return self.batch * self.length

    @property
    def logit_rows(self) -> int:
        """Positions that the head computes logits for."""
        return self.batch if self.last_logits_only else self.tokens


@dataclass(frozen=True)
class Mix:
    """How VAR divided the work of a call: means over the layers."""

    experts: float  # that run per token and layer, 0 to K
    distinct: float  # experts of a layer that any token of the call runs, 0 to E: their weights are read
    answers: float = 0.0  # gathered per token and layer
    planned: bool = False  # the call has a plan and a commit
    table_bytes: float = 0.0  # that the plan reads from table and cache in all layers
    spread: float = 0.0  # of the rows per expert: coefficient of variation beyond chance
    answer_rank: int = 0  # r; 0: answers are constant
    mapped: float = 1.0  # share of the layers whose answers have maps, where there are any

    @classmethod
    def plain(cls, config: MoEConfig, tokens: int) -> Mix:
        """The mix with VAR switched off: K experts for each of N tokens.

        Args:
            config: the model.
            tokens: N.

        Returns:
            The mix.
        """
        return cls(config.top_k, _distinct_experts(config.num_experts, config.top_k, tokens))

    @classmethod
    def even(
        cls,
        config: MoEConfig,
        tokens: int,
        experts: float,
        orders: int = 1,
        answered: bool = True,
        answer_rank: int = 0,
    ) -> Mix:
        """The mix with VAR at the same number of experts in every layer.

        Args:
            config: the model.
            tokens: N.
            experts: per token and layer.
            orders: context orders looked up per token.
            answered: an answer is added for each expert that is left out.
            answer_rank: r of the maps of these answers; 0: they are constant.

        Returns:
            The mix.
        """
        return cls(
            experts=experts,
            distinct=_distinct_experts(config.num_experts, experts, tokens),
            answers=config.top_k - experts if answered else 0.0,
            planned=True,
            table_bytes=table_bytes(config, tokens, orders),
            answer_rank=answer_rank if answered else 0,
        )


@dataclass(frozen=True)
class Cost:
    """Operations and memory traffic. Costs add up: `sum(costs, Cost())` is a total."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(times * self.flops, times * self.bytes)


def _distinct_experts(num_experts: int, k: float, tokens: int) -> float:
    """The expected number of experts of a layer used by tokens that each draw k different ones evenly at random.

    An expert is left out by all tokens with probability (1 - k / E)^tokens. Tokens of one text favor the same experts,
    so a real batch uses fewer.
    """
    if not 0 <= k <= num_experts or tokens < 0:
        raise InputError(f"k={k} of {num_experts} experts for {tokens} tokens: expected 0 <= k <= E and tokens >= 0")
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def table_bytes(config: MoEConfig, tokens: int, orders: int, width: int = 4, bucket: int = 4) -> float:
    """Bytes that the fast tier reads for N tokens: per order a bucket and its keys, and one row for all layers.

    Args:
        config: the model.
        tokens: N.
        orders: context orders looked up per token.
        width: ids per key.
        bucket: keys per bucket of the index.

    Returns:
        Bytes.
    """
    look_up = bucket * 4 * (1 + width) + config.num_layers  # rows, keys, `eligible`
    row = config.num_layers * (1 + 8 * config.top_k)  # `experts_kept`, experts, weights
    return float(tokens * (orders * look_up + row))


def component_costs(config: MoEConfig, workload: Workload, mix: Mix, *, as_written: bool = False) -> dict[str, Cost]:
    """The cost of each of `COMPONENTS` in one call of `models.decoder.forward`, all layers together.

    Args:
        config: the model.
        workload: the shapes of the call.
        mix: what runs in it.
        as_written: count what the code does instead of what is needed; see the module.

    Returns:
        Component -> cost.

    Raises:
        InputError: the mix does not fit the model.
    """
    for name, most in (("experts", config.top_k), ("distinct", config.num_experts), ("answers", config.top_k)):
        if not 0 <= getattr(mix, name) <= most:
            raise InputError(f"mix.{name}={getattr(mix, name)}: expected 0 to {most} in this model")
    if not 0 <= mix.answer_rank <= config.hidden_size or not 0 <= mix.mapped <= 1:
        raise InputError(
            f"mix.answer_rank={mix.answer_rank}, mix.mapped={mix.mapped}: expected 0 to {config.hidden_size} in this "
            "model, and 0 to 1"
        )
    n, size, rows = workload.tokens, workload.itemsize, workload.logit_rows
    d, k, experts, layers = config.hidden_size, config.top_k, config.num_experts, config.num_layers
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    square, block, dense = 2 * d * heads, 3 * d * config.intermediate_size, 3 * d * (config.dense_size or 0)
    assigned = n * mix.experts  # of one layer
    gathered = float(n * k) if as_written and (mix.answers or mix.answer_rank) else n * mix.answers
    entry = 1 + 1 + 4 + 8 * k  # bytes of a plan for one layer and token: tier, kept, row, experts, weights
    per_query = 3.0 if config.query_key_norm is None else 7.0  # operations of the rotation, and of a norm before it
    found = {
        "projections": Cost(2.0 * n * square, size * (square + n * (2 * d + 2 * heads))) * config.depth,
        "scores": _scores(config, workload, as_written) * config.depth,
        "gate": Cost(2.0 * n * d * experts, size * (d * experts + n * d) + FLOAT32 * n * experts) * layers,
        # The kernel of an expert gathers its own rows. What remains is the order and the weighted sum of the slots.
        "dispatch": Cost(2.0 * assigned * d, 3 * 4 * n * k + FLOAT32 * assigned * d + size * n * d) * layers,
        "experts": Cost(2.0 * assigned * block, size * (mix.distinct * block + assigned * d) + FLOAT32 * assigned * d)
        * layers
        + Cost(2.0 * n * dense, size * (dense + 2 * n * d)) * len(config.dense_layers),
        # Two norms (square, mean, scale, weight) and two residual sums. A sum and the norm after it read the stream and
        # what is added, and write the stream and the norm. Then the embedding and the last norm.
        "norms": Cost(2.0 * (4 + 1) * n * d + per_query * n * heads, size * 2 * 4 * n * d) * config.depth
        + Cost(4.0 * rows * d, 2 * size * (rows * d + n * d)),
        "head": Cost(
            2.0 * rows * d * config.vocab_size,
            size * (d * config.vocab_size + rows * d) + FLOAT32 * rows * config.vocab_size,
        ),
    }
    if gathered:  # each slot says which answer it has and its deviation; the sum of the slots moves no second time
        found["answers"] = Cost(2.0 * gathered * d, 2 * 4 * n * k + gathered * FLOAT32 * d) * layers
    if gathered and mix.answer_rank:  # centers are subtracted, squares summed, deviations summed by their weights
        r, mapped = mix.answer_rank, layers * mix.mapped
        found["answers"] += Cost(5.0 * gathered * r, gathered * FLOAT32 * r) * mapped
        found["answers"] += map_products(config, workload, mix, as_written=as_written)
    if mix.planned:  # the plan does a few integer operations; the commit takes one maximum of the gate probabilities
        found["plan"] = Cost(bytes=mix.table_bytes + layers * n * entry)
        found["commit"] = Cost(2.0 * layers * n * experts, layers * n * (entry + 8 * k + FLOAT32 * experts))
    return {name: found.get(name, Cost()) for name in COMPONENTS}


def map_products(config: MoEConfig, workload: Workload, mix: Mix, *, as_written: bool = False) -> Cost:
    """The cost of the products of affine answers, all layers together: a part of the component `answers`.

    A token that is given an answer is read and written once, and each of its answers needs the mix of its expert. As
    far as `mix` says, no token is given a second answer before every token has one.

    Args:
        config: the model.
        workload: the shapes of the call.
        mix: what runs in it.
        as_written: every token is read, mixed for all experts and written.

    Returns:
        The cost; nothing where answers are constant.
    """
    n, d, r, experts = workload.tokens, config.hidden_size, mix.answer_rank, config.num_experts
    moved, answers, mixes = n * min(mix.answers, 1.0), n * mix.answers, 0.0
    if as_written:
        moved, answers, mixes = float(n), float(n * experts), float(experts)
    elif r:
        mixes = _distinct_experts(experts, mix.answers, n)
    maps = 2 * d * r + mixes * r * r if moved else 0.0
    kept = 2 * answers * r if as_written else 0.0  # written by one kernel and read by the next
    one = Cost(4.0 * moved * d * r + 2.0 * answers * r * r, FLOAT32 * (maps + kept) + workload.itemsize * moved * d)
    return one * (config.num_layers * mix.mapped if r else 0.0)


def flops_per_token(config: MoEConfig, context: int, experts: float, answer_rank: int = 0) -> dict[str, float]:
    """Operations of each component for one token.

    Args:
        config: the model.
        context: keys that the token attends to, including itself; the mean over a text of T tokens is (T + 1) / 2.
        experts: that run per token and layer; K is the plain model, fewer is VAR with its plan, answers and commit.
        answer_rank: r of the maps of the answers; 0: they are constant.

    Returns:
        Component -> operations.
    """
    even = Mix.even(config, 1, experts, answer_rank=answer_rank)
    mix = Mix.plain(config, 1) if experts == config.top_k else even
    costs = component_costs(config, Workload(batch=1, length=1, cached=context - 1), mix)
    return {name: cost.flops for name, cost in costs.items()}


def parameters(config: MoEConfig) -> int:
    """The number of parameters of a checkpoint.

    Args:
        config: the model.

    Returns:
        The count, embeddings included.
    """
    d, key_values = config.hidden_size, config.num_kv_heads * config.head_dim
    heads = config.num_heads * config.head_dim + key_values
    attention = 2 * d * heads + {None: 0, "head": 2 * config.head_dim, "projection": heads}[config.query_key_norm]
    attention += heads + key_values + d if config.attention_bias else 0
    experts = config.num_experts * (d + 3 * d * config.intermediate_size)  # with the gate's rows
    dense = len(config.dense_layers) * 3 * d * (config.dense_size or 0)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * d
    return config.depth * (attention + 2 * d) + config.num_layers * experts + dense + embeddings + d


def computed_scores(workload: Workload) -> tuple[int, int]:
    """How much attention computes for one sequence, block by block of `models.attention.attend`.

    Args:
        workload: the shapes of the call.

    Returns:
        (query, key) pairs whose scores are computed, and keys that are read.
    """
    if workload.cached or workload.capacity:
        slots = workload.capacity or workload.cached + workload.length
        return workload.length * slots, slots
    size = max(-(-workload.length // BLOCKS), 64)  # queries of a block; it sees all keys up to its own end
    starts = range(0, workload.length, size)
    ends = [min(start + size, workload.length) for start in starts]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True)), sum(ends)


def _scores(config: MoEConfig, workload: Workload, as_written: bool) -> Cost:
    """Of one layer: per query head, query and key, head_dim multiply-adds for the score and as many for the value."""
    kept = 0.0
    if as_written:
        pairs, keys = computed_scores(workload)
        # Scores in float32 and weights in the type of the activations are written and read.
        kept = workload.batch * config.num_heads * pairs * 2.0 * (FLOAT32 + workload.itemsize)
    else:
        last = workload.cached + workload.length
        window = config.sliding_window or last
        # Pairs below the diagonal among the new queries, less those that are further away than the window.
        pairs = _triangle(last) - _triangle(workload.cached)
        pairs -= _triangle(last - window) - _triangle(workload.cached - window)
        keys = min(last, window + workload.length - 1)
    queries = 2 * workload.tokens * config.num_heads * config.head_dim  # and the outputs
    key_values = 2 * workload.batch * keys * config.num_kv_heads * config.head_dim
    return Cost(
        flops=4.0 * workload.batch * pairs * config.num_heads * config.head_dim,
        bytes=workload.itemsize * (queries + key_values) + kept,
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0
