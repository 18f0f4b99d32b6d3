"""The trace format: what is refused, what comes back from the file, contexts against a slow oracle, recording."""

import json
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr

from analysis.traces import recording as trace_recording
from analysis.traces import trace as trace_file
from analysis.traces.recording import record
from analysis.traces.trace import Trace, TraceError

LAYERS, TOP_K, EXPERTS = 3, 2, 5


def random_trace(seed: int, tokens: int = 60, documents: int = 5, vocabulary: int = 4, **changes) -> Trace:
    """Documents of random lengths with gaps in their positions; not every document has tokens."""
    rng = np.random.default_rng(seed)
    document = np.sort(rng.integers(0, documents, tokens)).astype(np.int32)
    position = np.cumsum(rng.choice([1, 1, 1, 2, 5], tokens)).astype(np.int32)
    experts = rng.permuted(np.tile(np.arange(EXPERTS), (tokens, LAYERS, 1)), axis=-1)[..., :TOP_K]
    probs = -np.sort(-rng.dirichlet(np.ones(EXPERTS), (tokens, LAYERS)), axis=-1)[..., :TOP_K]
    fields = {
        "token_id": rng.integers(0, vocabulary, tokens).astype(np.int32),
        "document": document,
        "position": position,
        "experts": experts.astype(np.int16),
        "probs": probs.astype(np.float32),
        "document_ids": tuple(f"text {i}" for i in range(documents)),
        "groups": tuple("ab"[i % 2] for i in range(documents)),
        "num_experts": EXPERTS,
        "token_strings": {0: "zero", 2: "two"},
        "origin": {"model": "tiny", "phase": "prefill"},
    }
    return Trace(**(fields | changes))


def assert_equal(ours: Trace, theirs: Trace) -> None:
    """The same tokens in the same documents; documents without tokens do not matter."""
    for name in ("token_id", "position", "experts"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    for name in ("probs", "entropy"):
        if getattr(theirs, name) is None:
            assert getattr(ours, name) is None
        else:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for names in ("document_ids", "groups"):
        ours_by_token, theirs_by_token = (np.array(getattr(t, names))[t.document].tolist() for t in (ours, theirs))
        assert ours_by_token == theirs_by_token
    for name in ("num_experts", "ranked", "probs_over", "scores", "origin", "notes"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"probs": None, "probs_over": None},
        {"probs": None, "probs_over": None, "ranked": False},
        {"probs": np.full((60, LAYERS, TOP_K), 0.5, np.float32), "probs_over": "chosen", "origin": {}},
        {"scores": "sigmoid", "notes": ("some tokens are left out",)},
        {"entropy": np.random.default_rng(0).random((60, LAYERS)).astype(np.float32)},
    ],
)
def test_a_trace_comes_back_from_its_file(tmp_path, changes):
    trace = random_trace(0, **changes)
    trace_file.write(tmp_path / "trace.parquet", trace)
    back = trace_file.read(tmp_path / "trace.parquet")
    assert_equal(back, trace)
    assert back.token_strings == {0: "zero", 2: "two"}
    assert trace_file.is_trace(pq.read_schema(tmp_path / "trace.parquet"))


def test_a_trace_without_tokens_comes_back(tmp_path):
    empty = random_trace(0).of(np.zeros(5, bool))
    trace_file.write(tmp_path / "trace.parquet", empty)
    assert_equal(trace_file.read(tmp_path / "trace.parquet"), empty)


def test_parts_equal_the_whole(tmp_path):
    trace = random_trace(1)
    with trace_file.writing(tmp_path / "parts.parquet", trace) as add:
        for half in (np.arange(5) < 2, np.arange(5) >= 2):
            add(trace.of(half))
    assert_equal(trace_file.read(tmp_path / "parts.parquet"), trace)


def test_an_interrupted_file_leaves_nothing(tmp_path):
    trace = random_trace(1)
    with (
        pytest.raises(RuntimeError, match="stop"),
        trace_file.writing(tmp_path / "parts.parquet", trace) as add,
    ):
        add(trace)
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_a_part_unlike_the_others_is_refused(tmp_path):
    trace = random_trace(1)
    with (
        pytest.raises(TraceError, match=r"parts\.parquet: this part has .*'num_experts': 6.* expected .*: 5"),
        trace_file.writing(tmp_path / "parts.parquet", trace) as add,
    ):
        add(replace(trace, num_experts=6))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), order=st.integers(1, 4), tokens=st.integers(0, 80))
