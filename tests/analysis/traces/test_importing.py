"""Foreign traces: what comes out best first, what is filled in, and what is refused by name."""

import json
import sys
import tracemalloc

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
    probs = rng.dirichlet(np.ones(TOP_K if over == "chosen" else EXPERTS), (TOKENS, LAYERS))
    probs = np.sort(probs, axis=-1)[..., -TOP_K:]  # the largest, as a router chooses
    probs = rng.permuted(probs, axis=-1)
    return {
        "token": rng.integers(0, 5, TOKENS),
        "experts": experts.astype(np.uint8),
        "probs": probs.astype(np.float16),
        "document": np.sort(rng.integers(0, 4, TOKENS)),
        "position": np.arange(TOKENS) * 2,
    }


def with_(array: np.ndarray, place, value) -> np.ndarray:
    """A signed copy with another value at a place."""
    copy = array.astype(np.int64 if array.dtype.kind == "u" else array.dtype)
    copy[place] = value
    return copy


def padded(array: np.ndarray, columns: int = 2) -> np.ndarray:
    """With more columns, of -1."""
    signed = array.astype(np.int64 if array.dtype.kind == "u" else array.dtype)
    return np.pad(signed, ((0, 0), (0, 0), (0, columns)), constant_values=-1)


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
    [("chosen", None, "chosen"), ("all", None, "all"), ("chosen", "chosen", "chosen"), ("chosen", "all", "all")],
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


@pytest.mark.parametrize("experts", [1, 3])
def test_where_all_experts_are_chosen_their_probabilities_are_those_of_the_whole_gate(tmp_path, experts):
    rng = np.random.default_rng(0)
    values = arrays() | {
        "experts": np.tile(np.arange(experts, dtype=np.uint8), (TOKENS, LAYERS, 1)),
        "probs": rng.dirichlet(np.ones(experts), (TOKENS, LAYERS)),
    }
    trace = import_npz(stored(tmp_path, values, num_experts=experts, top_k=experts))
    assert trace.probs_over == "all" and trace.captured.all()
    expected = -np.sum(values["probs"] * np.log(values["probs"]), axis=-1)
    np.testing.assert_allclose(trace.entropy, expected, atol=1e-5)


def test_one_expert_per_token_is_ranked(tmp_path):
    values = {**arrays(), "experts": arrays()["experts"][..., :1]}
    del values["probs"]
    assert import_npz(stored(tmp_path, values, top_k=1)).ranked


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
    r"experts has shape \[38, 2, 3\].* or 36 rows where the last token of each": lambda v: (
        v | {name: v[name][2:] for name in ("experts", "probs")}
    ),
    "experts holds -1 at some tokens of a layer": lambda v: v | {"experts": with_(v["experts"], (3, 1), -1)},
    "2 to 2 ids at some tokens, expected top_k=3": lambda v: (
        v | {"experts": with_(padded(v["experts"]), (3, 1, 0), -1), "probs": padded(v["probs"])}
    ),
    "probs holds NaN or infinity": lambda v: v | {"probs": with_(v["probs"], 0, np.nan)},
    r"probs has shape \[39, 2, 3\], expected that of experts, \[40, 2, 3\], or \[40, 2, 8\]": lambda v: (
        v | {"probs": v["probs"][1:]}
    ),
    r"probs has shape \[40, 2, 2\]": lambda v: v | {"probs": v["probs"][..., :2]},
    "experts holds 9, expected 0 to 7": lambda v: v | {"experts": v["experts"] + np.uint8(2)},
    "so it does not hold softmax prob": lambda v: v | {"probs": v["probs"] - np.float16(0.5)},
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
        ("num_experts", 2**15, r"log\.json: num_experts is 32,768, expected at most 32,767"),
        ("top_k", None, r"log\.json: top_k is None"),
        ("ranked", 1, r"log\.json: ranked is 1"),
        ("probs_over", "some", r"log\.json: probs_over is 'some'"),
        ("scores", "tanh", r"log\.json: scores is 'tanh', expected one of softmax, sigmoid, logits, none"),
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


def test_the_real_trace(real_trace):
    trace = real_trace
    assert (len(trace.token_id), trace.num_layers, trace.top_k, trace.num_experts) == (189_976, 24, 4, 32)
    assert len(trace.document_ids) == 615 and trace.probs_over == "chosen"
    assert trace.token_strings[int(trace.token_id[0])]


def scored(folder, values, experts=((0, 1, 2), (3, 5, 4)), **fields):
    """A trace of 40 equal tokens with scores [L, K or E]."""
    repeated = {name: np.tile(np.array(one), (TOKENS, 1, 1)) for name, one in (("experts", experts), ("probs", values))}
    rest = {name: value for name, value in arrays().items() if name not in repeated}
    return import_npz(stored(folder, rest | repeated, **fields))


