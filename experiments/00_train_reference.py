"""Train a small model on the embedded corpus, by default the Mixtral-format reference model, and write its card.

--config takes a config.json of any supported model family (see experiments/configs for examples). The model of
NAME.json is written to checkpoints/NAME unless you give --output. The tokenizer in --output is used; if there is none,
a tokenizer with the config's vocabulary size is trained. Rerun the same command to resume a killed run from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from analysis.checkpoints import note, resumed
from analysis.command import path_argument, program
from analysis.evaluate.losses import plain_runner, score
from analysis.report.output import DIRECTORY, Output
from analysis.report.provenance import provenance, write_json
from analysis.text.batches import batches
from analysis.text.card import named
from analysis.text.corpus import Document, corpus_hash, load_documents
from analysis.text.encoding import Encoded, encode
from analysis.text.ngram_baselines import ngram_losses
from experiments.arguments import HelpFormatter, add_mesh, add_options, asked_mesh
from models import Model, MoEConfig, load_model
from models.config import read_config
from models.experts import get_engine
from models.families import FAMILIES
from models.placement import Placement
from models.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from models.training import TrainConfig, pack, restore, train_steps
from models.weights import save_params
from varjax.errors import InputError
from varjax.files import replacing
from varjax.progress import progress_bar

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
OUTPUT = Path("models/reference")  # in the checkout


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_options(
        parser,
        ("config", path_argument, None, "shape of the model as a config.json (default: the reference model's)"),
        ("output", path_argument, None, "directory for the model (default: models/reference, or checkpoints/NAME)"),
        ("checkpoints", path_argument, None, "directory for checkpoints (default: results/train_NAME)"),
        ("steps", int, defaults.steps, "number of training steps"),
        ("batch_size", int, defaults.batch_size, "sequences per step"),
        ("length", int, defaults.length, "tokens per sequence"),
        ("learning_rate", float, defaults.learning_rate, "peak learning rate"),
        ("balance", float, defaults.balance, "weight of the load-balancing loss"),
        ("seed", int, defaults.seed, "random seed for the parameters and the order of the data"),
        ("save_every", int, 100, "steps between checkpoints"),
    )
    add_mesh(parser)
    args = parser.parse_args(arguments)

    config = CONFIG if args.config is None else read_config(args.config)
    output = args.output or (OUTPUT if args.config is None else Path("checkpoints") / args.config.stem)
    checkpoints = args.checkpoints or Path("results") / f"train_{output.name}"
    with Output.of(output, "model", DIRECTORY).locked():
        _make(args, config, output, checkpoints)


def _make(args: argparse.Namespace, config: MoEConfig, output: Path, checkpoints: Path) -> None:
    """Train the model, save it and write its card."""
    train = TrainConfig(
        args.steps, args.batch_size, args.length, args.learning_rate, balance=args.balance, seed=args.seed
    )
    texts = load_documents("embedded", split="train")
    documents, end = _tokenize(texts, config, output)
    work = {
        "config": dataclasses.asdict(config),
        "train": vars(train),
        "data_sha256": corpus_hash(one.id for one in texts),
    }
    if resumed(checkpoints / "run.json", work) is None:
        note(checkpoints / "run.json", work, {})
    rows = pack([np.append(document.ids, end) for document in documents], train.length)
    print(f"{len(documents):,} documents, {rows.shape[0]:,} rows of {train.length} tokens")
    placement = Placement.of(config, asked_mesh(args))
    steps = train_steps(config, train, get_engine(), rows, checkpoints, args.save_every, placement)
    with progress_bar(total=train.steps, unit="step", mininterval=10) as bar:
        for index, _, info in steps:
            bar.update(index - bar.n)  # a resumed run starts in the middle
            if index % 20 == 0:
                bar.set_postfix(loss=f"{float(info.loss):.3f}", balance=f"{float(info.balance):.3f}", step=index)
    save_params(output, restore(config, train, checkpoints, placement).params, config, dtype="bfloat16")
    _write_card(output, train, documents, texts, seen=train.steps * train.batch_size * train.length)


def _tokenize(texts: list[Document], config: MoEConfig, directory: Path) -> tuple[list[Encoded], int]:
    """Encode the texts with the directory's tokenizer, trained if there is none; and return the id that ends a text."""
    if load_tokenizer(directory) is None:
        trained = train_bpe((text.text for text in texts), config.vocab_size)
        save_tokenizer(trained, directory, config.max_position_embeddings)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None  # it was saved above
    if (config.bos_token_id, config.eos_token_id) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise InputError(
            f"bos_token_id and eos_token_id are {config.bos_token_id} and {config.eos_token_id}, but those of the "
            f"tokenizer in {directory} are {tokenizer.bos_token_id} and {tokenizer.eos_token_id}; correct --config"
        )
    return encode(texts, tokenizer, config), tokenizer.eos_token_id