def test_contexts_equal_a_slow_count(seed, order, tokens):
    trace = random_trace(seed, tokens, vocabulary=3)
    code = trace.contexts(order)
    meaning: dict[int, tuple] = {}
    places = {(d, p): t for d, p, t in zip(trace.document, trace.position, trace.token_id, strict=True)}
    for n, (d, p) in enumerate(zip(trace.document, trace.position, strict=True)):
        last = [places.get((d, p - back)) for back in range(order)]
        if None in last:
            assert code[n] == -1
        else:
            assert meaning.setdefault(code[n], tuple(last)) == tuple(last)
    assert len(set(meaning.values())) == len(meaning)
    assert sorted(meaning) == list(range(len(meaning)))


def test_the_documents_of_a_trace():
    trace = random_trace(2)
    chosen = np.array([True, False, True, False, False])
    part = trace.of(chosen)
    rows = chosen[trace.document]
    assert set(part.document.tolist()) <= {0, 2} and len(part.token_id) == rows.sum()
    np.testing.assert_array_equal(part.experts, trace.experts[rows])
    np.testing.assert_array_equal(part.probs, trace.probs[rows])
    assert part.document_ids == trace.document_ids


def test_the_split_follows_from_the_ids_alone():
    ids = tuple(f"text {i}" for i in range(2000))
    many = random_trace(0, documents=2000, document_ids=ids, groups=("g",) * 2000)
    backwards = random_trace(1, documents=2000, document_ids=ids[::-1], groups=("g",) * 2000)
    build = many.build_documents(0.7)
    assert 0.66 < build.mean() < 0.74
    np.testing.assert_array_equal(build[::-1], backwards.build_documents(0.7))
    assert (many.build_documents(0.3) <= build).all()


def changed(trace, name, place, value):
    array = getattr(trace, name).copy()
    array[place] = value
    return {name: array}


FAULTS = {
    "experts has shape": lambda t: {"experts": t.experts[..., 0]},
    r"expected \[60, layers": lambda t: {"experts": t.experts[:, :, :0]},
    r"position has shape \[59\]": lambda t: {"position": t.position[1:]},
    "5 document ids but 1 groups": lambda t: {"groups": ("a",)},
    "names a document twice": lambda t: {"document_ids": ("a", "a", "b", "c", "d")},
    "probs is there": lambda t: {"probs_over": None},
    "probs is missing": lambda t: {"probs": None},
    "probs has shape": lambda t: {"probs": t.probs[:, :1]},
    "ranked is False but": lambda t: {"ranked": False},
    "negative id": lambda t: changed(t, "token_id", 3, -1),
    "experts holds 0 to 5, expected 0 to 4": lambda t: changed(t, "experts", (0, 0, 0), 5),
    "outside its 5 documents": lambda t: changed(t, "document", -1, 5),
    "are not adjacent": lambda t: changed(t, "document", 0, 3),
    "position does not rise": lambda t: changed(t, "position", 1, t.position[0]),
    "an expert twice": lambda t: changed(t, "experts", (4, 1), 2),
    "entropy has shape": lambda t: {"entropy": t.probs[..., 0, 0]},
    "entropy holds figures outside 0 to ln 5": lambda t: {"entropy": np.full(t.probs.shape[:2], 1.7)},
    "no probability": lambda t: changed(t, "probs", (4, 1, 1), np.nan),
    "probs does not fall": lambda t: {"probs": t.probs[..., ::-1]},
    r"probs add up to as much as 1\.6, expected at most 1": lambda t: {"probs": np.full_like(t.probs, 0.8)},
    r"probs add up to 0\.8 to 0\.8 over the chosen experts, expected 1": lambda t: (
        {"probs": np.full_like(t.probs, 0.4), "probs_over": "chosen"}
    ),
    "no layer was captured": lambda t: {"experts": np.full_like(t.experts, -1)},
    "scores is 'tanh'": lambda t: {"scores": "tanh"},
}


@pytest.mark.parametrize("message", FAULTS)
def test_every_fault_is_named(message):
    trace = random_trace(0)
    with pytest.raises(TraceError, match=message):
        replace(trace, **FAULTS[message](trace))


def test_faults_are_named_together():
    trace = random_trace(0)
    with pytest.raises(TraceError, match=r"negative id.*probs does not fall"):
        replace(trace, probs=trace.probs[..., ::-1], **changed(trace, "token_id", 0, -1))


@pytest.fixture
def stored(tmp_path):
    """(path, table) of a small written trace; the table as another program would write it, without checksums."""
    path = tmp_path / "trace.parquet"
    trace_file.write(path, random_trace(3))
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"varjax_trace"])
    assert header.pop("sealed") is True
    return path, table.replace_schema_metadata({"varjax_trace": json.dumps(header)})


def with_header(table: pa.Table, **changes) -> pa.Table:
    header = json.loads(table.schema.metadata[b"varjax_trace"]) | changes
    return table.replace_schema_metadata({"varjax_trace": json.dumps(header)})