def test_sigmoid_scores_are_divided_by_their_sum(tmp_path):
    trace = scored(tmp_path, [[0.9, 0.6, 0.3], [0.2, 0.1, 0.2]], scores="sigmoid")
    np.testing.assert_allclose(trace.probs[0], [[0.5, 1 / 3, 1 / 6], [0.4, 0.4, 0.2]], rtol=1e-6)
    assert trace.experts[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (trace.scores, trace.probs_over, trace.entropy) == ("sigmoid", "chosen", None)
    assert "sigmoid scores divided by their sum over the 3 chosen experts: a definition" in " ".join(trace.remarks())

    of_all = [0.9, 0.8, 0.7, 0.2, 0.1, 0.1, 0.1, 0.1]  # 3.0 together
    trace = scored(tmp_path, [of_all, of_all], scores="sigmoid")
    np.testing.assert_allclose(trace.probs[0], np.array([[0.9, 0.8, 0.7], [0.2, 0.1, 0.1]]) / 3, rtol=1e-6)
    shares = np.array(of_all) / 3
    np.testing.assert_allclose(trace.entropy, -np.sum(shares * np.log(shares)), rtol=1e-6)
    assert trace.probs_over == "all"

    trace = scored(tmp_path, np.full((2, 3), 0.1), scores="sigmoid", probs_over="all")  # divided already
    np.testing.assert_allclose(trace.probs, 0.1, rtol=1e-6)


def test_logits_become_a_softmax(tmp_path):
    of_all = np.log([[0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]] * 2) + 7
    trace = scored(tmp_path, of_all, ((1, 0, 2), (7, 1, 0)), scores="logits")
    np.testing.assert_allclose(trace.probs[0], [[0.4, 0.2, 0.1], [0.4, 0.2, 0.05]], rtol=1e-5)
    assert trace.experts[0].tolist() == [[0, 1, 2], [0, 1, 7]]
    shares = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    np.testing.assert_allclose(trace.entropy, -np.sum(shares * np.log(shares)), rtol=1e-5)
    assert (trace.scores, trace.probs_over) == ("logits", "all")
    assert "softmax of the trace's logits over all experts" in " ".join(trace.remarks())

    trace = scored(tmp_path, np.log([[3.0, 1.0, 4.0], [1.0, 2.0, 1.0]]), scores="logits")
    np.testing.assert_allclose(trace.probs[0], [[0.5, 0.375, 0.125], [0.5, 0.25, 0.25]], rtol=1e-5)
    assert trace.probs_over == "chosen" and trace.entropy is None


def test_scores_that_are_no_probabilities_only_rank(tmp_path):
    trace = scored(tmp_path, [[2.5, 0.1, 7.0], [-1.0, -3.0, -2.0]], scores="none")
    assert trace.experts[0].tolist() == [[2, 0, 1], [3, 4, 5]]
    assert (trace.probs, trace.probs_over, trace.ranked) == (None, None, True)
    assert "only their order was used" in " ".join(trace.remarks())


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ([[0.9, 0.8, 0.45], [0.9, 0.8, 0.45]], {}),  # sigmoid scores, in sums of 2.15
        ([[0.3, 0.1, 0.05], [0.3, 0.2, 0.05]], {}),  # logits in 0 to 1: too little is left for five others below 0.05
        ([[0.9, 0.8, 0.45], [0.5, 0.3, 0.2]], {"scores": "softmax"}),
        ([[0.5, 0.25, 0.15], [0.5, 0.3, 0.2]], {"probs_over": "chosen"}),  # 0.9 together
        ([[1.25, 0.75, 0.5], [1.25, 0.75, 0.5]], {}),  # weights, scaled by 2.5
        ([[-0.5, 1.0, 0.5], [0.5, 0.3, 0.2]], {}),
        ([[1.2, 0.8, 0.45], [0.9, 0.8, 0.45]], {"scores": "sigmoid"}),
        ([[0.125] * 7 + [0.3]] * 2, {}),  # of all experts, 1.175 together
    ],
)
def test_what_cannot_be_what_it_is_taken_for_is_refused_with_what_to_declare(tmp_path, values, fields):
    found = r'array probs holds .* in sums over .*, so it does not hold .* "scores": "softmax", "sigmoid", "logits"'
    with pytest.raises(TraceError, match=found):
        scored(tmp_path, values, **fields)


