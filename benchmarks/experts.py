"""Time expert engines against a plain SwiGLU block with the same FLOPs, by how many experts a token keeps.

    python -m benchmarks.experts [--tokens 2048 1] [--hidden 512 1024] [--ffn 3.0]              # like Mixtral
    python -m benchmarks.experts --engines blocks --experts 64 --top_k 8 --hidden 2048 --ffn 0.5    # OLMoE
    python -m benchmarks.experts --engines blocks --experts 128 --top_k 8 --hidden 2048 --ffn 0.375 # Qwen3-30B-A3B

Letters: N tokens, D hidden size, F expert size, E experts, K slots per token, m experts that a token keeps.

The plain block has K * F inner units and runs on the same N rows, as an ideal engine would when every slot is used.
Several tokens together use more than K experts, whose weights must all be read; the column `hit` has their number. Each
row has the time over the plain block's in the same round, median and 95% interval, and in the last column the time
over the engine's own with all K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.command import program
from benchmarks import harness
from models.experts import ENGINES, Engine
from profiling.timing import compare, paired_ratio
from varjax.routing import Routing


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[2048, 1],
        help="N, number of tokens: in a prefill, and in a decoding step of a batch",
    )
    options.add_argument("--hidden", type=int, nargs="+", default=[512, 1024], help="D, hidden size")
    options.add_argument("--experts", type=int, default=8, help="E, number of experts")
    options.add_argument("--top_k", type=int, default=2, help="K, slots per token")
    options.add_argument(
        "--ffn", type=float, default=3.0, help="F / D, expert size relative to the hidden size; Mixtral has 3.5"
    )
    options.add_argument(
        "--kept", type=float, nargs="+", help="m, mean number of experts that a token keeps (default: K, 3/4 K, ..., 0)"
    )
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="data type of the weights")
    options.add_argument(
        "--engines", nargs="+", choices=sorted(ENGINES), help="engines to time (default: all that run here)"
    )
    options.add_argument("--repeats", type=int, default=11, help="number of timed rounds")
    args = options.parse_args(arguments)

    here = [name for name, engine in sorted(ENGINES.items()) if engine.obstacle(jax.devices()[0]) is None]
    engines = {name: ENGINES[name] for name in args.engines or here}
    kept = [args.top_k * share / 4 for share in (4, 3, 2, 1, 0)] if args.kept is None else args.kept
    print(f"{harness.machine()}; {args.dtype}, E={args.experts}, K={args.top_k}")
    for hidden in args.hidden:
        size = int(args.ffn * hidden)
        for tokens in args.tokens:
            routings = cases(tokens, args.experts, args.top_k, kept)
            seconds = measure(routings, hidden, size, args.experts, args.dtype, engines, args.repeats)
            print(f"\nN={tokens}, D={hidden}, F={size}")
            print_table(seconds, list(engines), routings, args.experts)


def cases(tokens: int, num_experts: int, k: int, kept: Sequence[float]) -> dict[float, Routing]:
    """m -> Routing [N, K] that uses m slots of a token on average; all K first. The experts are drawn evenly.

    A mean that is not a whole number of slots in total is left out: one token cannot keep 1.5 experts.
    """
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((tokens, num_experts)))[:, :k]
    weights = rng.dirichlet(np.ones(k), tokens)
    found = {}
    for m in dict.fromkeys(map(float, (k, *kept))):
        if not (m * tokens).is_integer():
            continue
        each = np.diff(np.arange(tokens + 1) * m // 1, axis=0)  # m or, where it is not a whole number, its neighbors
        gone = np.arange(k) >= each[:, None]
        found[m] = Routing(
            jnp.asarray(np.where(gone, num_experts, experts), jnp.int32),
            jnp.asarray(np.where(gone, 0, weights), jnp.float32),
        )
    return found


def measure(
    routings: dict[float, Routing],
    hidden: int,
    size: int,
    num_experts: int,
    dtype: str,
    engines: Mapping[str, Engine],
    repeats: int,
) -> dict[str, np.ndarray]:
    """Seconds [repeats] of "plain" and of each "engine/m", interleaved.

    Args:
        routings: m -> Routing [N, K], as from `cases`.
    """
    keys = iter(jax.random.split(jax.random.key(0), 3 * num_experts + 4))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns), dtype) / np.sqrt(rows).astype(dtype)

    def block(width: int) -> dict[str, jax.Array]:
        return {"gate": matrix(hidden, width), "up": matrix(hidden, width), "down": matrix(width, hidden)}

    tokens, k = next(iter(routings.values())).experts.shape
    x = matrix(tokens, hidden)
    experts = {index: block(size) for index in range(num_experts)}
    runs: dict[str, Callable[[], Any]] = {"plain": partial(jax.jit(plain), x, block(k * size))}
    for name, engine in engines.items():
        params, apply = engine.prepare(experts), jax.jit(engine.apply)
        for m, routing in routings.items():
            runs[f"{name}/{m}"] = partial(apply, x, routing, params)
    return compare(runs, repeats)


def plain(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """One SwiGLU block as anybody would write it."""
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    hidden = (jax.nn.silu(dot(x, params["gate"])) * dot(x, params["up"])).astype(x.dtype)
    return dot(hidden, params["down"]).astype(x.dtype)


def print_table(
    seconds: dict[str, np.ndarray], engines: Sequence[str], routings: dict[float, Routing], num_experts: int
) -> None:
    print(f"  {'':12}{'kept':>6}{'hit':>6}{'ms':>12}{'x plain':>10}{'':16}{'x all kept':>12}")
    print(f"  {'plain':24}{np.median(seconds['plain']) * 1e3:>12.3f}")
    for engine in engines:
        full = seconds[f"{engine}/{max(routings)}"]
        for m, routing in routings.items():
            taken, hit = seconds[f"{engine}/{m}"], np.sum(np.unique(routing.experts) < num_experts)
            over, own = paired_ratio(taken, seconds["plain"]), paired_ratio(taken, full)
            over_plain = f"{over.value:>10.2f}  {harness.interval(over)}"
            print(f"  {engine:12}{m:>6g}{hit:>6}{np.median(taken) * 1e3:>12.3f}{over_plain:28}{own.value:>10.2f}")


if __name__ == "__main__":
    main()
