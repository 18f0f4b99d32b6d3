"""Hugging Face safetensors in and out, by one table and a strict ledger.

A family's table (`models.families`) maps each parameter of the canonical tree (`models.parameters`) to its published
name; the ledger, derived from the declared shapes, says which tensors a checkpoint must hold. Every tensor of the files
must match exactly one row: missing, surplus and misshapen ones are all named in one error before anything is read.
Linear kernels are stored transposed, [in, out] here and [out, in] on disk. Reading and writing are one tensor or one
file at a time; for several devices each one's slice of a tensor is read.

A tensor may also be stored as transformers 5 holds it (`save_original_format=False`): as a part of one that stacks the
experts of a layer, or under another name. Written is the published layout alone.

Format: https://huggingface.co/docs/safetensors; sharded checkpoints carry a `model.safetensors.index.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from models.config import MoEConfig, config_to_hf
from models.families import COMMON_TENSORS, FAMILIES, STACKED_EXPERTS
from models.fields import read_object, shown
from models.generation_config import GENERATION_FILE, GenerationDefaults, generation_to_hf
from models.parameters import Params, init_params, param_shardings
from models.placement import ONE_DEVICE, Placement
from varjax import checksums
from varjax.errors import InputError
from varjax.files import replacing

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = (COMMON_TENSORS[path][0] for path in ("decoder/head/kernel", "decoder/embed/embedding"))
BLOCK_BYTES = 1 << 24  # read at a time where a tensor is only hashed

_STORED = ("F32", "BF16", "F16")  # safetensors' names of the dtypes that hold weights; others hold quantized ones
# What decides the maths beside the tensors and is not seen in their shapes.
_MATHS = ("num_heads", "num_kv_heads", "head_dim", "top_k", "rope_theta", "rms_norm_eps", "sliding_window")
_MORE_MATHS = ("clip_qkv", "normalize_top_k")  # counted where they are not the usual, so that older prints stand


class CheckpointError(InputError):
    """A checkpoint that cannot be loaded faithfully; names file, tensor and fix."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the ledger."""

    path: tuple[Any, ...]  # in the canonical tree
    shape: tuple[int, ...]  # on disk
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the ledger inside a stored one: the whole of it, or some rows of one expert."""

    name: str  # in the ledger
    expert: int | None = None  # None: the whole
    start: int = 0  # of its rows

    def of(self, stored: Any, entry: Entry) -> Any:
        """What reads it by slices, as safetensors reads a tensor of its own."""
        return stored if self.expert is None else _Rows(stored, self.expert, self.start, entry.shape[0])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of the ledger is stored."""

    file: Path
    stored: str  # the name there
    part: Part


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
    files = tensor_files(directory)
    check_counts(files, config)
    expected = ledger(config)
    places = locate_tensors(files, config, expected)
    shardings = param_shardings(config, placement)
    params: Params = {"decoder": {}, "experts": [{} for _ in range(config.num_layers)]}
    digest = hashlib.sha256(repr(_maths(config)).encode())
    for name in sorted(expected):
        entry = expected[name]
        where = _lookup(shardings, entry.path)
        with _open(places[name].file) as tensors:
            slices = places[name].part.of(tensors.get_slice(places[name].stored), entry)
            if where is None:
                stored = slices[:]
                _hash(digest, name, entry, [stored])
                stored = jax.device_put(stored)
            else:
                _hash(digest, name, entry, _blocks(slices, entry.shape))
                stored = _distribute(slices, entry, where)
        array, finite = _place(stored, entry.transposed, jnp.dtype(dtype), where)
        if not finite:
            raise CheckpointError(
                f"{places[name].file}: {name} holds NaN or infinite values; fetch or save the file again"
            )
        _insert(params, entry.path, array)
    return params, digest.hexdigest()


def _maths(config: MoEConfig) -> list[Any]:
    usual = {field.name: field.default for field in dataclasses.fields(MoEConfig)}
    more = {name: getattr(config, name) for name in _MORE_MATHS if getattr(config, name) != usual[name]}
    return [*(getattr(config, name) for name in _MATHS), *more.items()]


