"""Routing statistics as a Parquet file (`routing_stats.parquet`), version 1.

One row per layer and key that occurred there; layers in order, within a layer the keys in order. Units: nats for
entropy, confidence is the router's largest probability. Standard deviations are of the population (divided by n).

| column | type | what |
|---|---|---|
| `layer` | int32 | MoE layer, from 0 |
| `order` | int32 | ids in the key |
| `token_id` | int32 | the key's last id |
| `context` | list of int32 | all ids of the key, the current one last |
| `token_str` | string | text of `token_id`, null where it is not known |
| `frequency` | int64 | occurrences |
| `mean_entropy`, `std_entropy`, `min_entropy`, `max_entropy` | float64 | nats |
| `mean_confidence`, `std_confidence`, `min_confidence`, `max_confidence` | float64 | |
| `routing_consistency` | float64 | share of occurrences in which `top_expert` came first |
| `top_expert` | int32 | the commonest first choice, the lowest id among equals |
| `top1_counts` | list of int64 | per expert, how often it came first |
| `mean_probs` | list of float64 | per expert, its mean gate probability |

The schema's metadata holds JSON under `varjax`: `version`, `num_layers`, `num_experts`, `orders`, `tokens`,
`documents`, `nonfinite` (per layer), `absent` (per order), `identity` and `sealed`, and what the writer adds (model,
fingerprint, ...). `identity` is a SHA-256 of the model's fingerprint and of the layer, key and count of every row:
answers name the statistics that they belong to by it. `sealed` says that the file carries checksums
(`varjax.checksums`), which reading verifies.

Files of others are read too. The columns in `REQUIRED` must be there; whatever else is missing is filled, and each
filling is named in the metadata that `read` returns (`filled`: name -> with what). So a table can be built from one
layer's file that names only the commonest expert of each token, and a filling cannot be taken for a measurement.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from varjax import checksums
from varjax.errors import InputError, Library
from varjax.keys import ANY, distinct
from varjax.stats import Moments, RoutingStats

pa, pc, pq = Library("pyarrow"), Library("pyarrow.compute"), Library("pyarrow.parquet")

VERSION = 1
REQUIRED = (
    "token_id",
    "frequency",
    "mean_entropy",
    "std_entropy",
    "mean_confidence",
    "std_confidence",
    "routing_consistency",
    "top_expert",
    "min_entropy",
    "max_entropy",
)
LARGEST_ID = np.iinfo(np.int32).max
_FIX = "restore the file, or collect the routing statistics again (write an edited copy without its metadata)"
ROUNDING = 1e-5  # by which a rounded figure may pass its bound


def write(
    path: str | os.PathLike[str],
    stats: RoutingStats,
    meta: Mapping[str, Any],
    token_strings: Mapping[int, str] | Sequence[str] | None = None,
) -> None:
    """Write a file of statistics, whole or not at all. Keys that occurred in no layer are left out.

    Args:
        path: replaced if it exists.
        stats: with at least the occurrences to write.
        meta: what JSON can hold; the fields that `stats` knows itself are added, and win.
        token_strings: the text of each id.
    """
    layer, row = np.nonzero(stats.count)
    keys, count = stats.keys[row], stats.count[layer, row]
    order = stats.row_orders[row]
    top1 = stats.top1_counts[layer, row]
    columns = {
        "layer": layer.astype(np.int32),
        "order": order.astype(np.int32),
        "token_id": keys[:, -1],
        "context": _lists(keys[keys != ANY], order),
        "token_str": _texts(keys[:, -1], token_strings),
        "frequency": count,
        "routing_consistency": stats.routing_consistency[layer, row],
        "top_expert": top1.argmax(axis=-1).astype(np.int32),
        "top1_counts": _lists(top1.ravel(), np.full(len(row), stats.num_experts)),
        "mean_probs": _lists(stats.mean_probs[layer, row].ravel(), np.full(len(row), stats.num_experts)),
    }
    for name, moments, std in (
        ("entropy", stats.entropy, stats.std_entropy),
        ("confidence", stats.confidence, stats.std_confidence),
    ):
        columns[f"mean_{name}"] = moments.mean[layer, row]
        columns[f"std_{name}"] = std[layer, row]
        columns[f"min_{name}"] = moments.min[layer, row]
        columns[f"max_{name}"] = moments.max[layer, row]
    known = {
        "version": VERSION,
        "num_layers": len(stats.count),
        "num_experts": stats.num_experts,
        "orders": list(stats.ngram_orders),
        "tokens": stats.tokens,
        "documents": stats.documents,
        "nonfinite": stats.nonfinite.tolist(),
        "absent": stats.absent.tolist(),
        "identity": _identity(meta.get("fingerprint"), layer, keys, count),
        "sealed": True,
    }
    table = pa.table(columns).replace_schema_metadata({"varjax": json.dumps({**meta, **known}, allow_nan=False)})
    checksums.write_parquet(path, table)


def read(path: str | os.PathLike[str]) -> tuple[RoutingStats, dict[str, Any]]:
    """The statistics in a file.

    Keys come in order of first appearance. A row with NaN or null among its required figures is kept as it is and
    counted in `rows_with_nan`: such a key passes no threshold, and a validation of the file can name it.

    Args:
        path: a Parquet file.

    Returns:
        The statistics, and the file's metadata with `filled` and `rows_with_nan` added.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: not such a file; the message names the file, the column, the first bad row and the fix.
    """
    file = _File(path)
    count = file.integers("frequency", 1, np.iinfo(np.int64).max)
    layer, num_layers = file.layers()
    top_expert, num_experts = file.experts()
    every_key, orders = file.keys()
    keys, row = distinct(every_key)
    repeated = np.ones(len(row), bool)
    repeated[np.unique(layer * len(keys) + row, return_index=True)[1]] = False
    file.refuse("token_id", repeated, every_key[:, -1], "has the same key and layer as an earlier row; merge the two")

    def placed(values: np.ndarray, blank: float) -> np.ndarray:
        """Values [N, ...] as [L, R, ...]."""
        full = np.full((num_layers, len(keys), *values.shape[1:]), blank, values.dtype)
        full[layer, row] = values
        return full

    def moments(name: str, highest: float) -> Moments:
        mean, std, least, most = (file.figures(f"{what}_{name}", highest) for what in ("mean", "std", "min", "max"))
        return Moments(
            placed(mean, np.nan), placed(np.square(std) * count, 0), placed(least, np.nan), placed(most, np.nan)
        )

    top1_counts, mean_probs = file.choices(count, top_expert, num_experts)
    order = np.sum(every_key != ANY, axis=1)
    seen = np.bincount(layer[order == 1], weights=count[order == 1]).max(initial=0)
    stats = RoutingStats(
        keys=keys,
        ngram_orders=tuple(orders.tolist()),
        count=placed(count, 0),
        entropy=moments("entropy", np.inf),
        confidence=moments("confidence", 1),
        top1_counts=placed(top1_counts, 0),
        sum_probs=placed(mean_probs * count[:, None], 0),
        nonfinite=file.header("nonfinite", (num_layers,), np.zeros(num_layers), "0, not known"),
        absent=file.header("absent", orders.shape, np.zeros(len(orders)), "0, not known"),
        tokens=int(file.header("tokens", (), seen, "occurrences of single tokens, of the layer with most")),
        documents=int(file.header("documents", (), 0, "0, not known")),
    )
    missing = np.any([np.isnan(file.figures(name)) for name in REQUIRED], axis=0)
    return stats, {**file.meta, "filled": file.filled, "rows_with_nan": int(missing.sum())}


def identity(path: str | os.PathLike[str]) -> str:
    """A name that tells the statistics in a file from others; it is computed where the file does not hold it.

    Args:
        path: a Parquet file.

    Returns:
        A SHA-256.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: not a Parquet file of statistics.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; {_FIX}")
    try:
        known = dict(json.loads((pq.read_schema(path).metadata or {}).get(b"varjax", b"{}"))).get("identity")
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file of routing statistics ({error}); {_FIX}") from error
    if known is not None:
        return known
    stats, meta = read(path)
    layer, row = np.nonzero(stats.count)
    return _identity(meta.get("fingerprint"), layer, stats.keys[row], stats.count[layer, row])


