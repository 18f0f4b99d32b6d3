"""Compile the decoder for an H100, without one, and check what the compiler made of it.

    make gpu-check                                        # installs jax's CUDA plugin into build/gpu, then runs this
    python -m benchmarks.cuda --output results/cuda.md    # where jax[cuda12] is installed; the table in Markdown

XLA compiles for a device of which it only knows a description (`benchmarks.compiled`). Nothing runs, no weights are
read, and kernels are not tuned to the device, so this shows memory, copies and numbers of kernels, and not how fast
they are. Models have two and four layers; what a layer adds is the difference, and memory at full depth follows.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays live there; programs are compiled for the described device

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import varjax
from analysis.collect import passes
from analysis.collect.passes import PassSums
from analysis.command import path_argument, program
from benchmarks import harness
from benchmarks.compiled import Program, compiled, device, on_device
from models.config import MoEConfig
from models.decoder import Network
from models.experts import get_engine
from models.kv_cache import KVCache
from models.model import plain_step
from models.parameters import init_params, prepare
from models.placement import make_mesh
from profiling.published import PUBLISHED
from varjax import Answers, RoutingStats, VARConfig, answers, stats, step
from varjax.errors import InputError
from varjax.files import replacing
from varjax.keys import KeyIndex, find_rows
from varjax.model import routed_forward
from varjax.routing import Routing

GB = 1e9
SHARED = 233472 // 2 - 1024  # bytes with which two programs fit into an H100's shared memory; CUDA takes 1024 of each
# Kernels that a layer starts at most in a step of decoding at batch 8, plain and under VAR, and at batch 1: what was
# reached with jax 0.10.2.
KERNELS = {
    "mixtral-8x7b": (22, 24.5, 24, 24.5),
    "olmoe-1b-7b": (27, 28.5, 26, 27),
    "qwen3-30b-a3b": (29, 30.5, 28, 28),
}
KEYS = 64  # of the small table that plans a step under VAR


@dataclasses.dataclass(frozen=True)
class Check:
    """What must hold for a program."""

    name: str
    value: float
    bound: float
    at_least: bool = False  # whether the bound is from below

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        bound = f"at {'least' if self.at_least else 'most'} {self.bound:g}"
        return f"{'ok' if self.holds else 'FAILS'}: {self.name}: {self.value:g}, {bound}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of a model."""

    title: str
    lower: Callable[[MoEConfig], Any]  # for a config with fewer layers
    checks: Callable[[Program, Program], list[Check]]  # with two and with four layers


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--shapes", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), help="what to compile"
    )
    options.add_argument("--output", type=path_argument, help="Markdown file for the table (default: only print it)")
    args = options.parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here cannot be loaded here
    columns = ("model", "program", "at full depth", "temporaries", "kernels per layer")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    failed: list[str] = []
    for name in args.shapes:
        layers = PUBLISHED[name].num_layers
        for title, few, many, seconds, checks in _compiled(name):
            growth = max(many.temporaries - few.temporaries, 0) / 2
            temporaries = many.temporaries + growth * (layers - 4)
            whole = few.held + (many.held - few.held) / 2 * (layers - 2) + temporaries
            each = (len(many.launches) - len(few.launches)) / 2
            cells = (name, title, f"{whole / GB:.1f} GB", f"{temporaries / GB:.2f} GB", f"{each:g}")
            lines.append(f"| {' | '.join(cells)} |")
            print(f"{lines[-1]} compiled in {seconds:.0f} s", flush=True)
            for check in checks:
                print(f"  {check}", flush=True)
                failed += [] if check.holds else [f"{name}, {title}: {check}"]
    if args.output:
        with replacing(args.output) as file:
            file.write_text("\n".join(lines) + "\n")
    if failed:
        raise InputError("\n".join(["the compiled programs break a bound:", *failed]))


