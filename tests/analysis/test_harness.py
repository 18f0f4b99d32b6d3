"""The adapter against the harness's own Hugging Face model, and VAR against the plain model."""

import copy
import dataclasses
import importlib
import json
import sys

import datasets
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.evaluate.harness_lm import HarnessLM, _wanted
from analysis.evaluate.losses import Caching, plain_runner, score
from analysis.harness import evaluate, main
from analysis.text.corpus import Document
from analysis.text.encoding import encode
from models import load_model
from models.generation import GenerationDefaults
from models.model import REFERENCE
from varjax import VARConfig, VARModel, load_table, statsfile
from varjax.errors import InputError
from varjax.routing import CACHED, FAST
from varjax.step import summary
from varjax.tablefiles import TableFiles

QUESTIONS = [
    ("The function returns a new", [" array", " zebra", "qqq"]),
    ("If True, the result is", [" returned", " volcano", "xzzx"]),
    ("The number of", [" elements", " Tuesday", "&&&"]),
]

ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """After every run the harness asks the machine what is installed on it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, saved_model, documents):
    """Routing statistics of `saved_model` on disk."""
    path = tmp_path_factory.mktemp("phase1") / "routing_stats.parquet"
    keys = choose_keys(saved_model, documents, 16, KeySettings(orders=(1,), min_count=3))
    stats = collect(saved_model, documents, keys, batch_size=4, max_length=16, progress=False)
    statsfile.write(path, stats, {"fingerprint": saved_model.fingerprint})
    return path


@pytest.fixture(scope="module")
def hflm():
    """The harness's own model on the reference checkpoint."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(REFERENCE), device="cpu", dtype="float32", batch_size=4, max_length=64)


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def task(rows, **fields) -> dict:
    """A local task whose documents are `rows`."""
    made = {"task": "local", "test_split": "test", "num_fewshot": 0, **fields}
    return made | {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}}


def results(lm, *tasks) -> dict:
    return evaluate(lm, tasks, task_manager=TaskManager(include_defaults=False))["results"]


def test_loglikelihoods_equal_the_harness_own_model(reference, hflm):
    long = "The shape of the array is given by its axes. " * 20
    asked = requests(
        "loglikelihood",
        *((context, choice) for context, choices in QUESTIONS for choice in choices),
        ("The number of", " the given value"),  # what greedy decoding says
        ("", "Return the number of elements."),
        ("A space ends this ", "array of values"),
        ("<s>The begin id is spelled", " out"),
        (long, " Its size too."),  # loses its beginning
        ("a", long[:150]),
    )
    ours = HarnessLM(reference, max_length=64, batch_size=4, progress=False).loglikelihood(asked, disable_tqdm=True)
    theirs = hflm.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in ours], [one for one, _ in theirs], rtol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}


def test_rolling_equals_the_harness_own_model_and_our_score(reference, hflm):
    texts = ["Return the number of elements along the axis. " * size for size in (1, 9, 40)]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    lm = HarnessLM(reference, max_length=64, batch_size=4, progress=False)
    ours = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours, hflm.loglikelihood_rolling(asked, disable_tqdm=True), rtol=1e-5)
    encoded = encode([Document(text, "g") for text in texts], reference.tokenizer, reference.config)
    settings = {"max_length": 64, "full_last": True, "prefix_id": lm.prefix_token_id, "progress": False}
    np.testing.assert_allclose(ours, -score(plain_runner(reference), None, encoded, **settings)[0].nll, rtol=1e-5)


