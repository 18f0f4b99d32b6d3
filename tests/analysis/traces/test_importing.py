"""Foreign traces: what comes out best first, what is filled in, and what is refused by name."""

import json
import sys

import numpy as np
import pytest

from analysis.traces import trace as trace_file
from analysis.traces.importing import import_npz, load, main
from analysis.traces.trace import TraceError

LAYERS, TOP_K, EXPERTS, TOKENS = 2, 3, 8, 40
FIELDS = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "model": "some/model"}


def arrays(seed: int = 0, over: str = "chosen") -> dict[str, np.ndarray]:
    """Tokens of 4 documents; probabilities float16, in no order."""
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.tile(np.arange(EXPERTS), (TOKENS, LAYERS, 1)), axis=-1)[..., :TOP_K]
    probs = rng.dirichlet(np.ones(TOP_K if over == "chosen" else EXPERTS), (TOKENS, LAYERS))[..., :TOP_K]
    return {
        "token": rng.integers(0, 5, TOKENS),
        "experts": experts.astype(np.uint8),
        "probs": probs.astype(np.float16),
        "document": np.sort(rng.integers(0, 4, TOKENS)),
        "position": np.arange(TOKENS) * 2,
    }


def stored(folder, values, **fields):
    np.savez(folder / "log.npz", **values)
    (folder / "log.json").write_text(json.dumps(FIELDS | fields))
    return folder / "log.npz"


def test_experts_come_out_best_first(tmp_path):
    values = arrays()
    values["probs"][0, 0] = np.float16(1 / 3)  # equal ones keep their order
    trace = import_npz(stored(tmp_path, values))
    for n, layer in np.ndindex(TOKENS, LAYERS):
        ours = list(zip(trace.probs[n, layer].tolist(), trace.experts[n, layer].tolist(), strict=True))
        pairs = zip(values["probs"][n, layer].tolist(), values["experts"][n, layer].tolist(), strict=True)
        assert ours == sorted(pairs, key=lambda pair: -pair[0])
    assert trace.ranked and trace.probs_over == "chosen"
    assert trace.probs.dtype == np.float32 and trace.experts.dtype == np.int16
    assert trace.origin == {"model": "some/model"}
    assert trace.groups == ("log",) * 4 and trace.document_ids == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("over", "said", "expected"),
    [("chosen", None, "chosen"), ("all", None, "all"), ("all", "chosen", "chosen"), ("chosen", "all", "all")],
)
def test_what_the_probabilities_are_taken_over(tmp_path, over, said, expected):
    assert import_npz(stored(tmp_path, arrays(0, over), probs_over=said)).probs_over == expected


@pytest.mark.parametrize(("said", "ranked"), [({}, False), ({"ranked": True}, True), ({"ranked": False}, False)])
def test_without_probabilities_the_order_is_kept(tmp_path, said, ranked):
    values = arrays()
    del values["probs"]
    trace = import_npz(stored(tmp_path, values, **said))
    np.testing.assert_array_equal(trace.experts, values["experts"])
    assert (trace.probs, trace.probs_over, trace.ranked) == (None, None, ranked)


def test_tokens_may_come_in_any_order(tmp_path):
    values = arrays()
    tidy = import_npz(stored(tmp_path, values))
    mixed = np.random.default_rng(1).permutation(TOKENS)
    messy = import_npz(stored(tmp_path, {name: array[mixed] for name, array in values.items()}))
    for name in ("token_id", "document", "position", "experts", "probs"):
        np.testing.assert_array_equal(getattr(messy, name), getattr(tidy, name))


def test_without_positions_the_tokens_of_a_document_follow_each_other(tmp_path):
    values = arrays() | {"document": np.arange(TOKENS) % 4}
    del values["position"]
    trace = import_npz(stored(tmp_path, values))
    np.testing.assert_array_equal(trace.document, np.repeat(np.arange(4), 10))
    np.testing.assert_array_equal(trace.position, np.tile(np.arange(10), 4))
    np.testing.assert_array_equal(trace.token_id[:10], values["token"][::4])


def test_texts_groups_and_ids(tmp_path):
    named = {"token_strings": list("abcde"), "document_group": list("xxyz"), "document_id": list("stuv")}
    trace = import_npz(stored(tmp_path, arrays(), **named))
    assert trace.token_strings == dict(enumerate("abcde"))
    assert (trace.groups, trace.document_ids) == (tuple("xxyz"), tuple("stuv"))


