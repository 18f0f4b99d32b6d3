"""A pass of the model over documents: sums on the devices, totals on the host, checkpoints on the way.

Letters: G devices, L layers, B sequences, T positions, O context orders, S special tokens.

Every device runs its own rows of a batch and adds to its own window of sums; the host absorbs the windows one after the
other, in a thread while the devices fill the next ones, unless these start from the host's total (`PassSums.again`).
Devices never wait for each other inside a step, and the result is that of one device up to rounding. If the model is
divided over a mesh, "device" means a place along `data`: the devices there run one model together, and each of them has
the whole window. Processes on several hosts each take their share of the documents (`Share`) and write results of their
own.

The result depends on when windows are moved to the host, so that follows from the documents alone, and checkpoints are
written only then: a resumed pass repeats exactly what an uninterrupted one does. It reads the documents from the start
again, without running the model on those that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from analysis.checkpoints import Checkpoints
from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models import Model
from models.decoder import Network
from models.parameters import Params
from models.placement import DATA, Placement, make_mesh
from varjax.errors import InputError
from varjax.keys import KeyIndex, find_rows
from varjax.progress import progress_bar

FLUSH_TOKENS = 1 << 18  # device sums are moved to the host's float64 this often
SAVE_TOKENS = 1 << 21  # tokens between checkpoints
_SPLIT, _WHOLE = PartitionSpec(DATA), PartitionSpec()  # the first axis over the devices; the same on all of them
_SPLIT_LAYERS = PartitionSpec(None, DATA)  # [L, B, ...]

Window = TypeVar("Window")  # a pytree of device arrays
Total = TypeVar("Total")  # a pytree of host arrays


class Reading(TypedDict, total=False):
    """How a pass reads its documents."""

    batch_size: int  # rows per device and batch at `max_length`; default 8
    max_length: int  # tokens per window; default 256
    checkpoints: Checkpoints | None  # where to resume from and to save to; default: start over and save nothing
    save_tokens: int  # tokens between checkpoints; default `SAVE_TOKENS`
    progress: bool  # show a bar on standard error; default True


@dataclass(frozen=True)
class Share:
    """Every P-th document, for one of P processes that divide a corpus among them."""

    index: int = 0
    of: int = 1  # P

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise InputError(f"process {self.index} of {self.of}: expected a process from 0 to {self.of - 1}")

    def documents(self, every: Iterable[Encoded]) -> Iterable[Encoded]:
        """Select the share's documents. All are read; the model runs on these only.

        Args:
            every: all documents.

        Returns:
            Those of the share; may be iterated as often as `every`.
        """
        return every if self.of == 1 else _Part(every, self)


EVERY_DOCUMENT = Share()


@dataclass(frozen=True)
class _Part:
    every: Iterable[Encoded]
    share: Share

    def __iter__(self) -> Iterator[Encoded]:
        return islice(self.every, self.share.index, None, self.share.of)


class PassSums(NamedTuple, Generic[Window, Total]):
    """What a pass sums up: functions of a file of `varjax`, and what they need from the model."""

    name: str  # for the progress bar
    begin: Callable[[Total], Window]  # an empty window of one device
    # (window, rows of keys, gate probabilities, mask) -> window; where `experts`, (window, rows of keys, experts'
    # outputs, routing, mask, experts' inputs, *constants) -> window.
    update: Callable[..., Window]
    absorb: Callable[[Window, Total], Total]
    orders: tuple[int, ...]  # [O], of the keys
    layers: tuple[int, ...]
    experts: bool = False
    # (windows [G, ...] of all devices, donated) -> empty ones, each equal to `begin` of the total that these go into;
    # None: only the total says what a window begins with.
    again: Callable[[Window], Window] | None = None


def mesh_of(model: Model) -> Mesh:
    """Find the mesh that a model runs on.

    Args:
        model: the model.

    Returns:
        The mesh that it is divided over; if it is not divided, all devices of this process along `data`.
    """
    return model.placement.mesh or make_mesh(f"{DATA}={jax.local_device_count()}", jax.local_devices())


class Devices(Generic[Window, Total]):
    """The devices' part of a pass: the model, the index of the keys, and a window of sums on each of G devices."""

    def __init__(self, model: Model, keys: np.ndarray, sums: PassSums[Window, Total], constants: tuple[Any, ...] = ()):
        """Move everything that batches share to the devices, whole on each unless the model is divided already.

        Args:
            model: the model.
            keys: int32 [R, C].
            sums: what is summed up.
            constants: arrays that every `update` reads.
        """
        self.mesh, self._sums = mesh_of(model), sums
        if self.mesh.size > 1 and model.placement.mesh is None:
            placement = Placement.of(model.config, self.mesh)
            model = replace(model, params=placement.place(model.params), placement=placement)
        shared = KeyIndex.build(keys), jnp.asarray(model.special_token_ids, jnp.int32), constants
        self._model, self._shared = model, jax.device_put(shared, NamedSharding(self.mesh, _WHOLE))
        self._split = partial(jax.device_put, device=NamedSharding(self.mesh, _SPLIT))
        self._windows: Any = None

    def begin(self, total: Total) -> None:
        """Give every device an empty window.

        Args:
            total: what the windows will be absorbed into.
        """
        empty, devices = self._sums.begin(total), self.mesh.shape[DATA]
        self._windows = self._split(jax.tree.map(lambda leaf: np.broadcast_to(leaf, (devices, *leaf.shape)), empty))

    def add(self, ids: ArrayLike, mask: ArrayLike) -> Window:
        """Run one batch through the model and add it to the windows. Special tokens are routed but not counted.

        Args:
            ids: int32 [G * B, T].
            mask: bool [G * B, T], real tokens.

        Returns:
            The windows [G, ...], which the next call invalidates.
        """
        batch = self._split(ids), self._split(mask)
        model = self._model
        self._windows = _step(
            self._windows, self._shared, model.params, *batch, sums=self._sums, network=model.network, mesh=self.mesh
        )
        return self._windows

    def take(self) -> list[Window]:
        """Move the sums of all devices to the host. `begin` or `again` must follow.

        Returns:
            The windows, in the order of the mesh.
        """
        every = range(self.mesh.shape[DATA])
        return [jax.tree.map(partial(_window, device=device), self._windows) for device in every]

    def again(self, total: Future[Total]) -> None:
        """Give every device an empty window after the one that was taken.

        Args:
            total: a future of the total that includes the windows that were taken.
        """
        # Between processes, runs in which `again` exchanged something failed: Gloo met exchanges of other sizes.
        if self._sums.again is None or self.mesh.is_multi_process:
            self._windows = None  # frees memory for the next ones
            self.begin(total.result())
        else:
            split = NamedSharding(self.mesh, _SPLIT)
            self._windows = _again(self._windows, again=self._sums.again, split=split)


