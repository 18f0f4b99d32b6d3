"""Checkpoints in Hugging Face's safetensors format: reading, writing, and the check that every tensor is there.

The ledger (`ledger`) lists every tensor that a checkpoint must hold, from the declared parameters
(`models.parameters`) and the published names of the family (`models.families`). Every tensor of the files must match
exactly one entry, before any weights are read. Linear kernels are stored transposed, [in, out] here and [out, in] on
disk. Experts may also be stored stacked, as transformers 5 does with `save_original_format=False`; only the published
layout is written.

Format: https://huggingface.co/docs/safetensors; sharded checkpoints have a `model.safetensors.index.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from models.config import MoEConfig, config_to_hf
from models.families import COMMON_TENSORS, FAMILIES, STACKED_EXPERTS
from models.fields import read_object, shown
from models.generation import GENERATION_FILE, GenerationDefaults, generation_to_hf
from models.memory import check_memory, device_bytes
from models.parameters import Params, param_shapes, param_shardings
from models.placement import ONE_DEVICE, Placement
from varjax import checksums
from varjax.errors import InputError
from varjax.files import replacing

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
STORED_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # safetensors' name of a dtype of weights -> bytes; others are quantized

_HEAD, _EMBEDDING = (COMMON_TENSORS[path][0] for path in ("decoder/head/kernel", "decoder/embed/embedding"))
_BLOCK_BYTES = 1 << 24  # read at a time where a tensor is only hashed
# Fields that change the result without changing a tensor's shape; the fingerprint covers them.
_MATHS = ("num_heads", "num_kv_heads", "head_dim", "top_k", "rope_theta", "rms_norm_eps", "sliding_window")
# These are covered only where they are not the default, and under the names of their first release, because a
# fingerprint must never change.
_MORE_MATHS = {"clip_qkv": "clip_qkv", "normalize_top_k": "normalise_top_k"}

Headers = dict[Path, dict[str, tuple[tuple[int, ...], str]]]  # weight file -> stored tensor -> shape, safetensors dtype


class CheckpointError(InputError):
    """A checkpoint that cannot be loaded faithfully. The message names the file, the tensor and the fix."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one tensor of a checkpoint is stored."""

    shape: tuple[int, ...]  # on disk
    transposed: bool  # the parameter is the transpose of the stored tensor


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor of the ledger is stored: a whole stored tensor, or some rows of one expert in a stacked one."""

    file: Path
    stored: str  # its name there
    expert: int | None = None  # None: the whole tensor
    start: int = 0  # first of its rows

    def slices(self, tensors: Any, entry: Entry) -> Any:
        """An object that reads slices of the tensor, from an open file."""
        stored = tensors.get_slice(self.stored)
        return stored if self.expert is None else _Rows(stored, self.expert, self.start, entry.shape[0])


@lru_cache(maxsize=8)
def ledger(config: MoEConfig) -> dict[str, Entry]:
    """List every tensor that a checkpoint of this architecture holds.

    Args:
        config: the architecture.

    Returns:
        Published name -> shape and orientation, in the order of the parameters' leaves. Do not modify it: it is cached.

    Raises:
        CheckpointError: the family's format has no name for a parameter.
    """
    table = {**COMMON_TENSORS, **FAMILIES[config.family].tensors}
    entries = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        path = [key.key if isinstance(key, jax.tree_util.DictKey) else key.idx for key in keys]
        numbers = [part for part in path if isinstance(part, int)]
        template = "/".join("{}" if isinstance(part, int) else part for part in path)
        if path[0] == "experts":  # numbered over the layers with experts here, over all layers in the files
            numbers[0] = config.expert_layers[numbers[0]]
        if template not in table:
            raise CheckpointError(f"the {config.family} format has no tensor for {template}; choose another family")
        name, transposed = table[template]
        entries[name.format(*numbers)] = Entry(leaf.shape[::-1] if transposed else leaf.shape, transposed)
    return entries


def load_params(
    directory: Path, config: MoEConfig, dtype: Any = jnp.float32, placement: Placement = ONE_DEVICE
) -> tuple[Params, str]:
    """Load the parameters of a checkpoint and compute its fingerprint.

    Tensors are moved to the devices one at a time, and each device's slice is read by itself. The fingerprint is the
    SHA-256 of every tensor's name, shape and stored bytes and of the config fields that affect the result, whatever the
    sharding, the devices and `dtype`.

    Args:
        directory: the folder with the safetensors files.
        config: the architecture of the checkpoint.
        dtype: of the loaded parameters.
        placement: the devices that they are divided over.

    Returns:
        The parameters in the canonical layout (`models.parameters`), and the fingerprint in hexadecimal.

    Raises:
        CheckpointError: tensors are missing, surplus, repeated, misshapen, unreadable or not finite.
        InputError: the parameters are larger than the devices; no tensor was read.
    """
    places, entries = locate_tensors(read_headers(directory), config), ledger(config)
    limit = min(map(device_bytes, placement.local_devices), default=math.inf)
    check_memory(config, jnp.dtype(dtype).name, placement, limit)
    shardings = jax.tree.leaves(param_shardings(config, placement), is_leaf=lambda leaf: leaf is None)
    targets = dict(zip(entries, shardings, strict=True))
    digest = hashlib.sha256(repr(_maths(config)).encode())
    arrays = {}
    for name in sorted(entries):
        entry, where, file = entries[name], targets[name], places[name].file
        with _open(file) as tensors:
            slices = places[name].slices(tensors, entry)
            if where is None:
                stored = slices[:]
                _hash(digest, name, entry, [stored])
                stored = jax.device_put(stored)
            else:
                _hash(digest, name, entry, _blocks(slices, entry.shape))
                stored = _distribute(slices, entry, where)
        arrays[name], finite = _to_device(stored, entry.transposed, jnp.dtype(dtype), where)
        if not finite:
            raise CheckpointError(f"{file}: {name} holds NaN or infinite values; fetch or save the file again")
    params = jax.tree.unflatten(jax.tree.structure(param_shapes(config)), [arrays[name] for name in entries])
    return params, digest.hexdigest()


def _maths(config: MoEConfig) -> list[Any]:
    default = {field.name: field.default for field in dataclasses.fields(MoEConfig)}
    changed = [name for name in _MORE_MATHS if getattr(config, name) != default[name]]
    return [getattr(config, name) for name in _MATHS] + [(_MORE_MATHS[name], getattr(config, name)) for name in changed]


def save_params(
    directory: Path,
    params: Params,
    config: MoEConfig,
    dtype: str = "float32",
    shard_bytes: int = 5 << 30,
    generation: GenerationDefaults | None = None,
) -> None:
    """Write a checkpoint that this library and transformers can open.

    An earlier checkpoint in the directory is replaced, after all new files are written: an interruption before that
    leaves the directory as it was, a later one leaves files of both checkpoints.

    Args:
        directory: the folder to write to.
        params: parameters in the canonical layout.
        config: their architecture.
        dtype: of the stored weights.
        shard_bytes: the largest size of a weight file.
        generation: for `generation_config.json`; None, or what the config says anyway: no such file.

    Raises:
        ConfigError: the family's format cannot express the architecture.
        CheckpointError: the family's format has no name for a parameter.
        OSError: a file cannot be written.
    """
    entries = ledger(config)
    leaves = dict(zip(entries, jax.tree.leaves(params), strict=True))
    shards = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: math.prod(entry.shape) * jnp.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    computed = jax.tree.leaves(params)[0].dtype.name  # opened again, the model is to compute what it computes now
    texts: dict[str, dict[str, Any]] = {"config.json": config_to_hf(config, computed)}
    if generation not in (None, GenerationDefaults.of(config)):
        texts[GENERATION_FILE] = generation_to_hf(generation)
    if shards.is_sharded:
        texts[INDEX_FILE] = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    with ExitStack() as files:  # files are replaced in reverse order, so the config comes last
        for file, fields in texts.items():
            files.enter_context(replacing(directory / file)).write_text(json.dumps(fields, indent=2) + "\n")
        for file, names in shards.filename_to_tensors.items():
            tensors = {name: _to_disk(leaves[name], entries[name], dtype) for name in names}
            checksums.write_safetensors(files.enter_context(replacing(directory / file)), tensors, {"format": "pt"})
    # Files of an earlier checkpoint would otherwise be read together with these.
    single = [directory / name for name in (SINGLE_FILE, INDEX_FILE, GENERATION_FILE)]
    for path in [*single, *directory.glob("model-*-of-*.safetensors")]:
        if path.name not in texts.keys() | shards.filename_to_tensors.keys():
            path.unlink(missing_ok=True)


def read_headers(directory: Path) -> Headers:
    """Read which tensors the weight files hold, after verifying the checksums of files that have one.

    Args:
        directory: the folder with the safetensors files.

    Returns:
        Weight file -> name of each stored tensor, sorted -> its shape and safetensors dtype.

    Raises:
        CheckpointError: a weight file or the index is missing, damaged or ambiguous.
    """
    files, headers, faults = _tensor_files(directory), {}, []
    for file in files:
        checksums.verify(file, "fetch or save the file again", error=CheckpointError)
    for file in files:
        try:
            with _open(file) as tensors:
                slices = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
                headers[file] = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return headers


def locate_tensors(headers: Headers, config: MoEConfig) -> dict[str, _Place]:
    """Match every stored tensor with an entry of the ledger.

    Args:
        headers: of the weight files (`read_headers`).
        config: the architecture that the checkpoint is to have.

    Returns:
        Name in the ledger -> where the tensor is stored.

    Raises:
        CheckpointError: names every tensor that is missing, surplus, repeated, misshapen or quantized.
    """
    _check_counts(headers, config)
    expected, forms = ledger(config), _forms(config)
    located: dict[str, _Place] = {}
    faults = []
    second: _Place | None = None  # a copy of the embedding stored as the head, where both share their weights
    for file, tensors in headers.items():
        for name, (shape, dtype) in tensors.items():
            should, parts = forms.get(name, (shape, {}))
            copy = name == _HEAD and name not in expected
            repeated = [part for part in parts if part in located and not copy]
            if not parts:
                faults.append(f"surplus {name} in {file.name}")
            elif shape != should:
                faults.append(f"{name} in {file.name} has shape {shape}, expected {should}")
            elif dtype not in STORED_BYTES:
                known = ", ".join(STORED_BYTES)
                faults.append(f"{name} in {file.name} is stored as {dtype}, expected one of {known}")
            elif repeated:
                faults.append(f"{repeated[0]} is in {located[repeated[0]].file.name} and again in {file.name}")
            if copy:
                second = _Place(file, name)
            else:
                located |= {part: _Place(file, name, *rows) for part, rows in parts.items()}
    if second is not None:
        located.setdefault(_EMBEDDING, second)
        if not faults and not _equal(located[_EMBEDDING], second):
            faults.append(
                f"{_HEAD} in {second.file.name} is not {_EMBEDDING}, but config.json says tie_word_embeddings true; "
                "set it to false if the head has weights of its own"
            )
    missing = [name for name in expected if name not in located]
    untied = " (if the head shares the embedding's weights, set tie_word_embeddings to true)"
    faults += [f"missing {name}{untied if name == _HEAD else ''}" for name in missing]
    if faults:
        told = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(
            f"{_directory(headers)}: the tensors do not match config.json; fix it or fetch the checkpoint again:\n"
            f"  {told}"
        )
    return located


def _directory(headers: Headers) -> Path:
    return next(iter(headers)).parent


def _check_counts(headers: Headers, config: MoEConfig) -> None:
    """Refuse a config with more layers or experts than the files, before the ledger gets an entry for each of them."""
    family = FAMILIES[config.family]
    gate = family.tensors["decoder/layers/{}/gate/kernel"][0]
    gates = {name.format(config.expert_layers[0]) for name in (gate, family.renamed.get(gate, gate))}
    layers = 0
    for file, tensors in headers.items():
        for name, (shape, _) in tensors.items():
            if match := re.match(r"model\.layers\.(\d{1,9})\.", name):
                layers = max(layers, int(match[1]) + 1)
            if name in gates and len(shape) == 2 and config.num_experts > shape[0]:
                raise CheckpointError(
                    f"{file.parent}: config.json says {config.num_experts} experts per layer, but {name} in "
                    f"{file.name} has {shape[0]}; use the config.json that belongs to the weights"
                )
    if config.depth > layers:
        raise CheckpointError(
            f"{_directory(headers)}: config.json says num_hidden_layers {config.depth}, the weight files hold {layers} "
            "layers; use the config.json that belongs to the weights, or fetch what is missing"
        )


def _forms(config: MoEConfig) -> dict[str, tuple[tuple[int, ...], dict[str, tuple[int | None, int]]]]:
    """Every name under which a tensor may be stored -> its shape, and the tensors of the ledger in it.

    Each of these has the index of its expert in a stacked tensor and its first row there; None and 0: it is the whole.
    """
    expected, family = ledger(config), FAMILIES[config.family]
    forms: dict[str, Any] = {name: (entry.shape, {name: (None, 0)}) for name, entry in expected.items()}
    if config.tie_word_embeddings:
        forms[_HEAD] = forms[_EMBEDDING]
    for layer in config.expert_layers:
        for template, other in family.renamed.items():
            forms[other.format(layer)] = forms[template.format(layer)]
        for template, kinds in STACKED_EXPERTS.items():
            parts: dict[str, tuple[int | None, int]] = {}
            rows = columns = 0
            for kind in kinds:
                name = family.tensors[f"experts/{{}}/{{}}/{kind}"][0]
                parts |= {name.format(layer, expert): (expert, rows) for expert in range(config.num_experts)}
                more, columns = expected[name.format(layer, 0)].shape
                rows += more
            forms[template.format(layer)] = (config.num_experts, rows, columns), parts
    return forms


def _equal(one: _Place, other: _Place) -> bool:
    """Whether two whole stored tensors of one shape hold the same values."""
    with _open(one.file) as left, _open(other.file) as right:
        slices = left.get_slice(one.stored), right.get_slice(other.stored)
        blocks = (_blocks(each, tuple(each.get_shape())) for each in slices)
        return all(np.array_equal(*pair) for pair in zip(*blocks, strict=True))


def _tensor_files(directory: Path) -> list[Path]:
    """The weight files: those that the index names, or the single one."""
    index = directory / INDEX_FILE
    there = {path.name for path in directory.glob("*.safetensors") if path.is_file()}
    names = _indexed_files(index) if index.exists() else {SINGLE_FILE}
    if absent := names - there:
        missing, advice = _listed(absent), "fetch it (safetensors only)"
        if index.exists():
            missing += f", which {INDEX_FILE} names"
            advice = "fetch what is missing, or the index if it belongs to another checkpoint"
        elif there:
            advice = f"if these are its shards, fetch {INDEX_FILE} too"
        raise CheckpointError(f"{directory}: weight file(s) missing: {missing}; there is {_listed(there)}: {advice}")
    if SINGLE_FILE in there - names:
        raise CheckpointError(
            f"{directory}: {INDEX_FILE} names {_listed(names)}, and there is {SINGLE_FILE} too, which transformers "
            "would read; remove the one that does not belong to the checkpoint"
        )
    return [directory / name for name in sorted(names)]


def _indexed_files(index: Path) -> set[str]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} has no readable weight_map; fetch the file again")
    if strange := sorted({name for name in names if name != Path(name).name or not name.isprintable()}):
        raise CheckpointError(
            f"{index} names {shown(strange[0])}, a file outside the directory or no file name; fetch the file again"
        )
    return set(names)


def _listed(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3]) or "no weight file"
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """`safe_open` whose errors name the file. Closed after each tensor: an open mapping keeps read pages resident."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not safetensors ({error}); fetch the file again") from None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of one expert in a stacked tensor on disk, read by slices like a tensor of their own."""

    stacked: Any  # safetensors' slice of [experts, rows, columns]
    expert: int
    start: int
    rows: int

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        first, end, _ = rows.indices(self.rows)
        return self.stacked[(self.expert, slice(self.start + first, self.start + end), *columns)]


def _hash(digest: Any, name: str, entry: Entry, blocks: Iterable[np.ndarray]) -> None:
    """Add a tensor to the fingerprint, in one block or in several along its first axis."""
    for number, block in enumerate(blocks):
        if number == 0:
            digest.update(f"{name} {entry.shape} {block.dtype}".encode())
        digest.update(block.reshape(-1).view(np.uint8).data)


def _blocks(slices: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A tensor on disk in blocks of about _BLOCK_BYTES; safetensors accepts no end beyond the last row."""
    rows = shape[0]
    step = max(_BLOCK_BYTES // (4 * math.prod(shape[1:])), 1)
    return (slices[start : min(start + step, rows)] for start in range(0, rows, step))


def _distribute(slices: Any, entry: Entry, where: NamedSharding) -> jax.Array:
    """A tensor in its layout on disk, divided over several devices: each device's slice is read, and no more.

    `where` is the sharding of the parameter; a transposed tensor has it with the axes in reverse order.
    """
    axes = [*where.spec, *[None] * (len(entry.shape) - len(where.spec))]
    on_disk = NamedSharding(where.mesh, PartitionSpec(*(axes[::-1] if entry.transposed else axes)))
    return jax.make_array_from_callback(entry.shape, on_disk, lambda index: slices[index])


@partial(jax.jit, static_argnums=(1, 2, 3))
def _to_device(
    stored: Any, transposed: bool, dtype: jnp.dtype, where: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """A stored tensor in the canonical layout on the device, and whether all of it is finite, in one pass."""
    array = (stored.T if transposed else stored).astype(dtype)
    if where is not None:
        array = jax.lax.with_sharding_constraint(array, where)
    return array, jnp.isfinite(array).all()


def _to_disk(array: jax.Array, entry: Entry, dtype: str) -> np.ndarray:
    host = np.asarray(array.astype(dtype))
    return np.ascontiguousarray(host.T if entry.transposed else host)