def _compiled(name: str) -> Iterator[tuple[str, Program, Program, float, list[Check]]]:
    """Each program with two layers and with four, the seconds that took, and what must hold for it."""
    for case in cases(name):
        shallow, deep = (dataclasses.replace(PUBLISHED[name], num_layers=layers) for layers in (2, 4))
        start = time.perf_counter()
        few, many = compiled(case.lower(shallow)), compiled(case.lower(deep))
        yield case.title, few, many, time.perf_counter() - start, case.checks(few, many)


def cases(name: str) -> list[Case]:
    """List the programs of a published model.

    Args:
        name: of the model.

    Returns:
        Prefill and decoding, plain and under VAR, and the passes of phase 1.
    """
    config = PUBLISHED[name]

    def prefill(few: Program, many: Program) -> list[Check]:
        return [Check("GB of temporaries", many.temporaries / GB, 3), _spilled(many)]

    def decode(batch: int, slots: int, most: float, few: Program, many: Program) -> list[Check]:
        cache = batch * slots * config.num_kv_heads * config.head_dim
        found = [
            Check("arrays of the size of a layer's cache that are written", many.written(cache), 0),
            Check("kernels per layer", (len(many.launches) - len(few.launches)) / 2, most),
            *_kernels(few, many, 3),
            Check("bytes of shared memory of these", max((one.shared for one in many.pallas), default=0), SHARED),
            # XLA may compute the product for one token as rounded products of numbers that it then adds up.
            Check(
                "products of matrices per layer", (len(many.sums("dot")) - len(few.sums("dot"))) / 2, 3, at_least=True
            ),
            Check("sums in bfloat16", (many.sums("dot") + many.sums("reduce")).count("bf16"), 0),
        ]
        if batch == 1 and name == "mixtral-8x7b":  # an expert of OLMoE or Qwen3 has few columns
            own = (launch.grid[1] * launch.grid[2] for launch in many.pallas if launch.name != "attend")
            found.append(Check("programs of one expert of one token", min(own), 264, at_least=True))
        return found

    def collect(few: Program, many: Program) -> list[Check]:
        return _kernels(few, many, 2)

    sides = [(batch, slots, lower) for batch, slots in ((8, 4096), (1, 32768)) for lower in (plain, routed)]
    decoding = [
        Case(
            f"decode {batch} x 1 of {slots:,}" + (", VAR" if lower is routed else ""),
            partial(lower, batch=batch, length=1, slots=slots),
            partial(decode, batch, slots, most),
        )
        for (batch, slots, lower), most in zip(sides, KERNELS[name], strict=True)
    ]
    return [
        Case("prefill 1 x 32,768", partial(plain, batch=1, length=32768, slots=32768), prefill),
        *decoding,
        Case("statistics, 8 x 512", partial(collecting, experts=False), collect),
        Case("answers, 8 x 512", partial(collecting, experts=True), collect),
    ]


def _kernels(few: Program, many: Program, wanted: int) -> list[Check]:
    """What must hold for our kernels: how many of them a layer starts, and that they spill nothing."""
    ours = (len(many.pallas) - len(few.pallas)) / 2
    return [
        Check("kernels of pallas per layer", ours, wanted),
        Check("kernels of pallas per layer", ours, wanted, at_least=True),
        _spilled(many),
    ]


def _spilled(program: Program) -> Check:
    return Check("bytes of registers that our kernels spill", max(program.spills.values(), default=0), 0)


def plain(config: MoEConfig, *, batch: int, length: int, slots: int) -> Any:
    """A call of the plain model with a key/value cache, lowered."""
    params, network = _model(config)
    kv, ids, mask = _texts(config, batch, length, slots)
    return plain_step.lower(*on_device((params, kv, ids, mask)), network=network)