# Unused arguments are kept because only what a program takes can be donated, and a window may fill much of the memory.
@partial(jax.jit, static_argnames=("again", "split"), donate_argnums=0, keep_unused=True)
def _again(windows: Window, *, again: Callable[[Window], Window], split: NamedSharding) -> Window:
    return jax.lax.with_sharding_constraint(again(windows), split)


@partial(jax.jit, static_argnames=("sums", "network", "mesh"), donate_argnums=0)
def _step(
    windows: Window,
    shared: tuple[KeyIndex, jax.Array, tuple[Any, ...]],
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    *,
    sums: PassSums[Window, Any],
    network: Network,
    mesh: Mesh,
) -> Window:
    """One batch [G * B, T] through the model and into the windows [G, ...]."""
    options: dict[str, Any] = {"recorded_layers": sums.layers} if sums.experts else {}
    out = network.forward(params, ids, attention_mask=mask, **options)
    figures: tuple[Any, ...] = (out.router_probs,)
    over: tuple[Any, ...] = (_SPLIT_LAYERS,)
    if sums.experts:
        outputs, inputs = (tuple(getattr(one, name) for one in out.recorded) for name in ("outputs", "inputs"))
        figures, over = (outputs, out.routing, inputs), (_SPLIT, _SPLIT_LAYERS, _SPLIT)

    def add(
        windows: Window,
        shared: tuple[KeyIndex, jax.Array, tuple[Any, ...]],
        ids: jax.Array,
        mask: jax.Array,
        *figures: Any,
    ) -> Window:
        (index, special, constants), window = shared, jax.tree.map(lambda leaf: leaf[0], windows)
        counted = mask & ~jnp.isin(ids, special)
        rows = find_rows(index, ids, sums.orders, mask)
        if sums.experts:
            outputs, routing, inputs = figures
            window = sums.update(window, rows, outputs, routing, counted, inputs, *constants)
        else:
            window = sums.update(window, rows, figures[0][jnp.array(sums.layers)], counted)
        return jax.tree.map(lambda leaf: leaf[None], window)

    specs = (_SPLIT, _WHOLE, _SPLIT, _SPLIT, *over)
    run = jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=_SPLIT, check_vma=False)
    return run(windows, shared, ids, mask, *figures)