def save_params(
    directory: Path,
    params: Params,
    config: MoEConfig,
    dtype: str = "float32",
    shard_bytes: int = 5 << 30,
    generation: GenerationDefaults | None = None,
) -> None:
    """Write canonical parameters and `config.json` so that this library and transformers open the directory.

    A model's `generation` goes into a `generation_config.json`, unless it says no more than the config; None: there is
    no such file, and the ids of the config count.

    Files of tensors carry a checksum (`varjax.checksums`), which loading verifies. More than `shard_bytes` go into
    numbered shards. No file takes its place before all are written: a call that is interrupted before leaves the
    directory as it was, one that is interrupted later leaves files of both checkpoints. A checkpoint that was there
    before is replaced; what is left of its shards and its `generation_config.json` is removed.
    """
    entries = ledger(config)
    sizes = {name: math.prod(entry.shape) * jnp.dtype(dtype).itemsize for name, entry in entries.items()}
    shards = _shards(sizes, shard_bytes)
    more = None if generation == GenerationDefaults.of(config) else generation
    written: set[str] = set()
    with ExitStack() as files:  # files take their places in reverse order: the config comes last

        def write(name: str) -> Path:
            written.add(name)
            return files.enter_context(replacing(directory / name))

        write("config.json").write_text(json.dumps(config_to_hf(config, dtype), indent=2) + "\n")
        if more is not None:
            write(GENERATION_FILE).write_text(json.dumps(generation_to_hf(more), indent=2) + "\n")
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write(INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for file, names in shards.items():
            tensors = {name: _to_disk(_lookup(params, entries[name].path), entries[name], dtype) for name in names}
            checksums.write_safetensors(write(file), tensors, {"format": "pt"})
    # What is left of an earlier checkpoint would be read in place of this one.
    single = [directory / name for name in (SINGLE_FILE, INDEX_FILE, GENERATION_FILE)]
    for path in [*single, *directory.glob("model-*-of-*.safetensors")]:
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


def check_counts(files: Sequence[Path], config: MoEConfig) -> None:
    """A first look, before the ledger: it has a row for every expert of every layer in the config.

    The files' checksums come first, so that a damaged file is not taken for a wrong config.

    Args:
        files: of `tensor_files`.

    Raises:
        CheckpointError: a file does not match its checksum, or the config has more layers or experts than the files, as
            a damaged one may.
    """
    family, first = FAMILIES[config.family], config.expert_layers[0]
    gate = family.tensors["decoder/layers/{}/gate/kernel"][0]
    gates = {name.format(first) for name in (gate, family.renamed.get(gate, gate))}
    layers, directory = 0, files[0].parent
    for file in files:
        checksums.verify(file, "fetch or save the file again", error=CheckpointError)
    for file in files:
        with _open(file) as tensors:
            for name in sorted(tensors.keys()):
                if match := re.match(r"model\.layers\.(\d{1,9})\.", name):
                    layers = max(layers, int(match[1]) + 1)
                shape: list[int] = tensors.get_slice(name).get_shape() if name in gates else []
                if len(shape) == 2 and config.num_experts > shape[0]:
                    raise CheckpointError(
                        f"{directory}: config.json says {config.num_experts} experts per layer, but {name} in "
                        f"{file.name} has {shape[0]}; use the config.json that belongs to the weights"
                    )
    if config.depth > layers:
        raise CheckpointError(
            f"{directory}: config.json says num_hidden_layers {config.depth}, the weight files hold {layers} layers; "
            "use the config.json that belongs to the weights, or fetch what is missing"
        )


def locate_tensors(files: Sequence[Path], config: MoEConfig, expected: dict[str, Entry]) -> dict[str, Place]:
    """Tensor name -> where it is stored, after every tensor of every file has found its row in the ledger.

    `check_counts` comes before: it verifies the files' checksums.

    Args:
        files: of `tensor_files`.

    Raises:
        CheckpointError: files or tensors that do not match; names every one of them.
    """
    located: dict[str, Place] = {}
    forms = _forms(config, expected)
    faults = []
    head: Place | None = None  # a second copy of the embedding, which both ends of the model share
    for file in files:
        with _open(file) as tensors:
            for name in sorted(tensors.keys()):
                stored = tensors.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                should, parts = forms.get(name, (shape, ()))
                second = name == HEAD and name not in expected
                repeated = [part.name for part in parts if part.name in located and not second]
                if not parts:
                    faults.append(f"surplus {name} in {file.name}")
                elif shape != should:
                    faults.append(f"{name} in {file.name} has shape {shape}, expected {should}")
                elif dtype not in _STORED:
                    faults.append(f"{name} in {file.name} is stored as {dtype}, expected one of {', '.join(_STORED)}")
                elif repeated:
                    before = located[repeated[0]].file.name
                    faults.append(f"{repeated[0]} is in {before} and again in {file.name}")
                if second:
                    head = Place(file, name, *parts)
                else:
                    located |= {part.name: Place(file, name, part) for part in parts}
    if head is not None:
        located.setdefault(EMBEDDING, head)
        if not faults and not _equal(located[EMBEDDING], head):
            faults.append(
                f"{HEAD} in {head.file.name} is not {EMBEDDING}, but config.json says tie_word_embeddings true; "
                "set it to false if the head has weights of its own"
            )
    missing = [name for name in expected if name not in located]
    untied = " (if the head shares the embedding's weights, set tie_word_embeddings to true)"
    faults += [f"missing {name}{untied if name == HEAD else ''}" for name in missing]
    if faults:
        told = "\n  ".join(faults[:20]) + (f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(
            f"{files[0].parent}: the tensors do not match config.json; fix it or fetch the checkpoint again:\n  {told}"
        )
    return located


def _forms(config: MoEConfig, expected: dict[str, Entry]) -> dict[str, tuple[tuple[int, ...], tuple[Part, ...]]]:
    """Every name under which a file may store something -> its shape, and the tensors of the ledger that it holds."""
    forms: dict[str, tuple[tuple[int, ...], tuple[Part, ...]]] = {
        name: (entry.shape, (Part(name),)) for name, entry in expected.items()
    }
    if config.tie_word_embeddings:
        forms[HEAD] = forms[EMBEDDING]
    for template, other in FAMILIES[config.family].renamed.items():
        for layer in config.expert_layers:
            forms[other.format(layer)] = forms[template.format(layer)]
    names = {entry.path: name for name, entry in expected.items()}
    for template, kinds in STACKED_EXPERTS.items():
        for index, layer in enumerate(config.expert_layers):
            parts, rows, columns = [], 0, 0
            for kind in kinds:
                of_kind = [names["experts", index, expert, kind] for expert in range(config.num_experts)]
                parts += [Part(name, expert, rows) for expert, name in enumerate(of_kind)]
                more, columns = expected[of_kind[0]].shape
                rows += more
            forms[template.format(layer)] = (config.num_experts, rows, columns), tuple(parts)
    return forms


def _equal(one: Place, other: Place) -> bool:
    """Whether two stored tensors of one shape hold the same values."""
    with _open(one.file) as left, _open(other.file) as right:
        slices = left.get_slice(one.stored), right.get_slice(other.stored)
        blocks = (_blocks(each, tuple(each.get_shape())) for each in slices)
        return all(np.array_equal(*pair) for pair in zip(*blocks, strict=True))


def tensor_files(directory: Path) -> list[Path]:
    """The weight files: those of the index, or the single one.

    Raises:
        CheckpointError: a file or the index is missing or damaged, or it is not clear which files are meant; says what
            there is.
    """
    index = directory / INDEX_FILE
    there = {path.name for path in directory.glob("*.safetensors") if path.is_file()}
    names = {SINGLE_FILE} if not index.exists() else _indexed_files(index)
    if absent := sorted(names - there):
        told, advice = ", ".join(absent), "fetch it (safetensors only)"
        if index.exists():
            told += f", which {INDEX_FILE} names"
            advice = "fetch what is missing, or the index if it belongs to another checkpoint"
        elif there:
            advice = f"if these are its shards, fetch {INDEX_FILE} too"
        raise CheckpointError(f"{directory}: weight file(s) missing: {told}; there is {_listed_files(there)}: {advice}")
    if SINGLE_FILE in there - names:
        raise CheckpointError(
            f"{directory}: {INDEX_FILE} names {_listed_files(names)}, and there is {SINGLE_FILE} too, which "
            "transformers would read; remove the one that does not belong to the checkpoint"
        )
    return [directory / name for name in sorted(names)]


def _indexed_files(index: Path) -> set[str]:
    """The files that an index names."""
    weight_map = read_object(index, CheckpointError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} has no readable weight_map; fetch the file again")
    if strange := sorted({name for name in names if name != Path(name).name or not name.isprintable()}):
        raise CheckpointError(
            f"{index} names {shown(strange[0])}, a file outside the directory or no file name; fetch the file again"
        )
    return set(names)


def _listed_files(names: set[str]) -> str:
    """The names, those of numbered shards counted."""
    shards: dict[tuple[str, str], set[int]] = {}
    others = []
    for name in names:
        if match := re.fullmatch(r"(.+)-(\d{1,9})-of-(\d{1,9})\.safetensors", name):
            shards.setdefault((match[1], match[3]), set()).add(int(match[2]))
        else:
            others.append(name)
    counted = []
    for (stem, total), found in shards.items():
        complete = (len(found), min(found), max(found)) == (int(total), 1, int(total))
        whole = "complete" if complete else f"{len(found)} of them"
        counted.append(f"{stem}-*-of-{total}.safetensors, {whole}")
    return "; ".join(sorted(others) + sorted(counted)) or "no weight file"


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
    """Some rows of one expert in a stacked tensor on the disk, read by slices as if they were a tensor of their own."""

    stacked: Any  # safetensors' slice of [experts, rows, columns]
    expert: int
    start: int
    rows: int

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        first, end, _ = rows.indices(self.rows)
        return self.stacked[(self.expert, slice(self.start + first, self.start + end), *columns)]


def _hash(digest: Any, name: str, entry: Entry, blocks: Iterable[np.ndarray]) -> None:
    """Takes a tensor into the fingerprint, in one block or several along its first axis."""
    for number, block in enumerate(blocks):
        if number == 0:
            digest.update(f"{name} {entry.shape} {block.dtype}".encode())
        digest.update(block.reshape(-1).view(np.uint8).data)


def _blocks(slices: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A tensor on the disk in blocks of about BLOCK_BYTES; safetensors wants no end beyond the last row."""
    rows = shape[0]
    step = max(BLOCK_BYTES // (4 * math.prod(shape[1:])), 1)
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
