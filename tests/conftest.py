"""Every test runs on the CPU (unless JAX_PLATFORMS says otherwise) and under strict dtype promotion."""

import atexit
import ctypes
import dataclasses
import gc
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network
# Compiling is most of what the tests do, so LLVM spends little on each program, and where XLA has two generators of
# code for a CPU (jaxlib 0.10), the older one writes it in a third of the time. XLA's own passes all run. Tests that
# hold two different programs against each other bit for bit are marked `optimized`, and test_optimized.py runs them
# compiled as users' programs are. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment all are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

# What is compiled twice in a run, by pytest's workers, by the processes that tests start, by files that share a model,
# is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="varjax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import numpy as np
import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.maps import with_maps
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.text.corpus import load_documents
from analysis.text.encoding import Encoded, encode
from models import Model, MoEConfig, load_model
from models.parameters import init_params
from models.tokenizer import save_tokenizer, train_bpe
from models.weights import save_params
from varjax import LayerPolicy, VARConfig, VARModel
from varjax.table import build_table

jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOM = 1.2e9  # bytes that a worker may hold from one file of tests to the next


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops compiled programs after a file of tests if this process has grown beyond `ROOM`.

    A program takes about 20 MB, and mappings, of which Linux gives a process 65,530 unless told otherwise; beyond them
    the compiler crashes. What is needed again is read from the cache on disk.
    """
    yield
    status = Path("/proc/self/statm")
    if status.exists() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > ROOM:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed unless asked


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("optimized") and jax.config.read("jax_disable_most_optimizations"):
        pytest.skip("test_optimized.py runs it")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data next to the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data) is not here")
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """160 short documents in JSONL, sentences over a small vocabulary: frequent tokens and bigrams, two groups."""
    rng = np.random.default_rng(0)
    nouns, verbs = ("router", "expert", "token", "layer", "table"), ("finds", "keeps", "drops", "meets")
    path = tmp_path_factory.mktemp("corpus") / "sentences.jsonl"
    with path.open("w") as file:
        for index in range(160):
            sentences = [
                f"the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}." for _ in range(rng.integers(1, 6))
            ]
            json.dump({"text": f"{index}: " + " ".join(sentences), "group": "ab"[index % 2]}, file)
            file.write("\n")
    return path


@pytest.fixture(scope="session")
def even_corpus(tmp_path_factory) -> Path:
    """500 documents of about 27 tokens, so that windows of 32 have one shape; enough for every split."""
    rng = np.random.default_rng(1)
    nouns, verbs = ("router", "expert", "token", "layer", "table"), ("finds", "keeps", "drops", "meets")
    path = tmp_path_factory.mktemp("even") / "sentences.jsonl"
    texts = [
        f"{i}: " + " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}." for _ in range(3))
        for i in range(500)
    ]
    path.write_text("\n".join(json.dumps({"text": text, "group": "a"}) for text in texts))
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory, corpus_file) -> Path:
    """A random tiny Mixtral on disk, with a tokenizer of 300 entries trained on `corpus_file`."""
    folder = tmp_path_factory.mktemp("model")
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    save_tokenizer(train_bpe(texts, 300), folder, max_length=64)
    config = MoEConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        num_experts=4,
        top_k=2,
        initializer_range=0.3,
    )
    save_params(folder, init_params(config, jax.random.key(0)), config)
    return folder


@pytest.fixture(scope="session")
def saved_model(model_directory) -> Model:
    """With the engine whose programs compile in half the default's time; `tests/models` compares all engines."""
    return load_model(model_directory, implementation="reference")


@pytest.fixture(scope="session")
def documents(saved_model, corpus_file) -> list[Encoded]:
    """The documents of `corpus_file` in the ids of `saved_model`."""
    return encode(load_documents(corpus_file), saved_model.tokenizer, saved_model.config)


@pytest.fixture(scope="session")
def even_documents(documents) -> list[Encoded]:
    """137 of them, those of 16 ids or more, cut to these: windows of 16 have one shape, and programs compile once."""
    return [dataclasses.replace(one, ids=one.ids[:16]) for one in documents if len(one.ids) >= 16]


@pytest.fixture(scope="session")
def small_var_models(saved_model, even_documents) -> dict[str, VARModel]:
    """`saved_model`, one expert kept and the answers at the first 60 documents' frequent tokens added.

    The answers are constant or affine; with affine ones, layer 1 leaves the first token of a text open.
    """
    reading = {"batch_size": 4, "max_length": 16, "progress": False}
    some, others = even_documents[:60], even_documents[60:80]
    stats = collect(saved_model, some, choose_keys(saved_model, some, 16, KeySettings((1,), min_count=3)), **reading)
    constant = collect_answers(saved_model, some, stats.keys, range(2), inputs=True, **reading)
    affine = with_maps(saved_model, constant, some, others, 4, 1.0, **reading)
    affine = dataclasses.replace(affine, outliers=np.array([[0, 0], [1, 0]]))
    config = VARConfig(frequency_threshold=3, entropy_threshold=5.0, default=LayerPolicy(experts_kept=1), cache_size=0)
    return {
        name: VARModel(saved_model, config, table=build_table(config, stats, answers, top_k=saved_model.config.top_k))
        for name, answers in (("constant", constant), ("affine", affine))
    }


@pytest.fixture(scope="session")
def small_var_model(small_var_models) -> VARModel:
    """The one with constant answers."""
    return small_var_models["constant"]
