"""What one call of the decoder costs, counted from its shapes: floating-point operations and bytes, part by part.

Letters: B sequences, T positions of the call, N = B * T tokens, S positions in the key/value cache before it, L layers
with experts, D hidden size, F expert size, H query heads, G key/value heads, E experts, K slots per token, V
vocabulary.

    costs = component_costs(config, Workload(batch=1, length=1, cached=1023), Mix.even(config, tokens=1, experts=1.0))
    total = sum(costs.values(), Cost())

**Operations.** A multiply-add is two. In `projections`, `scores`, `gate`, `experts` and `head` only matrix products are
counted; their activations and softmaxes are left out (under 1 % of a call where D is 512 or more, held against XLA in
the tests). The other components do little else, so their elementwise work is counted, one per element and step, and is
no more than a fair estimate.

**Bytes.** Every array that a component must take from memory or leave there moves once; what a component makes on its
way stays on the chip. Experts read the weights of the *distinct* experts that the call's tokens hit: with many tokens
that is all of them, however few each token runs.

**As written.** By default a component does what it has to. `as_written=True` counts what `models.decoder` does beyond
it: attention computes scores that the mask throws away (whole blocks on the diagonal, the unused slots of a key/value
cache, keys outside a sliding window) and keeps them in memory, and a layer with answers gathers K of them per token
whether they are wanted or not. What an expert engine does beyond its rows (padding, copies) is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import MoEConfig
from profiling.workload import FLOAT32, Mix, Workload
from varjax.errors import InputError

COMPONENTS = (
    "plan",  # look-ups in the table, the plan's arrays
    "projections",  # query, key, value and output matrices
    "scores",  # queries times keys, weights times values; reads the key/value cache
    "gate",  # its matrix and its probabilities
    "dispatch",  # assignments sorted by expert, the slots' outputs summed
    "experts",  # the SwiGLU blocks that run, those of layers without experts included
    "answers",  # rows of the table gathered and added
    "norms",  # with the embedding's look-up, rotary angles and the residual sums
    "head",
    "commit",  # counters, what is remembered
)


@dataclass(frozen=True)
class Cost:
    """Work and traffic. Costs add; `sum(costs, Cost())` is a total."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def component_costs(config: MoEConfig, workload: Workload, mix: Mix, *, as_written: bool = False) -> dict[str, Cost]:
    """The cost of each of `COMPONENTS` in one call of `models.decoder.forward`, all layers together.

    Args:
        as_written: count what the code does, not what it would have to; see the module.

    Raises:
        InputError: the mix is not one of this model.
    """
    for name, most in (("experts", config.top_k), ("distinct", config.num_experts), ("answers", config.top_k)):
        if not 0 <= getattr(mix, name) <= most:
            raise InputError(f"mix.{name}={getattr(mix, name)}: expected 0 to {most} in this model")
    per_layer = {  # and how many layers have it
        "projections": (config.depth, _projections(config, workload)),
        "scores": (config.depth, _scores(config, workload, as_written)),
        "gate": (config.num_layers, _gate(config, workload)),
        "dispatch": (config.num_layers, _dispatch(config, workload, mix)),
        "experts": (config.num_layers, _experts(config, workload, mix)),
        "answers": (config.num_layers, _answers(config, workload, mix, as_written)),
        "norms": (config.depth, _norms(config, workload)),
    }
    found = {name: Cost(layers * one.flops, layers * one.bytes) for name, (layers, one) in per_layer.items()}
    found["experts"] += _dense_layers(config, workload)
    found["norms"] += _embedding_and_last_norm(config, workload)
    found["head"] = _head(config, workload)
    found["plan"] = _plan(config, workload, mix)
    found["commit"] = _commit(config, workload, mix)
    return {name: found[name] for name in COMPONENTS}


def flops_per_token(config: MoEConfig, context: int, experts: float) -> dict[str, float]:
    """Operations of each component for one token.

    Args:
        context: keys that the token attends to, itself included. Over a whole text of T tokens the mean is (T + 1) / 2.
        experts: that run per token and layer; K is the plain model, fewer is VAR with its plan, answers and commit.
    """
    mix = Mix.plain(config, 1) if experts == config.top_k else Mix.even(config, 1, experts)
    costs = component_costs(config, Workload(batch=1, length=1, cached=context - 1), mix)
    return {name: cost.flops for name, cost in costs.items()}


