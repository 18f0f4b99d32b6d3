"""Train the small Mixtral-format reference model on the embedded corpus, and write its card.

A killed run continues from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from analysis.corpus import load_documents
from models.config import MoEConfig
from models.experts import get_engine
from models.training import TrainConfig, pack, train_steps
from models.weights import save_params

CONFIG = MoEConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=576,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    top_k=2,
    rope_theta=1e4,
    max_position_embeddings=256,
)


def main() -> None:
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/reference"), help="directory of the model")
    parser.add_argument("--checkpoints", type=Path, default=Path("results/train_reference"), help="for resuming")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size, help="sequences per step")
    parser.add_argument("--length", type=int, default=defaults.length, help="tokens per sequence")
    parser.add_argument("--learning_rate", type=float, default=defaults.learning_rate, help="peak")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    args = parser.parse_args()

    train = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        length=args.length,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    tokenizer = Tokenizer.from_file(str(args.output / "tokenizer.json"))
    documents = load_documents("embedded", split="train")
    encoded = tokenizer.encode_batch([document.text for document in documents])
    rows = pack([np.array([*item.ids, 2], np.int32) for item in encoded], train.length)
    engine = get_engine()
    print(f"{len(documents)} documents, {rows.shape[0]} rows of {train.length} tokens")
    steps = train_steps(CONFIG, train, engine, rows, args.checkpoints, args.save_every)
    with tqdm(steps, total=train.steps, unit="step", mininterval=10) as bar:
        for index, state, info in bar:
            if index % 20 == 0:
                bar.set_postfix(loss=f"{float(info.loss):.3f}", balance=f"{float(info.balance):.3f}", step=index)
            if index == train.steps:
                save_params(args.output, jax.device_get(state.params), CONFIG, dtype="bfloat16")


if __name__ == "__main__":
    main()