def test_scores_that_do_not_go_with_the_other_fields_are_refused(tmp_path):
    values = arrays()
    del values["probs"]
    with pytest.raises(TraceError, match="scores is 'sigmoid' but there is no array probs"):
        import_npz(stored(tmp_path, values, scores="sigmoid"))
    with pytest.raises(TraceError, match="probs_over is 'chosen' but probs has the scores of all 8"):
        scored(tmp_path, np.full((2, 8), 0.125), probs_over="chosen")
    with pytest.raises(TraceError, match="probs_over is 'all' but logits are given for the chosen experts only"):
        scored(tmp_path, np.ones((2, 3)), scores="logits", probs_over="all")


def test_what_a_softmax_with_another_choice_gives_must_be_declared(tmp_path):
    """Where groups or a bias decide the choice, the chosen are not the largest."""
    values = [[0.3, 0.1, 0.05], [0.3, 0.2, 0.05]]
    trace = scored(tmp_path, values, scores="softmax")
    np.testing.assert_allclose(trace.probs[0], values, rtol=1e-6)
    assert trace.probs_over == "all" and not trace.remarks()


def test_columns_of_minus_one_are_padding(tmp_path):
    values = arrays()
    tidy = import_npz(stored(tmp_path, values))
    wide = values | {"experts": padded(values["experts"]), "probs": padded(values["probs"])}
    wide["experts"][5, 1] = [-1, *wide["experts"][5, 1, :3], -1]  # anywhere in the row
    wide["probs"][5, 1] = [9.0, *wide["probs"][5, 1, :3], 9.0]
    trace = import_npz(stored(tmp_path, wide))
    np.testing.assert_array_equal(trace.experts, tidy.experts)
    np.testing.assert_array_equal(trace.probs, tidy.probs)
    whole = values | {
        "experts": padded(values["experts"], EXPERTS - TOP_K),
        "probs": np.full((TOKENS, LAYERS, 8), 0.125),
    }
    with pytest.raises(TraceError, match="so its order is not known; give experts with 3 columns"):
        import_npz(stored(tmp_path, whole))


def test_the_last_token_of_a_document_may_have_no_row(tmp_path):
    values = arrays()
    mixed = np.random.default_rng(1).permutation(TOKENS)
    whole = import_npz(stored(tmp_path, values))
    last = np.append(whole.document[1:] != whole.document[:-1], True)
    for order in (np.arange(TOKENS), mixed):
        shuffled = {name: array[order] for name, array in values.items()}
        short = shuffled | {name: shuffled[name][~last[order]] for name in ("experts", "probs")}
        trace = import_npz(stored(tmp_path, short))
        for name in ("token_id", "document", "position", "experts", "probs"):
            np.testing.assert_array_equal(getattr(trace, name), getattr(whole, name)[~last])
        assert "The last token of each of the 4 documents has no routing, and is left out." in trace.remarks()


def test_tokens_without_any_routing_are_left_out(tmp_path):
    values = arrays()
    values["experts"] = with_(values["experts"], [3, 17], -1)
    trace = import_npz(stored(tmp_path, values))
    kept = np.delete(np.arange(TOKENS), [3, 17])
    np.testing.assert_array_equal(trace.token_id, values["token"][kept])
    np.testing.assert_array_equal(trace.position, values["position"][kept])
    assert "2 tokens have -1 in every layer: not routed, and left out." in trace.remarks()
    values["experts"] = np.concatenate([np.zeros_like(values["experts"][:, :1]), values["experts"]], axis=1)
    values["probs"] = np.concatenate([values["probs"][:, :1], values["probs"]], axis=1)
    with_dense = import_npz(stored(tmp_path, values, num_layers=LAYERS + 1))  # its first layer has no experts
    assert with_dense.captured.tolist() == [False, True, True]
    np.testing.assert_array_equal(with_dense.experts[:, 1:], trace.experts)


@pytest.mark.parametrize(("first", "step"), [(1_700_000_000, 1), (1_700_000_000_000_000_000, 1000)])
def test_document_numbers_may_have_gaps_and_be_large(tmp_path, first, step):
    values = arrays()
    tidy = import_npz(stored(tmp_path, values))
    numbers = first + step * values["document"]
    tracemalloc.start()
    trace = import_npz(stored(tmp_path, values | {"document": numbers}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(trace.document, tidy.document)
    assert trace.document_ids == tuple(str(first + step * i) for i in range(4))
    assert trace.groups == ("log",) * 4
    assert peak < 5e6


def test_a_byte_order_mark_before_the_fields_does_no_harm(tmp_path):
    path = stored(tmp_path, arrays())
    (tmp_path / "log.json").write_text(json.dumps(FIELDS), encoding="utf-8-sig")
    assert import_npz(path).num_layers == LAYERS
