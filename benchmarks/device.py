"""Measure the expert engine and a whole model on an accelerator, next to its ceilings and to other implementations.

    python -m benchmarks.device --output results/h200.json               # at most 8 minutes; --quick: 2

The parts are, in this order: the model in transformers with grouped products, in a separate process, where torch has a
CUDA device; the machine's ceilings; one layer's experts, ours and others', compared with one plain SwiGLU block with
the same number of operations, at several numbers of tokens, some of which keep only one expert; and a whole model with
the shape of Mixtral-8x7B and random bfloat16 weights, with as many layers as fit, plain and under VAR. Nothing is
installed. A part whose requirements are missing is skipped, and the file says why.

Our engine and the plain block, and plain and VAR, are timed in the same rounds; transformers is not, because both
models do not fit on a device together. Weights and text are random, so experts are used evenly, unlike with real
routers.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.command import name_argument, path_argument, program
from analysis.report.output import Output
from analysis.report.provenance import provenance, write_json
from analysis.resampling import median_estimate
from benchmarks import experts, harness, torch_model
from benchmarks.rivals import RivalError, rivals
from models import Model, MoEConfig
from models.config import read_config
from models.experts import ENGINES, Engine, get_engine
from models.parameters import init_params
from profiling import ceilings
from profiling.costs import Mix, Workload, component_costs, parameters
from profiling.points import Point, Task, measure
from profiling.published import PUBLISHED, Hardware, ceiling
from profiling.timing import paired_ratio
from varjax.errors import InputError

DTYPE = "bfloat16"
FILLED = 0.85  # of a device's memory, by parameters: the rest is for activations, answers and two copies of a layer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured."""

    seconds: float  # after which no part begins
    rounds: int
    product: int  # rows and columns of the ceilings' square product on a GPU
    tokens: tuple[int, ...]  # of one layer
    single: tuple[float, ...]  # shares of these that keep one expert
    length: int  # of a prefill
    cached: int  # positions before a step of decoding
    batches: tuple[int, ...]  # sequences that are decoded
    mixes: tuple[str, ...]  # names of `profiling.points.policies`
    keys: int = 50  # contexts that VAR's table holds
    steps: int = 16  # tokens that a timed run decodes


FULL = Settings(
    seconds=330,
    rounds=9,
    product=8192,
    tokens=(1, 8, 64, 2048, 8192),
    single=(0.0, 0.25, 0.5, 0.75, 1.0),
    length=2048,
    cached=512,
    batches=(1, 8),
    mixes=("plain", "open", "one", "answers, rising"),
)
QUICK = dataclasses.replace(
    FULL,
    seconds=70,
    rounds=3,
    product=4096,
    tokens=(1, 64, 2048),
    single=(0.0, 0.5, 1.0),
    length=1024,
    batches=(1,),
    mixes=("plain", "one"),
)


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--output", type=path_argument, required=True, help="JSON file to write, or a directory for it"
    )
    options.add_argument("--quick", action="store_true", help="measure fewer shapes, mixes and rounds")
    options.add_argument(
        "--model",
        default="mixtral-8x7b",
        type=name_argument,
        help=f"shape of the model: {', '.join(PUBLISHED)}, or a config.json",
    )
    args = options.parse_args(arguments)
    # The memory is shared with a process of torch. JAX reads this when it begins.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = PUBLISHED[args.model] if args.model in PUBLISHED else read_config(Path(args.model))
    output = Output.of(args.output, "device", (".json",))
    with output.locked():
        write_json(output.main(".json"), run(config, QUICK if args.quick else FULL))
    print(f"written to {output.main('.json')}")


