"""Time a model with random weights in transformers, with torch's grouped matrix products, for `benchmarks.device`.

    python -m benchmarks.torch_model '{"config": ..., "tokens": [1], "length": 8, ...}'

It runs in its own process because its weights and JAX's would not fit on a device together. It prints the seconds of
every round as JSON.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from analysis.command import program
from benchmarks import harness
from benchmarks.rivals import RivalError
from models.config import MoEConfig, config_from_hf, config_to_hf
from profiling.timing import compare


def obstacle() -> str | None:
    """Why there is nothing to compare with; None: there is."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch has no CUDA device"


def in_a_process(config: MoEConfig, timeout: float, **options: Any) -> dict[str, Any]:
    """`measure` in a new process, on its CUDA device.

    Raises RivalError with the end of what it said if it fails or takes more seconds than `timeout`.
    """
    asked = json.dumps({"config": config_to_hf(config, "bfloat16"), "device": "cuda", **options})
    command = [sys.executable, "-m", "benchmarks.torch_model", asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RivalError(f"transformers' model took more than {timeout:.0f} s") from None
    if done.returncode:
        raise RivalError(f"transformers' model failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument("asked", type=json.loads, help="the arguments of `measure`, with the model's config, as JSON")
    asked = options.parse_args(arguments).asked
    print(json.dumps(measure(config_from_hf(asked.pop("config")), **asked)))


def measure(
    config: MoEConfig,
    *,
    tokens: Sequence[int],
    length: int,
    cached: int,
    batches: Sequence[int],
    steps: int,
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """Seconds of each round by name: "experts/T" of one layer, "prefill", "decode/B" per step; and the peak of memory.

    Args:
        tokens: numbers T of tokens for one layer's experts, all K of each.
        length: positions of a prefill, one sequence, all logits.
        cached, batches, steps: positions before a decode, its numbers B of sequences, tokens that a timed run decodes.
        device: a torch device.
    """
    import torch
    import transformers

    # A random model must not stop early.
    fields = config_to_hf(dataclasses.replace(config, eos_token_id=None), "bfloat16")
    options = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm", "dtype": torch.bfloat16}
    with torch.device(device):
        asked = transformers.AutoConfig.for_model(**fields)
        model = transformers.AutoModelForCausalLM.from_config(asked, **options).eval()

    # Renamed during version 5.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def done(function: Callable[[], Any]) -> None:
        with torch.inference_mode():
            function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def text(batch: int, positions: int) -> Any:
        return torch.randint(3, config.vocab_size, (batch, positions), device=device)

    def experts(number: int) -> Callable[[], Any]:
        x = torch.randn(number, config.hidden_size, device=device, dtype=torch.bfloat16)
        chosen = torch.rand(number, config.num_experts, device=device).topk(config.top_k)
        weights = chosen.values.softmax(-1).to(torch.bfloat16)
        return lambda: model.model.layers[0].mlp.experts(x, chosen.indices, weights)

    def decoding(batch: int) -> Callable[[], Any]:
        cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            model(text(batch, cached), logits_to_keep=1, **{cache_name: cache})
        token = text(batch, 1)

        def run() -> None:
            for _ in range(steps):
                model(token, **{cache_name: cache})
            cache.crop(-steps)

        return run

    runs = {f"experts/{number}": experts(number) for number in tokens}
    prompt = text(1, length)
    runs["prefill"] = lambda: model(prompt, use_cache=False)
    runs |= {f"decode/{batch}": decoding(batch) for batch in batches}
    seconds = compare({name: partial(done, run) for name, run in runs.items()}, rounds)
    per_call = {name: own / (steps if name.startswith("decode") else 1) for name, own in seconds.items()}
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {"seconds": {name: own.tolist() for name, own in per_call.items()}, "peak_bytes": peak}


if __name__ == "__main__":
    main()
