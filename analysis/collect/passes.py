"""A pass of the model over documents: sums on the devices, totals on the host, checkpoints on the way.

Letters: G devices, L layers, B sequences, T positions.

Every device runs its own rows of a batch and adds to its own window of sums; the host absorbs the windows one after
the other. So devices never wait for each other inside a step, and the result is that of one device up to rounding. If
the model is divided over a mesh, "device" stands for a place along `data`: the devices there run one model together,
and each of them has the whole window.
Processes on several hosts each take their share of the documents (`Share`) and write results of their own.

The result depends on when windows are moved to the host, so that follows from the documents alone, and a checkpoint is
written only there: a resumed pass repeats exactly what an uninterrupted one does. It reads the documents from the start
again, without running the model on those that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from analysis.collect.checkpoints import Checkpoints
from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models import Model
from models.placement import DATA, Placement, make_mesh
from varjax.errors import InputError
from varjax.progress import progress_bar

SPLIT, WHOLE = PartitionSpec(DATA), PartitionSpec()  # the first axis over the devices; the same on all of them
SPLIT_LAYERS = PartitionSpec(None, DATA)  # [L, B, ...]
FLUSH_TOKENS = 1 << 18  # device sums are moved to the host's float64 this often
SAVE_TOKENS = 1 << 21  # tokens between checkpoints

T = TypeVar("T")
Window = TypeVar("Window")  # a pytree of device arrays
Total = TypeVar("Total")  # a pytree of host arrays


@dataclass(frozen=True)
class Share:
    """Every P-th document, for one of P processes that divide a corpus among them."""

    index: int = 0
    of: int = 1  # P

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise InputError(f"process {self.index} of {self.of}: expected a process from 0 to {self.of - 1}")

    def documents(self, every: Iterable[Encoded]) -> Iterable[Encoded]:
        """Those of the share, as often as they are read. All are read; the model runs on these alone."""
        return every if self.of == 1 else _Part(every, self)


EVERY_DOCUMENT = Share()


@dataclass(frozen=True)
class _Part:
    every: Iterable[Encoded]
    share: Share

    def __iter__(self) -> Iterator[Encoded]:
        return islice(self.every, self.share.index, None, self.share.of)


def mesh_of(model: Model) -> Mesh:
    """The mesh that the model is divided over; if it is not, all devices of this process along `data`."""
    return model.placement.mesh or make_mesh(f"{DATA}={jax.local_device_count()}", jax.local_devices())


def on_mesh(model: Model) -> tuple[Model, Mesh]:
    """The model on `mesh_of` it, all of it on each device unless it is divided already; and that mesh."""
    mesh = mesh_of(model)
    if mesh.size == 1 or model.placement.mesh is not None:
        return model, mesh
    placement = Placement.of(model.config, mesh)
    return replace(model, params=placement.place(model.params), placement=placement), mesh


def on_all_devices(tree: T, mesh: Mesh) -> T:
    """Every array whole on each device."""
    return jax.device_put(tree, NamedSharding(mesh, WHOLE))


def per_device(tree: Window, mesh: Mesh) -> Window:
    """[G, ...]: a copy of every array on each device, behind a leading axis."""
    devices = mesh.shape[DATA]
    return jax.device_put(
        jax.tree.map(lambda leaf: np.broadcast_to(leaf, (devices, *leaf.shape)), tree), NamedSharding(mesh, SPLIT)
    )


def on_each_device(step: Callable[..., Window], mesh: Mesh, *specs: PartitionSpec) -> Callable[..., Window]:
    """`step(window, *arguments) -> window` as a function of windows [G, ...] and of whole arguments.

    Args:
        specs: what each device gets of an argument: SPLIT, SPLIT_LAYERS or WHOLE.
    """

    def local(windows: Window, *arguments: jax.Array) -> Window:
        window = step(jax.tree.map(lambda leaf: leaf[0], windows), *arguments)
        return jax.tree.map(lambda leaf: leaf[None], window)

    return jax.shard_map(local, mesh=mesh, in_specs=(SPLIT, *specs), out_specs=SPLIT, check_vma=False)


def run_pass(
    total: Total,
    documents: Iterable[Encoded],
    *,
    begin: Callable[[Total], Window],
    step: Callable[[Window, jax.Array, jax.Array], Window],
    absorb: Callable[[Window, Total], Total],
    name: str,
    mesh: Mesh,
    batch_size: int,
    max_length: int,
    checkpoints: Checkpoints | None = None,
    save_tokens: int = SAVE_TOKENS,
    progress: bool = True,
) -> tuple[Total, int]:
    """Read all documents; the total, and how many documents are in it.

    Args:
        total: nothing counted yet.
        documents: in the same order whenever they are read.
        begin: an empty window of one device.
        step: adds a batch, ids int32 and mask bool [G * B, T], to the windows [G, ...], which are donated.
        absorb: the total with one device's window in it.
        name: what the bar says.
        batch_size: rows per device and batch at `max_length`.
        checkpoints: where to resume from and to save to; None for a pass that starts anew.
        save_tokens: tokens between checkpoints.
        progress: show a bar on standard error.
    """
    place = partial(jax.device_put, device=NamedSharding(mesh, SPLIT))
    done, total = (checkpoints and checkpoints.newest(total)) or (0, total)
    windows = per_device(begin(total), mesh)
    read_documents = unmoved = unsaved = 0
    flush_tokens = min(FLUSH_TOKENS, save_tokens)
    with progress_bar(documents, desc=name, unit=" documents", show=progress) as read:
        for number, batch in enumerate(batches(read, batch_size * mesh.shape[DATA], max_length), start=1):
            read_documents = max(read_documents, 1 + int(batch.documents.max()))
            if number <= done:
                continue
            windows = step(windows, place(batch.ids), place(batch.mask))
            unmoved += int(batch.mask.sum())
            if unmoved < flush_tokens:
                continue
            total = _absorbed(windows, total, absorb)
            del windows  # their memory is that of the next ones
            windows = per_device(begin(total), mesh)
            unmoved, unsaved = 0, unsaved + unmoved
            if checkpoints and unsaved >= save_tokens:
                checkpoints.save(number, total)
                unsaved = 0
    return _absorbed(windows, total, absorb), read_documents


def _absorbed(windows: Window, total: Total, absorb: Callable[[Window, Total], Total]) -> Total:
    """The total with the windows [G, ...] of all devices in it, in the order of the mesh."""
    devices = len(jax.tree.leaves(windows)[0])
    for device in range(devices):
        total = absorb(jax.tree.map(partial(_window, device=device), windows), total)
    return total


def _window(leaf: jax.Array, device: int) -> np.ndarray:
    """Row `device` of [G, ...]; what another process holds comes over the network, one array at a time."""
    own = (shard for shard in leaf.addressable_shards if (shard.index[0].start or 0) == device)
    return np.asarray(next(own).data)[0] if leaf.is_fully_addressable else np.asarray(leaf[device])
