"""Phase 1's memory does not grow with the corpus."""

import re
from pathlib import Path

import numpy as np
import pytest

from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.text.encoding import Encoded
from varjax import keys as keys_module

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
    once, tenfold = peak_bytes(lambda: run(300)), peak_bytes(lambda: run(3000))
    assert tenfold <= 1.05 * once, f"{once / 2**20:.0f} MiB, then {tenfold / 2**20:.0f} MiB"
    assert undercounts[-1] > undercounts[1] > 0  # the count of rare contexts was bounded, and says so
