"""Hugging Face safetensors in and out, by one table and a strict ledger.

A family's table (`models.families`) maps each parameter of the canonical tree (`models.parameters`) to its published
name; the ledger, derived from the declared shapes, says which tensors a checkpoint must hold. Every tensor of the files
must match exactly one row: missing, surplus and misshapen ones are all named in one error before anything is read.
Linear kernels are stored transposed, [in, out] here and [out, in] on disk. Reading and writing are one tensor or one
file at a time; for several devices each one's slice of a tensor is read.

Format: https://huggingface.co/docs/safetensors; sharded checkpoints carry a `model.safetensors.index.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import MoEConfig, config_to_hf
from models.families import COMMON_TENSORS, FAMILIES
from models.parameters import Params, init_params, param_shardings
from models.placement import ONE_DEVICE, Placement
from varjax import checksums
from varjax.errors import InputError
from varjax.files import replacing

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
BLOCK_BYTES = 1 << 24  # read at a time where a tensor is only hashed

_STORED = ("F32", "BF16", "F16")  # safetensors' names of the dtypes that hold weights; others hold quantised ones
# What decides the maths beside the tensors and is not seen in their shapes.
_MATHS = ("num_heads", "num_kv_heads", "head_dim", "top_k", "rope_theta", "rms_norm_eps", "sliding_window")
_MORE_MATHS = ("clip_qkv", "normalise_top_k")  # counted where they are not the usual, so that older prints stand


class CheckpointError(InputError):
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
    table = {**COMMON_TENSORS, **FAMILIES[config.family].tensors}
    entries = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key if isinstance(key, jax.tree_util.DictKey) else key.idx for key in keys)
        numbers = [part for part in path if isinstance(part, int)]
        template = "/".join("{}" if isinstance(part, int) else part for part in path)
        if path[0] == "experts":  # counted over the layers that have some; published, over all
            numbers[0] = config.expert_layers[numbers[0]]
        if template not in table:
            raise CheckpointError(f"the {config.family} format has no tensor for {template}; choose another family")
        name, transposed = table[template]
        entries[name.format(*numbers)] = Entry(path, leaf.shape[::-1] if transposed else leaf.shape, transposed)
    return entries


def load_params(
    directory: Path, config: MoEConfig, dtype: Any = jnp.float32, placement: Placement = ONE_DEVICE
) -> tuple[Params, str]:
    """Canonical parameters of the checkpoint in `directory`, where `placement` puts them, and its fingerprint.

    Tensors travel one at a time, so the host never holds more than one beside what lies on the devices; of several
    devices each gets its slice, read by itself. The fingerprint is a SHA-256 of every tensor's name, shape and stored
    bytes and of what the config adds to their maths: it tells models apart, wherever they lie, however they are sharded
    and whatever dtype they are loaded in. The same weights stored in another dtype are another checkpoint.

    Raises CheckpointError naming every missing, surplus, repeated or misshapen tensor, or the first unreadable or
    non-finite one.
    """
    expected = ledger(config)
    files = locate_tensors(directory, expected)
    shardings = param_shardings(config, placement)
    params: Params = {"decoder": {}, "experts": [{} for _ in range(config.num_layers)]}
    digest = hashlib.sha256(repr(_maths(config)).encode())
    for name in sorted(expected):
        entry = expected[name]
        where = _lookup(shardings, entry.path)
        with _open(files[name]) as tensors:
            if where is None:
                stored = tensors.get_tensor(name)
                _hash(digest, name, entry, [stored])
                stored = jax.device_put(stored)
            else:
                slices = tensors.get_slice(name)
                _hash(digest, name, entry, _blocks(slices, entry))
                stored = _distribute(slices, entry, where)
        array, finite = _place(stored, entry.transposed, jnp.dtype(dtype), where)
        if not finite:
            raise CheckpointError(f"{files[name]}: {name} holds NaN or infinite values; fetch or save the file again")
        _insert(params, entry.path, array)
    return params, digest.hexdigest()


def _maths(config: MoEConfig) -> list[Any]:
    usual = {field.name: field.default for field in dataclasses.fields(MoEConfig)}
    more = {name: getattr(config, name) for name in _MORE_MATHS if getattr(config, name) != usual[name]}
    return [*(getattr(config, name) for name in _MATHS), *more.items()]


def save_params(
    directory: Path, params: Params, config: MoEConfig, dtype: str = "float32", shard_bytes: int = 5 << 30
) -> None:
    """Write canonical parameters and `config.json` so that this library and transformers open the directory.

    Files of tensors carry a checksum (`varjax.checksums`), which loading verifies. More than `shard_bytes` go into
    numbered shards. No file takes its place before all are written: a call that is
    interrupted before leaves the directory as it was, one that is interrupted later leaves files of both checkpoints. A
    checkpoint that was there before is replaced, its other shards removed.
    """
    entries = ledger(config)
    sizes = {name: math.prod(entry.shape) * jnp.dtype(dtype).itemsize for name, entry in entries.items()}
    shards = _shards(sizes, shard_bytes)
    with ExitStack() as files:  # files take their places in reverse order: the config comes last

        def write(name: str) -> Path:
            return files.enter_context(replacing(directory / name))

        write("config.json").write_text(json.dumps(config_to_hf(config, dtype), indent=2) + "\n")
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write(INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for file, names in shards.items():
            tensors = {name: _to_disk(_lookup(params, entries[name].path), entries[name], dtype) for name in names}
            path = write(file)
            save_file(tensors, path, metadata={"format": "pt", **checksums.SEALED})
            checksums.seal(path)
    # What is left of an earlier checkpoint would be read in place of this one.
    written = {*shards, *([INDEX_FILE] if len(shards) > 1 else [])}
    for path in [directory / SINGLE_FILE, directory / INDEX_FILE, *directory.glob("model-*-of-*.safetensors")]:
        if path.name not in written:
            path.unlink(missing_ok=True)


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> its tensors, in order, each file of at most `limit` bytes or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def locate_tensors(directory: Path, expected: dict[str, Entry]) -> dict[str, Path]:
    """Tensor name -> file, after every tensor of every file has found its row in the ledger."""
    located: dict[str, Path] = {}
    faults = []
    for file in tensor_files(directory):
        _verify(file)
        with _open(file) as tensors:
            for name in sorted(tensors.keys()):
                stored = tensors.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if name not in expected:
                    faults.append(f"surplus {name} in {file.name}")
                elif name in located:
                    faults.append(f"{name} is in {located[name].name} and again in {file.name}")
                elif shape != expected[name].shape:
                    faults.append(f"{name} in {file.name} has shape {shape}, expected {expected[name].shape}")
                elif dtype not in _STORED:
                    faults.append(f"{name} in {file.name} is stored as {dtype}, expected one of {', '.join(_STORED)}")
                located[name] = file
    faults += [f"missing {name}" for name in expected if name not in located]
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(
            f"{directory}: the tensors do not match config.json; fix it or fetch the checkpoint again:\n  {shown}"
        )
    return located


def tensor_files(directory: Path) -> list[Path]:
    """The weight files: those of the index, or the single one."""
    index = directory / INDEX_FILE
    names = {SINGLE_FILE}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            if not all(name == Path(name).name for name in names):
                raise InputError("a file outside the directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} has no readable weight_map ({error!r}); fetch the file again") from None
    absent = sorted(name for name in names if not (directory / name).exists())
    if absent:
        raise CheckpointError(
            f"{directory}: weight file(s) missing: {', '.join(absent)}; fetch them (safetensors only)"
        )
    return [directory / name for name in sorted(names)]


def _verify(file: Path) -> None:
    """Raise CheckpointError if the file has a checksum (`save_params` writes one) that is not that of its contents."""
    try:
        checksums.verify(file, "fetch or save the file again")
    except InputError as error:
        raise CheckpointError(str(error)) from None


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """`safe_open` whose errors name the file. Closed after each tensor: an open mapping keeps read pages resident."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not safetensors ({error}); fetch the file again") from None