def _described(texts: list[Document]) -> dict[str, Any]:
    """Describe the documents of a split, as `analysis.text.card` compares them with later ones."""
    ids = [one.id for one in texts]
    return {"documents": len(ids), "data_sha256": corpus_hash(ids), "document_ids": named(ids)}


def _write_card(
    directory: Path, train: TrainConfig, documents: list[Encoded], trained_on: list[Document], seen: int
) -> None:
    """Evaluate the saved model on the test split and describe it in `card.json` and `README.md`."""
    model = load_model(directory)
    texts = load_documents("embedded", split="test")
    held_out = encode(texts, model.tokenizer, model.config)
    scores, _ = score(plain_runner(model), None, held_out, batch_size=train.batch_size, max_length=train.length)
    card: dict[str, Any] = {
        "fingerprint": model.fingerprint,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "training": {**vars(train), "tokens_seen": seen, **_described(trained_on)},
        "test": {**scores.summary(), **_described(texts)},
        "nats_per_token": {"model": scores.nll_per_token, **ngram_losses(documents, held_out, model.config.vocab_size)},
        "expert_load": _expert_load(model, held_out, train).tolist(),
        "provenance": provenance(seed=train.seed),
    }
    write_json(directory / "card.json", card)
    text = _card_text(card, model.config, title="The reference model" if directory == OUTPUT else directory.name)
    with replacing(directory / "README.md") as temporary:
        temporary.write_text(text)
    print(text)


def _expert_load(model: Model, documents: list[Encoded], train: TrainConfig) -> np.ndarray:
    """float64 [L, E]: share of the assignments that each expert gets."""
    slots = model.config.num_experts + 1  # the last one counts the unused slots of padding
    load = np.zeros((model.config.num_layers, slots))
    for batch in batches(documents, train.batch_size, train.length):
        experts = np.asarray(model(batch.ids, batch.mask).routing.experts)
        load += np.stack([np.bincount(chosen.ravel(), minlength=slots) for chosen in experts])
    used = load[:, :-1]
    return used / used.sum(axis=1, keepdims=True)


def _card_text(card: dict[str, Any], config: MoEConfig, title: str) -> str:
    """The model card, Markdown."""
    training, test = card["training"], card["test"]
    perplexity = {name: math.exp(nats) for name, nats in card["nats_per_token"].items()}
    loads = "\n".join(
        f"| {layer} | " + " | ".join(f"{share:.1%}" for share in row) + " |"
        for layer, row in enumerate(card["expert_load"])
    )
    experts, architecture = config.num_experts, FAMILIES[config.family].architecture
    kind = architecture.removesuffix("ForCausalLM")
    return f"""# {title}

A small {kind} for trying varjax without a download: {card["parameters"] / 1e6:.1f} million parameters,
{config.depth} layers, hidden size {config.hidden_size}, {experts} experts of size {config.intermediate_size},
{config.top_k} experts per token, a byte-level BPE tokenizer with {config.vocab_size} entries, contexts of up to
{config.max_position_embeddings} tokens. `transformers.{architecture}` can load it as well. It was trained on the
prose of Python documentation and on nothing else. It is meant for studying routing, not for practical use.

- **Data**: the train split of the embedded corpus (docstrings of installed packages): {training["documents"]:,}
  documents, SHA-256 `{training["data_sha256"]}`.
- **Training**: `experiments/00_train_reference.py`, {training["steps"]:,} steps of {training["batch_size"]} x
  {training["length"]} tokens ({training["tokens_seen"] / 1e6:.1f} million in total), AdamW with a peak learning rate of
  {training["learning_rate"]:g}, load-balancing weight {training["balance"]:g}, seed {training["seed"]}.
- **Fingerprint**: `{card["fingerprint"]}`.

Held-out loss on the test split ({test["documents"]:,} documents, {test["tokens"]:,} tokens, windows of
{test["max_length"]}):

| | nats per token | perplexity per token |
|---|---|---|
| this model | {card["nats_per_token"]["model"]:.3f} | {perplexity["model"]:.1f} |
| bigram, absolute discounting | {card["nats_per_token"]["bigram"]:.3f} | {perplexity["bigram"]:.1f} |
| unigram | {card["nats_per_token"]["unigram"]:.3f} | {perplexity["unigram"]:.1f} |

The model's loss equals {test["bits_per_byte"]:.3f} bits per byte. The next table shows, for each layer (rows), the
share of the assignments that each expert (columns) receives:

| layer | {" | ".join(map(str, range(experts)))} |
|---|{"---|" * experts}
{loads}

Weights and tokenizer are under the MIT license, like varjax. The texts of the corpus belong to the
packages they come from.
"""


if __name__ == "__main__":
    main()
