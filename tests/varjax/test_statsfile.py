"""The statistics file: what is written comes back, foreign files are read honestly, bad ones are named."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varjax import statsfile
from varjax.keys import ANY
from varjax.stats import Moments, RoutingStats, merge

KEYS = np.array([[ANY, 0], [ANY, 7], [ANY, 2], [0, 0], [0, 7], [7, 2]], np.int32)
LAYERS, EXPERTS, ORDERS = 3, 4, (1, 2)
STRINGS = ["a", "b", "c"]  # id 7 has none

SPEC_ONLY = pd.DataFrame(
    {
        "token_id": [5, 9, 3],
        "token_str": ["five", "nine", None],
        "frequency": [10, 4, 1],
        "mean_entropy": [0.5, 1.0, np.nan],
        "std_entropy": [0.1, 0.2, 0.0],
        "mean_confidence": [0.9, 0.6, 0.5],
        "std_confidence": [0.05, 0.1, 0.0],
        "routing_consistency": [0.8, 0.5, 1.0],
        "top_expert": [2, 0, 1],
        "min_entropy": [0.2, 0.9, 0.7],
        "max_entropy": [0.8, 1.1, 0.7],
    }
)


def some_stats(seed: int) -> RoutingStats:
    """Any statistics, with keys that some layer never saw."""
    rng = np.random.default_rng(seed)
    top1 = rng.integers(0, 9, (LAYERS, len(KEYS), EXPERTS)) * (rng.random((LAYERS, len(KEYS), 1)) < 0.8)
    count = top1.sum(axis=-1)
    blank = np.where(count > 0, 1.0, np.nan)

    def moments() -> Moments:
        low, mean, high = np.sort(rng.random((3, LAYERS, len(KEYS))), axis=0) * blank
        return Moments(mean, rng.random(count.shape) * (count > 0), low, high)

    return RoutingStats(
        keys=KEYS,
        ngram_orders=ORDERS,
        count=count,
        entropy=moments(),
        confidence=moments(),
        top1_counts=top1,
        sum_probs=rng.dirichlet(np.ones(EXPERTS), count.shape) * count[..., None],
        nonfinite=rng.integers(0, 5, LAYERS),
        absent=rng.integers(0, 5, len(ORDERS)),
        tokens=int(rng.integers(1000)),
        documents=int(rng.integers(10)),
    )


def by_key(stats: RoutingStats) -> RoutingStats:
    """The same with keys sorted, and without those that no layer saw."""
    rows = np.lexsort(stats.keys.T)
    rows = rows[stats.count[:, rows].any(axis=0)]
    pick = {name: getattr(stats, name)[:, rows] for name in ("count", "top1_counts", "sum_probs")}
    for name in ("entropy", "confidence"):
        pick[name] = Moments(*(value[:, rows] for value in vars(getattr(stats, name)).values()))
    return replace(stats, keys=stats.keys[rows], **pick)


def assert_same(a: RoutingStats, b: RoutingStats) -> None:
    a, b = by_key(a), by_key(b)
    for name in ("keys", "count", "top1_counts", "nonfinite", "absent"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert (a.ngram_orders, a.tokens, a.documents) == (b.ngram_orders, b.tokens, b.documents)
    np.testing.assert_allclose(a.sum_probs, b.sum_probs, 1e-14)
    for ours, theirs in ((a.entropy, b.entropy), (a.confidence, b.confidence)):
        np.testing.assert_allclose(tuple(vars(ours).values()), tuple(vars(theirs).values()), 1e-13)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_what_is_written_comes_back(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("stats") / "routing_stats.parquet"
    first, second = some_stats(seed), some_stats(seed + 1)
    statsfile.write(path, first, {"model": "tiny", "provenance": {"seed": seed}}, STRINGS)
    read, meta = statsfile.read(path)
    assert_same(read, first)
    assert_same(merge(read, second), merge(first, second))
    assert (meta["model"], meta["provenance"], meta["filled"], meta["rows_with_nan"]) == ("tiny", {"seed": seed}, {}, 0)

    statsfile.write(path, read, meta)
    assert_same(statsfile.read(path)[0], first)


def test_the_file_is_as_documented(tmp_path):
    path, stats = tmp_path / "stats.parquet", some_stats(0)
    statsfile.write(path, stats, {"model": "tiny"}, STRINGS)
    table = pq.read_table(path)
    rows = [line.split("|")[1:3] for line in statsfile.__doc__.splitlines() if line.startswith("| `")]
    documented = {name.strip("` "): kind.strip() for names, kind in rows for name in names.split(",")}
    written = {
        field.name: f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type)
        for field in table.schema
    }
    assert {name: kind.replace("double", "float64") for name, kind in written.items()} == documented
    assert set(statsfile.REQUIRED) < set(documented)

    layer, row = np.nonzero(stats.count)
    frame = table.to_pandas()
    assert frame.layer.tolist() == layer.tolist()
    assert [tuple(ids) for ids in frame.context] == [tuple(key[key != ANY].tolist()) for key in KEYS[row]]
    assert [None if pd.isna(text) else text for text in frame.token_str] == [
        {0: "a", 2: "c"}.get(i) for i in frame.token_id
    ]
    np.testing.assert_array_equal(frame.frequency, stats.count[layer, row])
    np.testing.assert_allclose(frame.std_entropy**2 * frame.frequency, stats.entropy.m2[layer, row])
    np.testing.assert_allclose(frame.routing_consistency, [max(c) / sum(c) for c in frame.top1_counts])
    assert json.loads(table.schema.metadata[b"varjax"])["version"] == statsfile.VERSION


def test_statistics_without_occurrences_come_back_without_keys(tmp_path):
    path = tmp_path / "stats.parquet"
    statsfile.write(path, RoutingStats.empty(KEYS, ORDERS, LAYERS, EXPERTS), {})
    read, _ = statsfile.read(path)
    assert_same(read, RoutingStats.empty(KEYS[:0], ORDERS, LAYERS, EXPERTS))


def test_a_single_layer_file_with_only_the_required_columns(tmp_path):
    path = tmp_path / "foreign.parquet"
    SPEC_ONLY.to_parquet(path)
    stats, meta = statsfile.read(path)
    assert (stats.keys.tolist(), stats.ngram_orders) == ([[5], [9], [3]], (1,))
    assert stats.count.tolist() == [[10, 4, 1]]
    assert stats.top1_counts.tolist() == [[[0, 0, 8], [2, 0, 0], [0, 1, 0]]]
    np.testing.assert_allclose(stats.mean_probs[0, 0], [0.1, 0.1, 0.8])
    np.testing.assert_allclose(stats.std_entropy, [[0.1, 0.2, 0.0]])
    np.testing.assert_array_equal(stats.entropy.mean, [[0.5, 1.0, np.nan]])  # kept, so that it can be named
    assert np.isnan(stats.confidence.min).all()
    assert (stats.tokens, stats.documents, meta["rows_with_nan"]) == (15, 0, 1)
    invented = "layer context num_experts orders top1_counts mean_probs min_confidence max_confidence "
    assert set(meta["filled"]) == set((invented + "tokens documents nonfinite absent").split())

    again = tmp_path / "again.parquet"
    statsfile.write(again, stats, meta)
    assert statsfile.read(again)[1]["filled"] == meta["filled"]  # a filling stays one


def test_numbers_may_be_stored_as_floats_and_null_is_nan(tmp_path):
    path = tmp_path / "foreign.parquet"
    SPEC_ONLY.astype({"frequency": float, "top_expert": float}).assign(mean_confidence=[None, 0.5, 0.5]).to_parquet(
        path
    )
    stats, meta = statsfile.read(path)
    assert stats.count.tolist() == [[10, 4, 1]]
    assert meta["rows_with_nan"] == 2


def changed(column: str, value) -> pd.DataFrame:
    """The small file with one value changed in its second row."""
    frame = SPEC_ONLY.astype({column: object}) if isinstance(value, str) else SPEC_ONLY.copy()
    if isinstance(value, float):
        frame = frame.astype({column: float})
    frame[column] = [value if row == 1 else old for row, old in enumerate(frame[column])]
    return frame.astype({column: str}) if isinstance(value, str) else frame


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (SPEC_ONLY.drop(columns=["frequency", "top_expert"]), "no column frequency, top_expert"),
        (changed("frequency", 0), "column frequency, row 1: 0 is not a whole number from 1"),
        (changed("frequency", 1.5), r"column frequency, row 1: 1\.5"),
        (changed("frequency", float("nan")), "column frequency, row 1: nan"),
        (changed("frequency", "many"), "column frequency holds .*string, expected numbers"),
        (changed("token_id", -1), "column token_id, row 1: -1"),
        (changed("token_id", 2**31), "column token_id, row 1: 2147483648"),
        (changed("token_id", 5), "column token_id, row 1: 5 has the same key"),
        (changed("top_expert", -1), "column top_expert, row 1: -1"),
        (changed("std_entropy", -0.5), r"column std_entropy, row 1: -0\.5 is not from 0"),
        (changed("max_entropy", float("inf")), "column max_entropy, row 1: inf"),
        (changed("mean_confidence", 1.1), r"column mean_confidence, row 1: 1\.1 is not from 0 to 1"),
        (SPEC_ONLY.assign(layer=[0, -1, 0]), "column layer, row 1: -1"),
        (SPEC_ONLY.assign(order=[1, 2, 1]), "column order, row 1: 2 needs the column `context`"),
        (SPEC_ONLY.assign(context=[[5], [1, 3], [3]]), r"column context, row 1: \[1, 3\] must end in"),
        (SPEC_ONLY.assign(context=[[5], [-4, 9], [3]]), r"column context, row 1: \[-4, 9\] must hold ids"),
        (SPEC_ONLY.assign(context=[[5], [], [3]]), r"column context, row 1: \[\] must hold as many"),
        (SPEC_ONLY.assign(context=[[5], [1, 9], [3]], order=1), r"column context, row 1: \[1, 9\] must hold as many"),
        (SPEC_ONLY.assign(context=[1, 2, 3]), "column context holds int64, expected lists"),
        (SPEC_ONLY.assign(top1_counts=[[0, 0, 1], [1, 0], [0, 1, 0]]), "column top1_counts, row 1: .*must hold 3"),
        (SPEC_ONLY.assign(top1_counts=[[0, 0, 1], [9, 0, 0], [0, 1, 0]]), "row 1: .*more than `frequency`"),
        (SPEC_ONLY.assign(mean_probs=[[0.0, 0, 1], [-1, 2, 0], [0, 1, 0]]), "column mean_probs, row 1: "),
    ],
)
def test_a_bad_column_is_named(tmp_path, frame, message):
    path = tmp_path / "bad.parquet"
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=rf"bad\.parquet: .*{message}"):
        statsfile.read(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"version": 2}', "format version 2, this varjax reads 1"),
        ("{", "not a readable Parquet file"),
        ("[1]", "not a readable Parquet file"),
        ('{"num_experts": 2}', "column top_expert, row 0: 2 is not a whole number from 0 to 1"),
        ('{"num_experts": "eight"}', "metadata num_experts is eight"),
        ('{"tokens": 1.5}', r"metadata tokens is 1\.5"),
        ('{"orders": [2]}', r"column order, row 0: 1 is none of the orders \[2\]"),
        ('{"nonfinite": [0, 0]}', r"metadata nonfinite is \[0, 0\]; .* shape \(1,\)"),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, message):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pandas(SPEC_ONLY).replace_schema_metadata({"varjax": metadata}), path)
    with pytest.raises(ValueError, match=rf"bad\.parquet: .*{message}"):
        statsfile.read(path)


def test_no_file_and_no_parquet(tmp_path):
    with pytest.raises(FileNotFoundError, match="collect routing statistics first"):
        statsfile.read(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(ValueError, match=r"text\.parquet: not a readable Parquet file"):
        statsfile.read(tmp_path / "text.parquet")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.parquet"
    statsfile.write(path, some_stats(0), {})
    before = path.read_bytes()

    def broken(writer, table):
        raise OSError("disk full")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", broken)
    with pytest.raises(OSError, match="disk full"):
        statsfile.write(path, some_stats(1), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
