"""Expert engines against a plain SwiGLU block of the same FLOPs, by how many assignments are active.

    python -m profiling.experts_bench [--tokens 2048] [--hidden 512 1024] [--experts 8] [--top_k 2] [--ffn 3.0]

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token.

The plain block has K * F inner units and runs on the same N rows: what an ideal engine costs when every slot is used.
Each cell is the time over the plain block's in the same round, median and 95 % interval; the last column is the time
over the engine's own full one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.experts import ENGINES
from profiling.timing import compare, paired_ratio
from varjax.routing import Routing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="N of the prefill rows; decode rows have one")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024], help="D")
    parser.add_argument("--experts", type=int, default=8, help="E")
    parser.add_argument("--top_k", type=int, default=2, help="K")
    parser.add_argument("--ffn", type=float, default=3.0, help="F / D; Mixtral has 3.5")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), default=sorted(ENGINES))
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()

    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; {args.dtype}, E={args.experts}, K={args.top_k}")
    for hidden in args.hidden:
        for tokens in (args.tokens, 1):
            size = int(args.ffn * hidden)
            print(f"\nN={tokens}, D={hidden}, F={size}")
            seconds = measure(tokens, hidden, size, args.experts, args.top_k, args.dtype, args.engines, args.repeats)
            print_table(seconds, args.engines, cases(tokens, args.experts, args.top_k))


def cases(tokens: int, num_experts: int, k: int) -> dict[str, Routing]:
    """Routings [N, K] that differ in how many slots are used; the experts are drawn evenly."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((tokens, num_experts)))[:, :k]
    later = np.arange(k) > 0  # the slots that a single-expert token does without
    half = np.arange(tokens)[:, None] % 2 == 0
    unused = {"all slots": np.zeros_like(later), "one expert": later, "none": np.ones_like(later)}
    if tokens > 1:
        unused = {"all slots": unused["all slots"], "half one expert": half & later, **unused}
    weights = rng.dirichlet(np.ones(k), tokens)
    return {
        name: Routing(
            jnp.asarray(np.where(gone, num_experts, experts), jnp.int32),
            jnp.asarray(np.where(gone, 0, weights), jnp.float32),
        )
        for name, gone in unused.items()
    }


def measure(
    tokens: int, hidden: int, size: int, num_experts: int, k: int, dtype: str, engines: list[str], repeats: int
) -> dict[str, np.ndarray]:
    """Seconds [repeats] of "plain" and of each "engine/case", interleaved."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * num_experts + 4))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns), dtype) / np.sqrt(rows).astype(dtype)

    def block(width: int) -> dict[str, jax.Array]:
        return {"gate": matrix(hidden, width), "up": matrix(hidden, width), "down": matrix(width, hidden)}

    x = matrix(tokens, hidden)
    experts = {index: block(size) for index in range(num_experts)}
    runs: dict[str, Callable[[], Any]] = {"plain": partial(jax.jit(plain), x, block(k * size))}
    for engine in engines:
        params, apply = ENGINES[engine].prepare(experts), jax.jit(ENGINES[engine].apply)
        for name, routing in cases(tokens, num_experts, k).items():
            runs[f"{engine}/{name}"] = partial(apply, x, routing, params)
    return compare(runs, repeats)


def plain(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """One SwiGLU block as anybody would write it."""
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    hidden = (jax.nn.silu(dot(x, params["gate"])) * dot(x, params["up"])).astype(x.dtype)
    return dot(hidden, params["down"]).astype(x.dtype)


def print_table(seconds: dict[str, np.ndarray], engines: list[str], names: dict[str, Routing]) -> None:
    print(f"  {'':30}{'ms':>9}{'x plain':>10}{'':16}{'x all slots':>12}")
    print(f"  {'plain':30}{np.median(seconds['plain']) * 1e3:>9.3f}")
    for engine in engines:
        full = seconds[f"{engine}/all slots"]
        for name in names:
            taken = seconds[f"{engine}/{name}"]
            over, own = paired_ratio(taken, seconds["plain"]), paired_ratio(taken, full)
            milliseconds, interval = np.median(taken) * 1e3, f"[{over.low:.2f}, {over.high:.2f}]"
            print(f"  {engine:12}{name:18}{milliseconds:>9.3f}{over.value:>10.2f}  {interval:16}{own.value:>10.2f}")


if __name__ == "__main__":
    main()