def parameters(config: MoEConfig) -> int:
    """How many numbers the checkpoint holds."""
    layer = _projection_weights(config) + _projection_vectors(config) + 2 * config.hidden_size
    experts = config.num_experts * (config.hidden_size + _expert_weights(config))  # the gate's rows too
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    blocks = config.depth * layer + config.num_layers * experts + len(config.dense_layers) * _dense_weights(config)
    return blocks + embeddings + config.hidden_size


def _projections(config: MoEConfig, workload: Workload) -> Cost:
    weights = _projection_weights(config)
    columns = 2 * config.hidden_size + 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return Cost(
        flops=2.0 * workload.tokens * weights,
        bytes=workload.itemsize * (weights + workload.tokens * columns),
    )


def _scores(config: MoEConfig, workload: Workload, as_written: bool) -> Cost:
    """Per query head, query and key: head_dim multiply-adds for the score and as many for the value."""
    pairs, keys = _needed(config, workload)
    kept = 0.0
    if as_written:
        pairs, keys = computed(workload)
        # Scores in float32 and weights in the activations' type are written and read.
        kept = workload.batch * config.num_heads * pairs * 2.0 * (FLOAT32 + workload.itemsize)
    queries = 2 * workload.tokens * config.num_heads * config.head_dim  # and what comes of them
    key_values = 2 * workload.batch * keys * config.num_kv_heads * config.head_dim
    return Cost(
        flops=4.0 * workload.batch * pairs * config.num_heads * config.head_dim,
        bytes=workload.itemsize * (queries + key_values) + kept,
    )


def _needed(config: MoEConfig, workload: Workload) -> tuple[int, int]:
    """Of one sequence: (query, key) pairs that the mask lets through, and keys that any query sees."""
    window = config.sliding_window or workload.cached + workload.length
    last = workload.cached + workload.length
    pairs = _triangle(last) - _triangle(workload.cached)
    pairs -= _triangle(last - window) - _triangle(workload.cached - window)
    return pairs, min(last, window + workload.length - 1)