def test_generation_equals_the_harness_own_model(reference, hflm):
    contexts = ["Return", "The number of elements in the", "If True, the", "Parameters\n", "Compute the mean of " * 20]
    settings = {"until": [".", "\n\n"], "max_gen_toks": 12}
    asked = requests("generate_until", *((context, settings) for context in contexts))
    ours = HarnessLM(reference, max_length=64, batch_size=2, progress=False).generate_until(asked, disable_tqdm=True)
    assert ours == hflm.generate_until(asked, disable_tqdm=True)
    assert all("." not in text for text in ours) and any(ours)


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"temperature": 0.0}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
def test_the_temperature_counts_only_where_the_task_samples(reference, given, temperature):
    lm = HarnessLM(reference, max_length=64, progress=False)
    assert _wanted(given | {"max_gen_toks": 4}, lm)[-1].temperature == temperature


def test_accuracy_of_questions_with_an_obvious_answer(reference):
    lm = HarnessLM(reference, batch_size=4, progress=False)
    rows = [{"question": question, "choices": choices} for question, choices in QUESTIONS]
    fields = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [ACCURACY],
    }
    for label, expected in ((0, 1.0), (1, 0.0), (2, 0.0)):
        assert results(lm, task(rows, doc_to_target=label, **fields))["local"]["acc,none"] == expected