def routed(config: MoEConfig, *, batch: int, length: int, slots: int) -> Any:
    """The same under VAR: a table of 64 tokens keeps one expert, and adds answers for the others."""
    params, network = _model(config)
    kv, ids, mask = _texts(config, batch, length, slots)
    rng, layers = np.random.default_rng(0), range(config.num_layers)
    keys = np.arange(KEYS, dtype=np.int32)[:, None]
    known = RoutingStats.empty(keys, (1,), len(layers), config.num_experts)
    said = Answers.empty(keys, layers, config.num_experts, config.hidden_size)
    text = jnp.asarray(keys.T)
    probs = jax.nn.softmax(jnp.asarray(rng.normal(size=(len(layers), 1, KEYS, config.num_experts)), jnp.float32))
    weights, experts = jax.lax.top_k(probs, config.top_k)
    outputs = [jnp.zeros((1, KEYS, config.top_k, config.hidden_size), jnp.float32)] * len(layers)
    every = jnp.ones(text.shape, bool)
    rows = find_rows(KeyIndex.build(known.keys), text, (1,))
    known = stats.absorb(stats.update(stats.init(known), rows, probs, every), known)
    rows = find_rows(KeyIndex.build(said.keys), text, said.ngram_orders)
    said = answers.absorb(answers.update(answers.init(said), rows, outputs, Routing(experts, weights), every), said)
    policy = varjax.LayerPolicy(experts_kept=1, ngram_orders=(1,))
    var_config = VARConfig(frequency_threshold=1, entropy_threshold=10.0, default=policy, cache_size=0)
    table = varjax.build_table(var_config, known, said, top_k=config.top_k)
    state, settings = step.init(table, var_config, batch), step.Settings.of(var_config, len(layers))
    given = on_device((params, table, state, ids, mask, step.timestamp(0.0), settings))
    return routed_forward.lower(*given, kv=on_device(kv), network=network, last_logits_only=True)


def collecting(config: MoEConfig, *, experts: bool, batch: int = 8, length: int = 512) -> Any:
    """A batch of a pass of phase 1, of the statistics, or of the experts' answers."""
    params, network = _model(config)
    layers, keys = tuple(range(config.num_layers)), np.arange(KEYS, dtype=np.int32)[:, None]
    sums: PassSums[Any, Any]
    window: Any
    if experts:
        said = Answers.empty(keys, layers, config.num_experts, config.hidden_size)
        keys, window = said.keys, answers.init(said)
        sums = PassSums("answers", answers.init, answers.update, answers.absorb, said.ngram_orders, layers, True)
    else:
        window = stats.init(RoutingStats.empty(keys, (1,), len(layers), config.num_experts))
        sums = PassSums("statistics", stats.init, stats.update, stats.absorb, (1,), layers)
    mesh = make_mesh("data=1", [device()])
    whole = on_device(((KeyIndex.build(keys), jnp.zeros(1, jnp.int32), ()), params), NamedSharding(mesh, passes._WHOLE))
    windows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), window)
    ids, mask = (jax.ShapeDtypeStruct((batch, length), kind) for kind in (jnp.int32, jnp.bool))
    windows, ids, mask = on_device((windows, ids, mask), NamedSharding(mesh, passes._SPLIT))
    return passes._step.lower(windows, *whole, ids, mask, sums=sums, network=network, mesh=mesh)


def _model(config: MoEConfig) -> tuple[Any, Network]:
    """Parameters in bfloat16 as shapes, and the network that reads them."""
    engine = get_engine("pallas")
    params = jax.eval_shape(lambda: prepare(init_params(config, jax.random.key(0), jnp.bfloat16), engine))
    return params, Network(config, engine)


def _texts(config: MoEConfig, batch: int, length: int, slots: int) -> tuple[Any, Any, Any]:
    """An empty cache, ids and mask, as shapes."""
    kv = jax.eval_shape(lambda: KVCache.empty(config, batch, slots, jnp.bfloat16))
    return kv, *(jax.ShapeDtypeStruct((batch, length), kind) for kind in (jnp.int32, jnp.bool))


if __name__ == "__main__":
    main()
