"""A small random language model in a GGUF file, of the kind that `benchmarks.smollm2` reads."""

import json
from pathlib import Path

import gguf
import numpy as np

from models.tokenizer import train_bpe

HIDDEN, NEURONS, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 96, 2, 4, 2, 16, 320
SPECIAL = ("<unk>", "<s>", "</s>")
TEXTS = [f"the router finds expert {index} and  drops a layer, {index}{index} tokens at once" for index in range(60)]


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, as its converter makes it of Hugging Face's."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, pre: str = "smollm", without: str = "") -> None:
    """A random model of llama.cpp's architecture "llama", some of its tensors quantized."""
    rng, trained = np.random.default_rng(0), json.loads(train_bpe(TEXTS, VOCABULARY).to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    tokens += [f"unused{index}" for index in range(VOCABULARY - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in trained["merges"]])
    for index, name in enumerate(("unk", "bos", "eos")):
        getattr(writer, f"add_{name}_token_id")(index)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        of_layer = {
            **{"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD_DIM, HIDDEN)},
            **{"attn_k": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN)},
            **{"attn_output": (HIDDEN, HEADS * HEAD_DIM), "ffn_gate": (NEURONS, HIDDEN)},
            **{"ffn_up": (NEURONS, HIDDEN), "ffn_down": (HIDDEN, NEURONS)},
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        array = rng.normal(1 if name.endswith("norm") else 0, 0.2, shape).astype(np.float32)
        if f"{name}.weight" == without:
            continue
        if "attn_q" in name or "attn_k" in name:
            array = permute(array, HEADS if "attn_q" in name else KV_HEADS)
        kind = gguf.GGMLQuantizationType.Q4_1 if "ffn" in name and "norm" not in name else None
        stored = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