def test_var_with_everything_open_equals_the_plain_model(saved_model, statistics):
    rows = [{"text": f"{n}: the router finds a table. the expert keeps a token."} for n in range(9)]
    tasks = [
        task(
            rows,
            task="choice",
            output_type="multiple_choice",
            doc_to_text="{{text}}",
            doc_to_choice=[" the layer", " a token drops", " keeps"],
            doc_to_target=0,
            metric_list=[
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        ),
        task(
            rows,
            task="rolling",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}],
        ),
        task(
            rows,
            task="free",
            output_type="generate_until",
            doc_to_text="{{text}}",
            doc_to_target="a",
            generation_kwargs={"until": ["."], "max_gen_toks": 4},
            metric_list=[ACCURACY | {"metric": "exact_match"}],
        ),
    ]
    nothing = VARConfig.from_routing_stats(statistics, frequency_threshold=10**9, confidence_threshold=1.0)
    models = saved_model, under_var(saved_model, nothing, statistics)
    plain, var = (HarnessLM(model, batch_size=4, max_length=32, progress=False) for model in models)
    theirs, ours = results(plain, *tasks), results(var, *tasks)
    assert theirs.keys() == {"choice", "rolling", "free"}
    for name, figures in theirs.items():
        numbers = {key: value for key, value in figures.items() if key.endswith(",none") and value != "N/A"}
        assert {key: ours[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4)
    assert int(np.asarray(var.state.counters.tokens).sum()) > 0 and plain.state is None


def under_var(model, config, statistics) -> VARModel:
    return VARModel(model, config, load_table(model, config, statistics))


@pytest.fixture
def cached(saved_model, statistics) -> VARModel:
    """Nothing in the table; whatever the router did once is repeated with one expert."""
    config = VARConfig.from_routing_stats(
        statistics, frequency_threshold=10**9, confidence_threshold=0.01, mass_threshold=0.1, context_window_size=2
    )
    return under_var(saved_model, config, statistics)


def test_requests_share_a_cached_tier_only_where_they_are_told_to(cached):
    asked = requests("loglikelihood", ("the router finds a", " table."))
    shared, own = (
        HarnessLM(cached, batch_size=1, max_length=32, caching=Caching(shared=shared), progress=False)
        for shared in (True, False)
    )
    first, again = (shared.loglikelihood(asked, disable_tqdm=True) for _ in range(2))
    assert first != again
    assert [own.loglikelihood(asked, disable_tqdm=True) for _ in range(2)] == [first, first]
    for lm in (shared, own):  # both count on
        assert int(tokens_of(lm).sum()) == 2 * 2 * len(lm.tok_encode("the router finds a table.")[:-1])
    assert (shared.settings["shared_cache"], own.settings["shared_cache"]) == (True, False)


def tokens_of(lm) -> np.ndarray:
    """int [L, 3]: by layer and tier."""
    layers = summary(lm.state.counters, 2)["layers"]
    return np.array([[round(share * one["tokens"]) for share in one["tiers"].values()] for one in layers])


CONTEXTS = [
    "the",
    "the router finds a table. the router finds a",
    "a token. the layer drops a table. a token",
    "the expert keeps a",
    "the router finds a table. the router finds",
    "the table meets a router. the table meets a",
    "the",
]
KINDS = {
    "loglikelihood": [(context, " table. the router keeps a token.") for context in CONTEXTS],
    "loglikelihood_rolling": [(f"{context} " * (1 + 5 * (index % 3)),) for index, context in enumerate(CONTEXTS)],
    "generate_until": [(context, {"until": ["!"], "max_gen_toks": 12}) for context in CONTEXTS],
}
DRAWN = [(context, {"until": ["!"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}) for context in CONTEXTS]


@pytest.mark.parametrize("tiers", ["plain", "table", "table and cache"])
def test_a_request_gets_the_same_in_any_company(saved_model, statistics, tiers):
    """All lengths are one, so that few programs are compiled; the table leaves rarer words to the cache."""
    config = VARConfig.from_routing_stats(
        statistics,
        frequency_threshold=300,
        entropy_threshold=5.0,
        confidence_threshold=0.01,
        mass_threshold=0.1,
        context_window_size=2,
        cache_size=64 if "cache" in tiers else 0,
    )
    model = saved_model if tiers == "plain" else under_var(saved_model, config, statistics)

    def answered(batch_size, order, kind):
        lm = HarnessLM(model, batch_size=batch_size, max_length=32, progress=False)
        asked = requests(kind, *(KINDS[kind][index] for index in order))
        given = getattr(lm, kind)(asked, disable_tqdm=True)
        return dict(zip(order, given, strict=True)), None if lm.state is None else tokens_and_experts(lm)

    everyone = list(range(len(CONTEXTS)))
    for kind in ["loglikelihood"] if tiers == "table" else KINDS:  # the cached tier is the harder case
        together, counted = answered(8, everyone, kind)
        alone = [answered(1, [index], kind) for index in everyone]
        others = [answered(1, everyone, kind), answered(3, everyone, kind), answered(8, everyone[::-1], kind)]
        for given, _ in [*others, *alone]:
            for index, one in given.items():
                if kind == "generate_until":
                    assert one == together[index]
                else:
                    assert one == pytest.approx(together[index], abs=1e-4)
        if counted is not None:
            for _, again in others:
                np.testing.assert_array_equal(again, counted)
            np.testing.assert_array_equal(sum(one for _, one in alone), counted)
            fast, cached = counted[:, [FAST, CACHED]].sum(axis=0)
            assert fast > 0 and (cached > 0) == ("cache" in tiers and kind != "loglikelihood")


def tokens_and_experts(lm) -> np.ndarray:
    """int [L, 4]: tokens by layer and tier, and experts that ran."""
    layers = summary(lm.state.counters, 2)["layers"]
    active = [[round(one["experts_per_token"] * one["tokens"])] for one in layers]
    return np.concatenate([tokens_of(lm), active], axis=1)


def test_a_sampled_text_is_drawn_alike_in_any_company(saved_model):
    def drawn(batch_size, order, seed=0):
        lm = HarnessLM(saved_model, batch_size=batch_size, max_length=64, seed=seed, progress=False)
        asked = requests("generate_until", *(DRAWN[index] for index in order))
        return dict(zip(order, lm.generate_until(asked, disable_tqdm=True), strict=True))

    together = drawn(4, range(6))
    assert drawn(4, range(5, -1, -1)) == together == drawn(1, range(6))
    assert drawn(4, range(6), seed=1) != together
    assert len(set(drawn(4, [0, 6]).values())) == 2  # the same context twice is drawn twice


def test_generation_in_batches_equals_generation_one_by_one_under_var(saved_model, statistics):
    config = VARConfig.from_routing_stats(statistics, frequency_threshold=3, entropy_threshold=5.0, cache_size=0)
    var_model = under_var(saved_model, config, statistics)
    contexts = ["the", "the router finds", "a token. the layer drops a table.", "the expert keeps a"]
    asked = requests("generate_until", *((context, {"until": ["!"], "max_gen_toks": 6}) for context in contexts))
    together = HarnessLM(var_model, batch_size=4, max_length=64, progress=False)
    alone = HarnessLM(var_model, batch_size=1, max_length=64, progress=False)
    assert together.generate_until(asked, disable_tqdm=True) == alone.generate_until(asked, disable_tqdm=True)
    assert int(np.asarray(together.state.counters.tokens)[:, 0].sum()) > 0  # the table answered


def test_what_cannot_be_done_is_said(saved_model):
    lm = HarnessLM(saved_model, max_length=8, progress=False)
    with pytest.raises(ValueError, match="expected 1 to max_length 8"):
        lm.loglikelihood(requests("loglikelihood", ("a", " the router finds a table and a layer")), disable_tqdm=True)
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until(requests("generate_until", ("a", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ValueError, match="8 new tokens"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 8})), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        HarnessLM(dataclasses.replace(saved_model, tokenizer=None))
    with pytest.raises(ValueError, match="include_path"):
        evaluate(lm, ["nonesuch"], task_manager=TaskManager(include_defaults=False))


def test_a_text_ends_with_any_end_id_of_the_checkpoint(saved_model):
    defaults = GenerationDefaults(1, (7, 9), None)
    lm = HarnessLM(dataclasses.replace(saved_model, generation_defaults=defaults), max_length=8, progress=False)
    assert (lm._until_end([5, 9, 6]), lm._until_end([5, 7]), lm._until_end([5, 6])) == ([5], [5], [5, 6])


def test_an_added_token_without_an_embedding_is_refused_in_a_text(saved_model):
    tokenizer = copy.deepcopy(saved_model.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    lm = HarnessLM(dataclasses.replace(saved_model, tokenizer=tokenizer), max_length=8, progress=False)
    assert lm.tok_encode("the router") == saved_model.tokenizer.encode("the router")
    with pytest.raises(InputError, match=r"a text holds '\[PAD\]', id 300, but the model's vocab_size is 300"):
        lm.tok_encode("the [PAD] router")


def test_without_the_harness_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    for name in ("analysis.harness", "analysis.evaluate.harness_lm"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"varjax\[eval\]"):
        importlib.import_module("analysis.harness")


def test_the_command_prints_the_table_and_writes_where_it_comes_from(tmp_path, model_directory, statistics, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"the router {n}"}) + "\n" for n in range(5)))
    (tmp_path / "local.yaml").write_text(f"""
task: local_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    config = VARConfig.from_routing_stats(statistics, frequency_threshold=3, entropy_threshold=5.0)
    config.save(tmp_path / "var.json", TableFiles.find(statistics))
    output = tmp_path / "result.json"
    given = ["--model", model_directory, "--var_config", tmp_path / "var.json", "--output", output]
    given += ["--tasks", "local_rolling", "--include_path", tmp_path, "--limit", 4, "--max_length", 32]
    main([str(one) for one in given])
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert "|local_rolling|" in printed and "bits_per_byte" in printed and str(output) in printed
    assert written["results"]["local_rolling"]["bits_per_byte,none"] > 0
    assert written["n-samples"]["local_rolling"]["effective"] == 4
    said = {name: written["settings"][name] for name in ("max_length", "stride", "prefix_id", "full_last", "limit")}
    assert said == {"max_length": 32, "stride": 32, "prefix_id": 1, "full_last": True, "limit": 4}
    assert written["tiers"]["fast"] > 0
    assert written["units"]["bits_per_byte"] == "bits, per byte of UTF-8"
    assert written["provenance"]["lm_eval"] == lm_eval.__version__
    assert written["provenance"]["model"]["fingerprint"]
    assert len(written["task_hashes"]["local_rolling"]) == 64