def _hash(digest: Any, name: str, entry: Entry, blocks: Iterable[np.ndarray]) -> None:
    """Takes a tensor into the fingerprint, in one block or several along its first axis."""
    for number, block in enumerate(blocks):
        if number == 0:
            digest.update(f"{name} {entry.shape} {block.dtype}".encode())
        digest.update(block.reshape(-1).view(np.uint8).data)


def _blocks(slices: Any, entry: Entry) -> Iterator[np.ndarray]:
    """A tensor on the disk in blocks of about BLOCK_BYTES; safetensors wants no end beyond the last row."""
    rows = entry.shape[0]
    step = max(BLOCK_BYTES // (4 * math.prod(entry.shape[1:])), 1)
    return (slices[start : min(start + step, rows)] for start in range(0, rows, step))


def _distribute(slices: Any, entry: Entry, where: NamedSharding) -> jax.Array:
    """A tensor as it is on the disk, on several devices: each one's slice is read, and no more.

    Args:
        where: its place in the canonical layout.
    """
    axes = [*where.spec, *[None] * (len(entry.shape) - len(where.spec))]
    on_disk = NamedSharding(where.mesh, PartitionSpec(*(axes[::-1] if entry.transposed else axes)))
    return jax.make_array_from_callback(entry.shape, on_disk, lambda index: slices[index])


@partial(jax.jit, static_argnums=(1, 2, 3))
def _place(stored: Any, transposed: bool, dtype: jnp.dtype, where: NamedSharding | None) -> tuple[jax.Array, jax.Array]:
    """A stored tensor in the canonical layout on the device, and whether all of it is finite; in one pass.

    Args:
        where: it lies on several devices; None: on one.
    """
    array = (stored.T if transposed else stored).astype(dtype)
    if where is not None:
        array = jax.lax.with_sharding_constraint(array, where)
    return array, jnp.isfinite(array).all()


def _to_disk(array: jax.Array, entry: Entry, dtype: str) -> np.ndarray:
    host = np.asarray(array.astype(dtype))
    return np.ascontiguousarray(host.T if entry.transposed else host)


def _insert(params: Params, path: tuple[Any, ...], value: jax.Array) -> None:
    node = params
    for part in path[:-1]:
        node = node[part] if isinstance(node, list) else node.setdefault(part, {})
    node[path[-1]] = value


def _lookup(params: Params, path: tuple[Any, ...]) -> Any:
    node: Any = params
    for part in path:
        node = node[part]
    return node