def test_the_command_writes_a_trace_file(tmp_path, monkeypatch, capsys):
    source = stored(tmp_path, arrays())
    monkeypatch.setattr(sys, "argv", ["importing", str(source), str(tmp_path / "out" / "log.parquet")])
    main()
    assert "40 tokens of 4 documents, 2 layers, 3 of 8 experts, probabilities over chosen" in capsys.readouterr().out
    ours, theirs = load(tmp_path / "out" / "log.parquet"), load(source)
    np.testing.assert_array_equal(ours.probs, theirs.probs)
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    assert ours.origin == theirs.origin
    assert trace_file.read(tmp_path / "out" / "log.parquet").probs_over == "chosen"


BAD_ARRAYS = {
    "no array experts, document": lambda v: {"token": v["token"]},
    "array token is float64, expected integers": lambda v: v | {"token": v["token"] / 1},
    "array probs is uint8, expected floats": lambda v: v | {"probs": v["experts"]},
    r"array position has shape \[39\]": lambda v: v | {"position": v["position"][1:]},
    r"array token has shape \[40, 1\]": lambda v: v | {"token": v["token"][:, None]},
    "array document holds -1": lambda v: v | {"document": v["document"] - 1},
    r"experts has shape \[40, 1, 3\], expected \[40, 2, 3\]": lambda v: v | {"experts": v["experts"][:, :1]},
    r"probs has shape \[40, 2, 2\]": lambda v: v | {"probs": v["probs"][..., :2]},
    "experts holds 9, expected 0 to 7": lambda v: v | {"experts": v["experts"] + np.uint8(2)},
    "no probability": lambda v: v | {"probs": v["probs"] - np.float16(0.5)},
    "position does not rise": lambda v: v | {"position": v["position"] * 0},
    "not a readable .npz": lambda v: v | {"token": np.array([{}] * TOKENS)},
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path, message):
    with pytest.raises(TraceError, match=rf"log\.npz: .*{message}"):
        import_npz(stored(tmp_path, BAD_ARRAYS[message](arrays())))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, r"log\.json: num_layers is 0, expected a whole number"),
        ("top_k", None, r"log\.json: top_k is None"),
        ("ranked", 1, r"log\.json: ranked is 1"),
        ("probs_over", "some", r"log\.json: probs_over is 'some'"),
        ("token_strings", {}, r"log\.json: token_strings is not a list"),
        ("token_strings", ["a"], r"log\.npz: token holds 4 but token_strings has only 1"),
        ("document_group", ["a"], r"log\.npz: .*outside its 1 documents"),
        ("document_group", [1], r"log\.json: document_group is not a list of strings"),
        ("document_id", list("aabc"), r"log\.npz: .*names a document twice"),
    ],
)
def test_bad_fields_are_named(tmp_path, field, value, message):
    with pytest.raises(TraceError, match=message):
        import_npz(stored(tmp_path, arrays(), **{field: value}))


def test_files_that_are_missing_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.npz: no such file"):
        import_npz(tmp_path / "log.npz")
    path = stored(tmp_path, arrays())
    (tmp_path / "log.json").write_text("[]")
    with pytest.raises(TraceError, match=r"log\.json: holds a JSON list"):
        import_npz(path)
    (tmp_path / "log.json").write_text("{")
    with pytest.raises(TraceError, match=r"log\.json: not valid JSON"):
        import_npz(path)
    (tmp_path / "log.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"log\.json: no such file"):
        import_npz(path)
    (tmp_path / "log.json").write_text(json.dumps(FIELDS))
    for content in (b"text", b"PK\x03\x04 broken", path.read_bytes()[:400]):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"log\.npz: not a readable \.npz"):
            import_npz(path)
    np.save(tmp_path / "log.npy", np.zeros(3))
    (tmp_path / "log.npy").rename(path)
    with pytest.raises(TraceError, match=r"log\.npz: not a readable \.npz"):
        import_npz(path)


def test_the_real_trace(shared_data):
    trace = import_npz(shared_data / "traces" / "gpt_oss_20b.npz")
    assert (len(trace.token_id), trace.num_layers, trace.top_k, trace.num_experts) == (189_976, 24, 4, 32)
    assert len(trace.document_ids) == 615 and trace.probs_over == "chosen"
    assert trace.token_strings[int(trace.token_id[0])]