def computed(workload: Workload) -> tuple[int, int]:
    """Of one sequence: (query, key) pairs whose scores the code computes, and keys that it reads, block by block."""
    if workload.cached or workload.capacity:
        slots = workload.capacity or workload.cached + workload.length
        return workload.length * slots, slots
    blocks = list(_blocks(workload.length))
    return sum((end - start) * end for start, end in blocks), sum(end for _, end in blocks)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First and last query of each block of `models.layers.attend_causally`; a block sees the keys up to its end."""
    size = max(-(-length // 8), 64)
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _gate(config: MoEConfig, workload: Workload) -> Cost:
    weights = config.hidden_size * config.num_experts
    return Cost(
        flops=2.0 * workload.tokens * weights,
        bytes=workload.itemsize * (weights + workload.tokens * config.hidden_size)
        + FLOAT32 * workload.tokens * config.num_experts,
    )


def _dispatch(config: MoEConfig, workload: Workload, mix: Mix) -> Cost:
    """The rows of expert e are gathered by its kernel; what is left is the order, and the weighted sum of the slots."""
    slots = workload.tokens * config.top_k
    outputs = workload.tokens * mix.experts * config.hidden_size
    return Cost(
        flops=2.0 * outputs,
        bytes=3 * 4 * slots + FLOAT32 * outputs + workload.itemsize * workload.tokens * config.hidden_size,
    )


def _experts(config: MoEConfig, workload: Workload, mix: Mix) -> Cost:
    assignments = workload.tokens * mix.experts
    return Cost(
        flops=2.0 * assignments * _expert_weights(config),
        bytes=workload.itemsize * (mix.distinct * _expert_weights(config) + assignments * config.hidden_size)
        + FLOAT32 * assignments * config.hidden_size,
    )


def _dense_layers(config: MoEConfig, workload: Workload) -> Cost:
    layers, weights = len(config.dense_layers), _dense_weights(config)
    hidden = workload.tokens * config.hidden_size
    return Cost(
        flops=2.0 * layers * workload.tokens * weights, bytes=layers * workload.itemsize * (weights + 2 * hidden)
    )


def _answers(config: MoEConfig, workload: Workload, mix: Mix, as_written: bool) -> Cost:
    """Rows are added where the slots are summed: that sum moves no second time."""
    if not mix.answers:
        return Cost()
    gathered = workload.tokens * (config.top_k if as_written else mix.answers)
    entries = 2 * 4 * workload.tokens * config.top_k  # which answer each slot has, and its deviation
    return Cost(
        flops=2.0 * gathered * config.hidden_size,
        bytes=entries + gathered * mix.answer_itemsize * config.hidden_size,
    )


def _norms(config: MoEConfig, workload: Workload) -> Cost:
    """Two norms (square, mean, scale, weight), two residual sums, and three operations to rotate each query and key.

    Where queries and keys have norms of their own, these are counted with the rotation: they move nothing more.
    """
    hidden = workload.tokens * config.hidden_size
    rotated = workload.tokens * (config.num_heads + config.num_kv_heads) * config.head_dim
    per_query = 3.0 if config.query_key_norm is None else 3.0 + 4.0
    # A sum and the norm behind it read the stream and what is added, and write the stream and the norm.
    return Cost(flops=2.0 * (4 + 1) * hidden + per_query * rotated, bytes=workload.itemsize * 2 * 4 * hidden)


def _embedding_and_last_norm(config: MoEConfig, workload: Workload) -> Cost:
    rows = _head_rows(workload) * config.hidden_size
    looked_up = workload.tokens * config.hidden_size
    return Cost(flops=4.0 * rows, bytes=2 * workload.itemsize * (rows + looked_up))


def _head(config: MoEConfig, workload: Workload) -> Cost:
    rows, weights = _head_rows(workload), config.hidden_size * config.vocab_size
    return Cost(
        flops=2.0 * rows * weights,
        bytes=workload.itemsize * (weights + rows * config.hidden_size) + FLOAT32 * rows * config.vocab_size,
    )


def _plan(config: MoEConfig, workload: Workload, mix: Mix) -> Cost:
    """A few integer operations per layer and slot: nothing but traffic is worth counting."""
    if not mix.planned:
        return Cost()
    return Cost(bytes=mix.table_bytes + config.num_layers * workload.tokens * _plan_entry(config))


def _commit(config: MoEConfig, workload: Workload, mix: Mix) -> Cost:
    """Reads the plan, what ran, and the gate's probabilities once for the counters' and the cache's maximum."""
    if not mix.planned:
        return Cost()
    entries = config.num_layers * workload.tokens
    read = _plan_entry(config) + 8 * config.top_k + FLOAT32 * config.num_experts
    return Cost(flops=2.0 * entries * config.num_experts, bytes=entries * read)


def _projection_weights(config: MoEConfig) -> int:
    return 2 * config.hidden_size * (config.num_heads + config.num_kv_heads) * config.head_dim


def _projection_vectors(config: MoEConfig) -> int:
    """Biases, and the norms' weights of queries and keys."""
    rows = (config.num_heads + config.num_kv_heads) * config.head_dim
    biases = rows + config.num_kv_heads * config.head_dim + config.hidden_size if config.attention_bias else 0
    return biases + {None: 0, "head": 2 * config.head_dim, "projection": rows}[config.query_key_norm]


def _dense_weights(config: MoEConfig) -> int:
    return 3 * config.hidden_size * (config.dense_size or 0)


def _expert_weights(config: MoEConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def _plan_entry(config: MoEConfig) -> int:
    """Bytes of a plan for one layer and token: tier, kept, row, experts, weights."""
    return 1 + 1 + 4 + 8 * config.top_k


def _head_rows(workload: Workload) -> int:
    return workload.batch if workload.last_logits_only else workload.tokens


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0