def run(config: MoEConfig, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All parts, as JSON can hold them; the keys are those of the parts, and "left_out", what -> why.

    An error in our own code is raised; a rival that fails is left out with its error.
    """
    began, device, left_out = time.monotonic(), jax.devices()[0], {}
    fitting = dataclasses.replace(config, num_layers=layers_that_fit(config, _memory(device)))
    result: dict[str, Any] = {"model": config, "layers": fitting.num_layers, "dtype": DTYPE, "settings": settings}
    result["engine"] = get_engine().name
    say(f"{device.device_kind}: {fitting.num_layers} of {config.num_layers} layers fit; engine {result['engine']}")
    if fitting.num_layers < config.num_layers:
        left_out["layers"] = f"{config.num_layers - fitting.num_layers}: the device has {_memory(device):,.0f} bytes"

    def part(name: str, measured: Callable[[], Any]) -> Any:
        if time.monotonic() - began > settings.seconds:
            left_out[name] = f"{settings.seconds:.0f} s were over"
            return None
        result[name] = measured()
        say(f"{name}: {time.monotonic() - began:.0f} s since the beginning")
        return result[name]

    reason = torch_model.obstacle()
    if reason is None:
        try:
            part("transformers", partial(_transformers, fitting, settings))
        except RivalError as error:
            reason = str(error)
    if reason is not None:
        left_out["transformers"] = reason
    on_gpu = device.platform == "gpu"
    found = ceilings.measure(not on_gpu, settings.rounds, size=settings.product if on_gpu else None)
    result["ceilings"] = found
    hardware = Hardware(
        device.device_kind, DTYPE, found.best("product", DTYPE), found.memory, _memory(device) or 0, "measured", True
    )
    obstacles = {name: one.obstacle(device) for name, one in ENGINES.items() if name != "reference"}
    left_out |= {name: why for name, why in obstacles.items() if why is not None}
    engines = {name: ENGINES[name] for name, why in obstacles.items() if why is None}
    others, missing = rivals(device)
    left_out |= missing
    for tokens in settings.tokens:
        part(f"experts/{tokens}", partial(_experts, config, settings, tokens, engines, others, hardware, left_out))
    model = random_model(fitting, get_engine())
    prefills = [Task(1, settings.length, policy=mix) for mix in settings.mixes]
    part("prefill", partial(_calls, model, prefills, settings, hardware))
    for batch in settings.batches:
        decodes = [Task(batch, 1, settings.cached, mix) for mix in settings.mixes]
        part(f"decode/{batch}", partial(_calls, model, decodes, settings, hardware))
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        result["peak_bytes"] = stats["peak_bytes_in_use"]
    else:
        left_out["peak_bytes"] = f"{device.device_kind} keeps no account of its memory"
    return result | {"left_out": left_out, "provenance": provenance(seed=0)}


def layers_that_fit(config: MoEConfig, memory: float | None, itemsize: int = 2) -> int:
    """How many of a model's layers fit into a number of bytes; all if the device does not say (None).

    Raises InputError if it does not hold one.
    """
    if memory is None:
        return config.num_layers
    one, two = (parameters(dataclasses.replace(config, num_layers=number)) * itemsize for number in (1, 2))
    most = int((FILLED * memory - one) // (two - one)) + 1
    if most < 1:
        raise InputError(f"one layer and the embeddings take {one:,} bytes, the device has {memory:,.0f}")
    return min(most, config.num_layers)


def random_model(config: MoEConfig, engine: Engine) -> Model:
    """Random weights, made on the device, a layer's experts at a time; norms are ones."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.dtype(DTYPE)))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = next(keys)
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return _random(key, leaf.shape, config.initializer_range)

    decoder = jax.tree.map(make, shapes["decoder"])
    # What the engine makes of a layer is waited for, so that the next one finds the room that this one leaves.
    experts = [jax.block_until_ready(engine.prepare(jax.tree.map(make, layer))) for layer in shapes["experts"]]
    return Model(config, {"decoder": decoder, "experts": experts}, engine, "random", "none")


@partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return jax.random.normal(key, shape, DTYPE) * jnp.asarray(scale, DTYPE)


def _memory(device: Any) -> float | None:
    """Bytes that the device lets JAX have; None if it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _transformers(config: MoEConfig, settings: Settings) -> dict[str, Any]:
    options = {name: getattr(settings, name) for name in ("tokens", "length", "cached", "batches", "steps", "rounds")}
    found = torch_model.in_a_process(config, timeout=settings.seconds / 2, **options)
    figures = {name: median_estimate(np.asarray(own)) for name, own in found["seconds"].items()}
    return {"seconds": figures, "peak_bytes": found["peak_bytes"]}


def _experts(
    config: MoEConfig,
    settings: Settings,
    tokens: int,
    engines: dict[str, Engine],
    others: dict[str, Engine],
    hardware: Hardware,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """One layer's experts on a number of tokens: one entry per engine and number of experts kept."""
    k = config.top_k
    routings = experts.cases(tokens, config.num_experts, k, [k - share * (k - 1) for share in settings.single])
    sizes = (config.hidden_size, config.intermediate_size, config.num_experts, DTYPE)
    seconds = experts.measure(routings, *sizes, engines, settings.rounds)
    for name, one in others.items():
        try:
            theirs = experts.measure(routings, *sizes, {name: one}, settings.rounds)
        except (RivalError, jax.errors.JaxRuntimeError) as error:  # it does not trace, or does not compile or run
            left_out[f"{name}/{tokens}"] = str(error)[:300]
            continue
        # Of rounds of its own, so each with the plain block of these.
        seconds |= {key: own for key, own in theirs.items() if key != "plain"}
        seconds[f"plain of {name}"] = theirs["plain"]
    found = []
    for name in (*engines, *others):
        for m, routing in routings.items():
            if f"{name}/{m}" not in seconds:
                continue
            own, plain = seconds[f"{name}/{m}"], seconds.get(f"plain of {name}", seconds["plain"])
            distinct = float(np.sum(np.unique(routing.experts) < config.num_experts))
            one_layer = dataclasses.replace(config, num_layers=1, dense_layers=())
            cost = component_costs(one_layer, Workload(1, tokens, itemsize=2), Mix(m, distinct))["experts"]
            found.append(
                {
                    "engine": name,
                    "experts_kept": m,
                    "single": (k - m) / (k - 1) if k > 1 else 0.0,
                    "seconds": median_estimate(own),
                    "of_plain": paired_ratio(own, plain),
                    "of_ceiling": ceiling({"experts": cost}, hardware) / float(np.median(own)),
                    "flops_per_second": cost.flops / float(np.median(own)),
                }
            )
    return found


def _calls(model: Model, wanted: list[Task], settings: Settings, hardware: Hardware) -> list[dict[str, Any]]:
    """Whole calls of a model, one entry per mix of tiers."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, model.config.vocab_size, 2 * settings.length + settings.cached + 64) for _ in range(4)]
    run_tokens = settings.steps * wanted[0].batch
    points = measure(model, wanted, texts, keys=settings.keys, repeats=settings.rounds, run_tokens=run_tokens)
    return [_entry(model.config, task, point, points[0], hardware) for task, point in zip(wanted, points, strict=True)]


def _entry(config: MoEConfig, task: Task, point: Point, plain: Point, hardware: Hardware) -> dict[str, Any]:
    least = ceiling(component_costs(config, point.workload, point.mix), hardware)
    return {
        "mix": task.policy,
        "experts": point.mix.experts,
        "distinct": point.mix.distinct,
        "seconds": {"value": point.seconds, "low": point.low, "high": point.high},
        "tokens_per_second": point.workload.tokens / point.seconds,
        "speedup": plain.seconds / point.seconds,
        "of_ceiling": least / point.seconds,
    }


if __name__ == "__main__":
    main()
