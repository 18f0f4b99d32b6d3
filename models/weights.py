"""Hugging Face safetensors in and out, by one table and a strict ledger.

`_TABLE` maps each parameter of the canonical tree (`models.decoder`) to its published name; the ledger, derived from
the declared shapes, says which tensors a checkpoint must hold. Every tensor of the files must match exactly one row:
missing, surplus and misshapen ones are all named in one error before anything is read. Linear kernels are stored
transposed, [in, out] here and [out, in] on disk.

Format: https://huggingface.co/docs/safetensors; sharded checkpoints carry a `model.safetensors.index.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import MoEConfig, config_to_hf
from models.decoder import Params, init_params
from varjax.files import replacing

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

# canonical path, {} standing for a layer or expert number -> (published name, stored transposed)
_TABLE = {
    "decoder/embed/embedding": ("model.embed_tokens.weight", False),
    "decoder/layers/{}/input_norm/weight": ("model.layers.{}.input_layernorm.weight", False),
    "decoder/layers/{}/attention/q_proj/kernel": ("model.layers.{}.self_attn.q_proj.weight", True),
    "decoder/layers/{}/attention/k_proj/kernel": ("model.layers.{}.self_attn.k_proj.weight", True),
    "decoder/layers/{}/attention/v_proj/kernel": ("model.layers.{}.self_attn.v_proj.weight", True),
    "decoder/layers/{}/attention/o_proj/kernel": ("model.layers.{}.self_attn.o_proj.weight", True),
    "decoder/layers/{}/expert_norm/weight": ("model.layers.{}.post_attention_layernorm.weight", False),
    "decoder/layers/{}/gate/kernel": ("model.layers.{}.block_sparse_moe.gate.weight", True),
    "experts/{}/{}/gate": ("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", True),
    "experts/{}/{}/down": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", True),
    "experts/{}/{}/up": ("model.layers.{}.block_sparse_moe.experts.{}.w3.weight", True),
    "decoder/norm/weight": ("model.norm.weight", False),
    "decoder/head/kernel": ("lm_head.weight", True),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded faithfully; names file, tensor and mend."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the ledger."""

    path: tuple[Any, ...]  # in the canonical tree
    shape: tuple[int, ...]  # on disk
    transposed: bool


def ledger(config: MoEConfig) -> dict[str, Entry]:
    """Published name -> where it belongs and its shape on disk, for every tensor of a checkpoint of this config."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    entries = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key if isinstance(key, jax.tree_util.DictKey) else key.idx for key in keys)
        numbers = [part for part in path if isinstance(part, int)]
        template = "/".join("{}" if isinstance(part, int) else part for part in path)
        name, transposed = _TABLE[template]
        entries[name.format(*numbers)] = Entry(path, leaf.shape[::-1] if transposed else leaf.shape, transposed)
    return entries


def load_params(directory: Path, config: MoEConfig, dtype: Any = jnp.float32) -> tuple[Params, str]:
    """Canonical parameters of the checkpoint in `directory`, and its fingerprint.

    Tensors travel one at a time, so the host never holds more than the parameters and one tensor. The fingerprint is a
    SHA-256 over every tensor's name, shape and a sample of its stored values: it tells checkpoints apart, whatever
    directory they lie in and whatever dtype they are loaded in.

    Raises CheckpointError naming every missing, surplus or misshapen tensor, or the first unreadable or non-finite one.
    """
    expected = ledger(config)
    files = _locate_tensors(directory)
    _check_ledger(directory, expected, files)
    params: Params = {"decoder": {}, "experts": [{} for _ in range(config.num_layers)]}
    digest = hashlib.sha256()
    for name in sorted(expected):
        entry, tensor = expected[name], _read(files[name], name)
        _add_to_fingerprint(digest, name, tensor)
        # Minimum and maximum carry a NaN or an infinity along, without a mask as large as the tensor.
        if not (np.isfinite(tensor.min()) and np.isfinite(tensor.max())):
            raise CheckpointError(f"{files[name]}: {name} holds NaN or infinite values; fetch or save the file again")
        array = jnp.asarray(np.ascontiguousarray(tensor.T if entry.transposed else tensor), dtype)
        _insert(params, entry.path, array)
    return params, digest.hexdigest()


def save_params(
    directory: Path, params: Params, config: MoEConfig, dtype: str = "float32", shard_bytes: int = 5 << 30
) -> None:
    """Write canonical parameters and `config.json` so that this library and transformers open the directory.

    Each file is written whole or not at all; the config comes last. More than `shard_bytes` go into numbered shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = ledger(config)
    itemsize = jnp.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        size = int(np.prod(entry.shape)) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for index, names in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _to_disk(_lookup(params, entries[name].path), entries[name], dtype) for name in names}
        with replacing(directory / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(int(np.prod(entry.shape)) * itemsize for entry in entries.values())
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(directory / "config.json", config_to_hf(config, dtype))


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=2) + "\n")


def _locate_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file."""
    index = directory / INDEX_FILE
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"{index} has no readable weight_map ({error!r}); fetch the file again") from None
        files = {directory / file for file in weight_map.values()}
    else:
        files = {directory / SINGLE_FILE}
    absent = sorted(str(file) for file in files if not file.exists())
    if absent:
        raise CheckpointError(
            f"{directory}: weight file(s) missing: {', '.join(absent)}; fetch them (safetensors only)"
        )
    return {name: file for file in sorted(files) for name in _names(file)}


def _names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _check_ledger(directory: Path, expected: dict[str, Entry], files: dict[str, Path]) -> None:
    faults = [f"missing {name}" for name in expected if name not in files]
    faults += [f"surplus {name} in {files[name].name}" for name in files if name not in expected]
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            for name in sorted(tensors.keys()):
                shape = tuple(tensors.get_slice(name).get_shape())
                if name in expected and shape != expected[name].shape:
                    faults.append(f"{name} in {file.name} has shape {shape}, expected {expected[name].shape}")
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(
            f"{directory}: the tensors do not match config.json; fix it or fetch the checkpoint again:\n  {shown}"
        )


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """`safe_open` whose errors name the file. Closed after each tensor: an open mapping keeps read pages resident."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not safetensors ({error}); fetch the file again") from None


def _read(file: Path, name: str) -> np.ndarray:
    with _open(file) as tensors:
        return tensors.get_tensor(name)


def _add_to_fingerprint(digest: Any, name: str, tensor: np.ndarray) -> None:
    flat = tensor.reshape(-1)
    sample = np.ascontiguousarray(flat[:: max(1, flat.size // 1024)])
    digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
    digest.update(sample.view(np.uint8))


def _to_disk(array: jax.Array, entry: Entry, dtype: str) -> np.ndarray:
    host = np.asarray(array.astype(dtype))
    return np.ascontiguousarray(host.T if entry.transposed else host)


def _insert(params: Params, path: tuple[Any, ...], value: jax.Array) -> None:
    node = params
    for part in path[:-1]:
        node = node[part] if isinstance(node, list) else node.setdefault(part, {})
    node[path[-1]] = value


def _lookup(params: Params, path: tuple[Any, ...]) -> jax.Array:
    node: Any = params
    for part in path:
        node = node[part]
    return node