def token_strings(path: str | os.PathLike[str]) -> dict[int, str]:
    """The texts of token ids.

    Args:
        path: a file that `read` accepts.

    Returns:
        The text of each id that the file has one for.
    """
    if "token_str" not in pq.read_schema(path).names:
        return {}
    table = checksums.read_parquet(path, _FIX, columns=["token_id", "token_str"])
    different, first = np.unique(table["token_id"].to_numpy(), return_index=True)
    texts = table["token_str"].take(pa.array(first)).to_pylist()
    return {int(i): text for i, text in zip(different, texts, strict=True) if text is not None}


def _identity(fingerprint: Any, layer: np.ndarray, keys: np.ndarray, count: np.ndarray) -> str:
    """SHA-256 of whose statistics these are, and of layer [N], key [N, C] and count [N] of every row."""
    digest = hashlib.sha256(f"{fingerprint} {keys.shape}\n".encode())
    for array, kind in ((layer, "<i4"), (keys, "<i4"), (count, "<i8")):
        digest.update(np.ascontiguousarray(array, kind).data)
    return digest.hexdigest()


class _File:
    """An open file. Its columns come out checked; what is not in it is filled, and the filling noted in `filled`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such file; collect routing statistics first, or correct the path")
        sealed = checksums.verify(self.path, _FIX)
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                self.table = file.read()
            self.meta = dict(json.loads((self.table.schema.metadata or {}).get(b"varjax", b"{}")))
            self.filled: dict[str, str] = dict(self.meta.get("filled", {}))
        except (pa.ArrowException, OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: not a readable Parquet file of routing statistics ({error}); write it again"
            ) from error
        if self.meta.pop("sealed", False) and not sealed:
            raise InputError(f"{self.path}: its checksum is missing or unreadable, so the file was damaged; {_FIX}")
        self.names = self.table.column_names
        if self.meta.get("version", VERSION) != VERSION:
            raise InputError(
                f"{self.path}: format version {self.meta['version']}, this varjax reads {VERSION}; "
                "read it with the varjax that wrote it"
            )
        absent = [name for name in REQUIRED if name not in self.names]
        if absent:
            raise InputError(f"{self.path}: no column {', '.join(absent)}; add what is missing (it has {self.names})")

    def refuse(self, column: str, bad: np.ndarray, values: Any, fix: str) -> None:
        """Raise if any row of bool [N] is bad."""
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(f"{self.path}: column {column}, row {row}: {values[row]} {fix}")

    def fill(self, name: str, value: Any, how: str) -> Any:
        """The filling of what the file lacks."""
        self.filled[name] = how
        return value

    def header(self, name: str, shape: tuple[int | None, ...], otherwise: Any, how: str) -> np.ndarray:
        """int64 of a shape (None: any length): a whole number, or several, from the metadata."""
        value = np.asarray(self.meta[name] if name in self.meta else self.fill(name, otherwise, how))
        fits = len(shape) == value.ndim and all(
            want in (None, has) for want, has in zip(shape, value.shape, strict=True)
        )
        if not fits or value.dtype.kind not in "iuf" or not _whole(value, 0, np.iinfo(np.int64).max).all():
            raise InputError(
                f"{self.path}: metadata {name} is {self.meta[name]}; it must be whole numbers >= 0 of shape {shape}"
            )
        return value.astype(np.int64)

    def integers(self, name: str, lowest: int = 0, highest: int = LARGEST_ID) -> np.ndarray:
        """int64 [N], a column of whole numbers within bounds; they may be stored as floats, but none may be missing."""
        values = self._numbers(name, self.table.column(name))
        self.refuse(name, ~_whole(values, lowest, highest), values, f"is not a whole number from {lowest} to {highest}")
        return values.astype(np.int64)

    def figures(self, name: str, highest: float = np.inf) -> np.ndarray:
        """float64 [N], a column of figures from 0 to `highest`; NaN where one is missing, or the whole column."""
        if name not in self.names:
            return self.fill(name, np.full(len(self.table), np.nan), "NaN, not known")
        values = self._numbers(name, self.table.column(name)).astype(np.float64)
        inside = (values >= -ROUNDING) & (values <= highest + ROUNDING) & ~np.isinf(values)
        self.refuse(name, ~(inside | np.isnan(values)), values, f"is not from 0 to {highest}")
        return values

    def layers(self) -> tuple[np.ndarray, int]:
        """int64 [N] the layer of each row, and L."""
        if "layer" not in self.names:
            return self.fill("layer", np.zeros(len(self.table), np.int64), "0, the only layer"), 1
        num_layers = int(self.header("num_layers", (), self.integers("layer").max(initial=-1) + 1, "those with rows"))
        return self.integers("layer", 0, num_layers - 1), num_layers

    def experts(self) -> tuple[np.ndarray, int]:
        """int64 [N] the commonest first choice of each row, and E."""
        largest = self.integers("top_expert").max(initial=-1)
        num_experts = int(self.header("num_experts", (), largest + 1, "those up to the largest `top_expert`"))
        return self.integers("top_expert", 0, num_experts - 1), num_experts

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [N, C] the key of each row, and int64 [O] the orders."""
        token_id = self.integers("token_id")
        order = self.integers("order", 1) if "order" in self.names else np.ones(len(token_id), np.int64)
        if "context" in self.names:
            context, length, ids = self._lists("context")
            order = order if "order" in self.names else length
            self.refuse("context", (length < 1) | (length != order), context, "must hold as many ids as `order` says")
            self.refuse("context", ids[np.cumsum(length) - 1] != token_id, context, "must end in `token_id`")
            strange = np.repeat(np.arange(len(length)), length)[~_whole(ids, 0, LARGEST_ID)]
            self.refuse(
                "context", np.isin(np.arange(len(length)), strange), context, "must hold ids from 0 to 2**31 - 1"
            )
        else:
            self.refuse("order", order != 1, order, "needs the column `context` with all ids of the key")
            ids = self.fill("context", token_id, "the token alone, order 1")
        orders = self.header("orders", (None,), np.unique(order), "those with rows")
        self.refuse("order", ~np.isin(order, orders), order, f"is none of the orders {orders.tolist()} of the metadata")
        width = int(orders.max(initial=1))
        keys = np.full((len(order), width), ANY, np.int32)
        keys[np.arange(width) >= width - order[:, None]] = ids
        return keys, orders

    def choices(self, count: np.ndarray, top_expert: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N, E] how often each expert came first, and float64 [N, E] its mean gate probability."""
        share = self.figures("routing_consistency", 1)
        top = np.arange(num_experts) == top_expert[:, None]
        if "top1_counts" in self.names:
            top1_counts = self._per_expert("top1_counts", num_experts)
            self.refuse("top1_counts", top1_counts.sum(axis=1) > count, top1_counts, "add up to more than `frequency`")
        else:
            often = np.rint(np.nan_to_num(share) * count)[:, None]
            top1_counts = self.fill("top1_counts", top * often, "`routing_consistency` at `top_expert`, 0 elsewhere")
        if "mean_probs" in self.names:
            mean_probs = self._per_expert("mean_probs", num_experts)
        else:
            rest = (1 - share) / max(num_experts - 1, 1)
            mean_probs = self.fill(
                "mean_probs",
                np.where(top, share[:, None], rest[:, None]),
                "an estimate: `routing_consistency` at `top_expert`, equal parts elsewhere",
            )
        return top1_counts.astype(np.int64), mean_probs

    def _per_expert(self, name: str, num_experts: int) -> np.ndarray:
        """float64 [N, E], a column of lists with one number >= 0 or NaN per expert."""
        lists, length, values = self._lists(name)
        self.refuse(name, length != num_experts, lists, f"must hold {num_experts} numbers, one per expert")
        values = values.astype(np.float64).reshape(-1, num_experts)
        self.refuse(name, np.any((values < 0) | np.isinf(values), axis=1), lists, "must hold numbers >= 0")
        return values

    def _lists(self, name: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """A column of lists of numbers: as it is, the length of each list [N], and all numbers in a row."""
        column = self.table.column(name)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise InputError(f"{self.path}: column {name} holds {column.type}, expected lists; convert it")
        length = pc.list_value_length(column).fill_null(0).to_numpy()
        return column, length, self._numbers(name, pc.list_flatten(column))

    def _numbers(self, name: str, values: Any) -> np.ndarray:
        """The values as NumPy has them; null becomes NaN."""
        if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            raise InputError(f"{self.path}: column {name} holds {values.type}, expected numbers; convert it")
        return values.to_numpy()


def _whole(values: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """bool [...], which values are whole numbers within bounds."""
    return (values >= lowest) & (values <= highest) & (values == np.floor(values))


def _lists(values: np.ndarray, length: np.ndarray) -> Any:
    """Lists of the given lengths, cut from the values in order."""
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(length)]).astype(np.int32), values)


def _texts(ids: np.ndarray, token_strings: Mapping[int, str] | Sequence[str] | None) -> Any:
    """The text of each id int [N], null where it is not known."""
    known = token_strings if isinstance(token_strings, Mapping) else dict(enumerate(token_strings or ()))
    different, which = np.unique(ids, return_inverse=True)
    return pa.array([known.get(i) for i in different.tolist()], pa.string()).take(pa.array(which))