def test_a_foreign_file_with_plain_columns_is_read(stored):
    path, table = stored
    plain = {
        "token_str": pa.large_string(),
        "document": pa.string(),
        "group": pa.string(),
        "position": pa.int64(),
        "token_id": pa.uint16(),
        "experts": pa.list_(pa.int64()),
        "probs": pa.large_list(pa.float64()),
    }
    columns = {name: table[name].cast(kind) for name, kind in plain.items()}
    pq.write_table(pa.table(columns, metadata=table.schema.metadata), path, row_group_size=7)
    assert_equal(trace_file.read(path), random_trace(3))


def test_a_file_from_before_scores_were_declared_is_read(stored):
    path, table = stored
    header = json.loads(table.schema.metadata[b"varjax_trace"])
    older = {name: value for name, value in header.items() if name not in ("scores", "notes")}
    pq.write_table(table.replace_schema_metadata({"varjax_trace": json.dumps(older)}), path)
    assert_equal(trace_file.read(path), random_trace(3))


def test_scores_that_a_file_calls_none_are_not_taken_for_probabilities(stored):
    path, table = stored
    pq.write_table(with_header(table, scores="none"), path)
    trace = trace_file.read(path)
    assert (trace.probs, trace.probs_over, trace.ranked) == (None, None, True)


def without_value(name: str):
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        column = pa.array([None, *values[1:]], table[name].type)
        return table.set_column(table.schema.get_field_index(name), name, column)

    return change


