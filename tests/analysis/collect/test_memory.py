"""Phase 1's memory does not grow with the corpus, nor beyond its bounds with the experts."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from analysis.collect.run import CollectSettings
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.text.encoding import Encoded
from models.config import read_config
from varjax import keys as keys_module
from varjax.answers import Answers, init
from varjax.stats import bytes_a_key

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stream:
    """So many documents of 100 random tokens, made as they are read: almost every trigram is a new one."""

    def __init__(self, documents: int):
        self.documents = documents

    def __iter__(self):
        rng = np.random.default_rng(0)
        for index in range(self.documents):
            yield Encoded(rng.integers(3, 300, 100).astype(np.int32), f"{index:064x}", "g", words=1, bytes=1)


def peak_bytes(call) -> int:
    CLEAR.write_text("5")  # begin a new high-water mark
    call()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()).group(1))


@pytest.mark.skipif(not CLEAR.exists(), reason="the peak of one stretch of a process is known on Linux only")
def test_ten_times_the_tokens_need_no_more_memory(saved_model, monkeypatch):
    monkeypatch.setattr(keys_module, "_CHUNK", 1 << 13)
    settings = KeySettings(min_count=1, max_keys=2000, capacity=1 << 13)
    undercounts = []

    def run(documents: int) -> None:
        keys = choose_keys(saved_model, Stream(documents), 64, settings)
        undercounts.append(keys.orders[-1].undercount)
        stats = collect(saved_model, Stream(documents), keys, batch_size=16, max_length=64, progress=False)
        assert stats.documents == documents
        assert (stats.count.sum(1) + stats.absent.sum() == 3 * stats.tokens).all()  # nothing lost unreported

    run(20)  # compiles
    once, tenfold = peak_bytes(lambda: run(150)), peak_bytes(lambda: run(1500))
    assert tenfold <= 1.05 * once, f"{once / 2**20:.0f} MiB, then {tenfold / 2**20:.0f} MiB"
    assert undercounts[-1] > undercounts[1] > 0  # the count of rare contexts was bounded, and says so


@pytest.mark.parametrize("name", ["qwen3_moe_config.json", "olmoe_config.json"])
def test_the_published_sizes_stay_within_the_bounds(shared_data, name):
    config = read_config(shared_data / name)
    settings = CollectSettings(keys=KeySettings(max_keys=None))
    most = settings._keys_of(config, config.num_layers).max_keys
    assert most > 50_000  # what Phase 1 takes unless told otherwise
    assert most * bytes_a_key(config.num_layers, config.num_experts) <= settings.stats_bytes

    pairs = settings._pairs_of(config, config.num_layers)
    shape = config.num_layers, config.num_experts + pairs
    answers = Answers(
        keys=np.zeros((0, 3), np.int32),
        layers=tuple(range(config.num_layers)),
        entry=jax.ShapeDtypeStruct((config.num_layers, 1 + pairs, config.num_experts), np.int32),
        mean=jax.ShapeDtypeStruct((*shape, config.hidden_size), np.float32),  # float64 on the host: JAX asks which
        **{field: jax.ShapeDtypeStruct(shape, np.float32) for field in ("mass", "m2", "count")},
        nonfinite=np.zeros(config.num_layers, np.int64),
        typical=np.zeros(config.num_layers),
        outliers=np.zeros((config.num_layers, 2), np.int64),
        inputs=jax.ShapeDtypeStruct((*shape, 0), np.float32),
    )
    sums = jax.tree.leaves(jax.eval_shape(init, answers))
    assert pairs > 8_000 and sum(leaf.size * leaf.dtype.itemsize for leaf in sums) <= settings.answer_bytes
    every = config.vocab_size * config.num_layers * config.num_experts * config.hidden_size * 4
    assert every > 90 * settings.answer_bytes  # what a sum for every token id, layer and expert would take