def run_pass(
    model: Model,
    documents: Iterable[Encoded],
    keys: np.ndarray,
    total: Total,
    sums: PassSums[Any, Total],
    constants: tuple[Any, ...] = (),
    *,
    batch_size: int = 8,
    max_length: int = 256,
    checkpoints: Checkpoints | None = None,
    save_tokens: int = SAVE_TOKENS,
    progress: bool = True,
) -> tuple[Total, int]:
    """Read all documents.

    Args:
        model: runs on `mesh_of` it.
        documents: in the same order whenever they are read.
        keys: int32 [R, C].
        total: nothing counted yet.
        sums: what is summed up.
        constants: see `Devices`.
        batch_size, max_length, checkpoints, save_tokens, progress: see `Reading`.

    Returns:
        The total, and how many documents are in it.
    """
    done, total = (checkpoints and checkpoints.newest(total)) or (0, total)
    devices = Devices(model, keys, sums, constants)
    devices.begin(total)
    read_documents = unmoved = unsaved = 0
    flush_tokens = min(FLUSH_TOKENS, save_tokens)

    def absorbed(windows: list[Window], total: Total, saved: tuple[Checkpoints, int] | None = None) -> Total:
        while windows:
            total = sums.absorb(windows.pop(0), total)
        if saved:
            saved[0].save(saved[1], total)
        return total

    with (
        ThreadPoolExecutor(1) as host,
        progress_bar(documents, desc=sums.name, unit=" documents", show=progress) as read,
    ):
        pending: Future[Total] = Future()
        pending.set_result(total)
        del total  # if the host absorbs into a new one, this one makes room
        for number, batch in enumerate(batches(read, batch_size * devices.mesh.shape[DATA], max_length), start=1):
            read_documents = max(read_documents, 1 + int(batch.documents.max()))
            if number <= done:
                continue
            devices.add(batch.ids, batch.mask)
            unmoved += int(batch.mask.sum())
            if unmoved < flush_tokens:
                continue
            unmoved, unsaved = 0, unsaved + unmoved
            saved = None
            if checkpoints and unsaved >= save_tokens:
                saved, unsaved = (checkpoints, number), 0
            before = pending.result()  # first, so that the host holds one window of each device at a time
            pending = host.submit(absorbed, devices.take(), before, saved)
            del before
            devices.again(pending)
        before = pending.result()
        return absorbed(devices.take(), before), read_documents


def _window(leaf: jax.Array, device: int) -> np.ndarray:
    """Row `device` of [G, ...]; what another process holds comes over the network, one array at a time.

    On a CPU it may be a view of the device's memory, which JAX does not give to another array as long as there is one.
    """
    if leaf.size == 0:
        return np.zeros(leaf.shape[1:], leaf.dtype)  # JAX does not say who holds what of nothing
    own = (shard for shard in leaf.addressable_shards if (shard.index[0].start or 0) == device)
    return np.asarray(next(own).data)[0] if leaf.is_fully_addressable else np.asarray(leaf[device])