SPOILED = {
    "trace version 2, this varjax reads 1": lambda t: with_header(t, version=2),
    "trace version None": lambda t: t.replace_schema_metadata({"varjax_trace": "[]"}),
    "Expecting value": lambda t: t.replace_schema_metadata({"varjax_trace": "no JSON"}),
    "no routing trace": lambda t: t.replace_schema_metadata({}),
    "metadata num_layers is 0": lambda t: with_header(t, num_layers=0),
    "metadata top_k is 'two'": lambda t: with_header(t, top_k="two"),
    "metadata ranked is None": lambda t: with_header(t, ranked=None),
    "metadata entropy is 'yes'": lambda t: with_header(t, entropy="yes"),
    "no column entropy": lambda t: with_header(t, entropy=True),
    "metadata probs_over is 'some'": lambda t: with_header(t, probs_over="some"),
    "metadata scores is 'tanh'": lambda t: with_header(t, scores="tanh"),
    "metadata notes is not a list": lambda t: with_header(t, notes="a text"),
    "add up to .* over the chosen experts, expected 1: they are not probabilities, so say": lambda t: with_header(
        t, probs_over="chosen"
    ),
    "no column group, probs": lambda t: t.drop_columns(["group", "probs"]),
    r"experts holds 360 figures, expected 2 \* 2 per token": lambda t: with_header(t, num_layers=2),
    "experts holds 0 to 4, expected 0 to 3": lambda t: with_header(t, num_experts=4),
    "column token_id misses 1": without_value("token_id"),
    "column document misses 1": without_value("document"),
    "column group misses 1": without_value("group"),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_spoiled_file_is_refused_by_name(stored, message):
    path, table = stored
    pq.write_table(SPOILED[message](table), path)
    with pytest.raises(TraceError, match=rf"trace\.parquet: .*{message}"):
        trace_file.read(path)


def test_expert_ids_that_are_too_wide_are_refused(stored):
    path, table = stored
    wide = [[70_000 + i for i in row] for row in table["experts"].to_pylist()]
    spoiled = table.set_column(table.schema.get_field_index("experts"), "experts", pa.array(wide, pa.list_(pa.int64())))
    pq.write_table(spoiled, path)
    with pytest.raises(TraceError, match=r"trace\.parquet: .*7000"):
        trace_file.read(path)


def test_what_is_no_trace_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.parquet: no such file"):
        trace_file.read(tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(TraceError, match=r"text\.parquet: not a readable Parquet file"):
        trace_file.read(tmp_path / "text.parquet")


READING = {"batch_size": 4, "max_length": 16, "progress": False}


def asked(model, ids: np.ndarray) -> np.ndarray:
    """float32 [n, L, E]: the gates over one text, window by window."""
    windows = [ids[start : start + 16] for start in range(0, len(ids), 16)]
    padded = [(np.pad(window, (0, 16 - len(window)))[None], np.arange(16)[None] < len(window)) for window in windows]
    return np.concatenate([model(*one).router_probs[:, 0] for one in padded], axis=1).swapaxes(0, 1)[: len(ids)]


@pytest.fixture(scope="module")
def documents(documents):
    """The first sixty, cut to multiples of eight ids, so that windows have two shapes."""
    return [replace(one, ids=one.ids[: len(one.ids) // 8 * 8]) for one in documents[:60] if len(one.ids) >= 8]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, saved_model, documents):
    """The trace of the tiny model over its documents, in windows of 16 tokens, a few hundred tokens at a time."""
    path = tmp_path_factory.mktemp("recorded") / "trace.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_recording, "_TOGETHER", 300)
        assert record(saved_model, iter(documents), path, **READING) == 0
    return trace_file.read(path)


def test_a_recorded_trace_is_what_the_model_says(recorded, saved_model, documents):
    special = saved_model.config.special_token_ids
    assert recorded.document_ids == tuple(document.id for document in documents)
    assert recorded.groups == tuple(document.group for document in documents)
    assert (recorded.probs_over, recorded.ranked, recorded.num_experts) == ("all", True, 4)
    assert len(recorded.token_id) == sum(int(np.sum(~np.isin(one.ids, special))) for one in documents)
    longest = int(np.argmax([len(one.ids) for one in documents]))
    assert len(documents[longest].ids) > 32  # three windows
    for index in (0, 1, longest):
        ids = documents[index].ids
        rows = recorded.document == index
        position = np.flatnonzero(~np.isin(ids, special))
        np.testing.assert_array_equal(recorded.position[rows], position)
        np.testing.assert_array_equal(recorded.token_id[rows], ids[position])
        probs = asked(saved_model, ids)[position]
        best = np.argsort(-probs, axis=-1)[..., :2]
        np.testing.assert_array_equal(recorded.experts[rows], best)
        np.testing.assert_allclose(recorded.probs[rows], np.take_along_axis(probs, best, axis=-1), rtol=1e-4)
        np.testing.assert_allclose(recorded.entropy[rows], entr(probs).sum(axis=-1), rtol=1e-4)


def test_a_recorded_trace_says_where_it_comes_from(recorded, saved_model):
    assert recorded.origin["revision"] == saved_model.fingerprint
    assert (recorded.origin["model"], recorded.origin["phase"]) == (saved_model.name, "prefill")
    assert recorded.origin["dtype"] == "float32" and len(recorded.origin["tokenizer"]) == 64
    token = int(recorded.token_id[0])
    assert recorded.token_strings[token] == saved_model.tokenizer.convert_ids_to_tokens(token)


def test_recording_stops_at_max_tokens(tmp_path, recorded, saved_model, documents):
    record(saved_model, documents, tmp_path / "some.parquet", max_tokens=100, **READING)
    some = trace_file.read(tmp_path / "some.parquet")
    read = np.cumsum([len(document.ids) for document in documents])
    assert len(some.document_ids) == 1 + np.searchsorted(read, 100)
    assert len(some.token_id) == 100 - len(some.document_ids)  # the begin ids are read but not written
    np.testing.assert_array_equal(some.token_id, recorded.token_id[: len(some.token_id)])
    np.testing.assert_array_equal(some.experts, recorded.experts[: len(some.token_id)])


def test_tokens_with_a_broken_router_are_left_out_and_counted(tmp_path, saved_model, documents):
    """An embedding that is not a number spoils its token and those that look back at it."""
    ids = documents[0].ids
    spoiled = int(ids[5])
    embedding = saved_model.params["decoder"]["embed"]["embedding"].at[spoiled].set(np.nan)
    params = saved_model.params | {"decoder": saved_model.params["decoder"] | {"embed": {"embedding": embedding}}}
    broken = replace(saved_model, params=params)
    left_out = record(broken, documents[:3], tmp_path / "broken.parquet", **READING)
    back = trace_file.read(tmp_path / "broken.parquet")
    counted = finite = 0
    for document in documents[:3]:
        ordinary = ~np.isin(document.ids, saved_model.config.special_token_ids)
        good = np.isfinite(asked(broken, document.ids)).all(axis=(1, 2))
        counted += int(np.sum(ordinary & ~good))
        finite += int(np.sum(ordinary & good))
    assert left_out == counted > 0
    assert len(back.token_id) == finite > 0
    assert spoiled not in back.token_id

    all_broken = replace(broken, params=jax.tree.map(lambda leaf: leaf * np.float32(np.nan), broken.params))
    with pytest.raises(TraceError, match=r"none\.parquet: no token to write, .* left out"):
        record(all_broken, documents[:3], tmp_path / "none.parquet", **READING)
    assert not (tmp_path / "none.parquet").exists()


def test_a_document_that_comes_twice_is_refused(tmp_path, saved_model, documents):
    with pytest.raises(TraceError, match="comes twice"):
        record(saved_model, documents[:1] * 2, tmp_path / "t.parquet", **READING)
