"""Time this decoder against Hugging Face's eager Mixtral: same weights, same batch, interleaved, on the CPU.

    python -m benchmarks.huggingface

Requires torch (extra `test` or `gp`). Prefill reads a batch of whole texts; decode continues one text greedily with the
key/value cache. Prints the tokens per second of both, and their paired ratio with its interval.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from analysis.command import program
from benchmarks import harness
from models import Model, MoEConfig, load_model
from models.parameters import init_params
from models.weights import save_params
from profiling.timing import compare, paired_ratio

CONFIG = MoEConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    num_experts=8,
    top_k=2,
    eos_token_id=None,  # a random model must not stop early
)


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument("--batch", type=int, default=4, help="number of texts in the prefill")
    options.add_argument("--length", type=int, default=512, help="tokens per text")
    options.add_argument("--prompt", type=int, default=32, help="tokens of the prompt before decoding")
    options.add_argument("--new_tokens", type=int, default=32, help="tokens decoded per repeat")
    options.add_argument("--repeats", type=int, default=11, help="number of timed rounds")
    args = options.parse_args(arguments)

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        save_params(Path(folder), init_params(CONFIG, jax.random.key(0)), CONFIG)
        ours, theirs = load_model(folder, "float32"), load_huggingface(folder)
    ours = dataclasses.replace(ours, config=CONFIG)
    batch = rng.integers(3, CONFIG.vocab_size, (args.batch, args.length))
    prompt = rng.integers(3, CONFIG.vocab_size, (1, args.prompt))
    pairs = {
        "prefill": (batch.size, *prefill(ours, theirs, batch)),
        "decode": (args.new_tokens, *decode(ours, theirs, prompt, args.new_tokens)),
    }
    print(f"{harness.machine()}; float32, {args.repeats} interleaved repeats")
    print(f"{'':10}{'varjax, tokens/s':>18}{'HF eager, tokens/s':>20}{'varjax is faster by':>22}")
    for name, (tokens, mine, other) in pairs.items():
        seconds = compare({"varjax": mine, "huggingface": other}, args.repeats)
        rates = [tokens / np.median(seconds[side]) for side in ("varjax", "huggingface")]
        ratio = paired_ratio(seconds["huggingface"], seconds["varjax"])
        print(f"{name:10}{rates[0]:>18,.0f}{rates[1]:>20,.0f}{ratio.value:>9.2f}x  {harness.interval(ratio)}")


def load_huggingface(folder: str) -> Any:
    """The same directory in transformers, everything eager."""
    import transformers

    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": "float32"}
    return transformers.MixtralForCausalLM.from_pretrained(folder, **options).eval()


def prefill(ours: Model, theirs: Any, batch: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch

    ids = torch.tensor(batch)

    def other() -> None:
        with torch.inference_mode():
            theirs(ids)

    return lambda: ours(batch).logits, other


def decode(
    ours: Model, theirs: Any, prompt: np.ndarray, new_tokens: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch

    ids = torch.tensor(prompt)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def other() -> None:
        with torch.inference_mode():
            theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return lambda: ours.generate(prompt, new_tokens), other


if __name__ == "__main__":
    main()
