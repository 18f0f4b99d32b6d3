"""Every file that varjax writes, damaged at random: reading names the file, or gives what was written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from analysis.checkpoints import Checkpoints, note, resumed
from analysis.evaluate import points as scored_points
from analysis.evaluate.comparison import read_result
from analysis.evaluate.losses import Scores
from analysis.report.provenance import write_json
from analysis.text import embedded
from analysis.text.corpus import load_documents
from analysis.text.prepared import MANIFEST, Request, open_prepared, prepare
from analysis.traces import trace as traces
from models.config import MoEConfig
from models.download import RECORD, _read_record
from models.parameters import init_params
from models.weights import SINGLE_FILE, locate_tensors, read_headers, save_params
from tests.damage import damaged
from tests.synthetic_traces import make_trace
from tuning.points import Outcome, Point, read_chosen, write_chosen
from varjax import VARConfig, answersfile, checksums, statefile, statsfile
from varjax import cache as context_cache
from varjax.answers import Answers
from varjax.drift import Calibrated, Calibration, Stream
from varjax.errors import InputError
from varjax.stats import RoutingStats
from varjax.step import Counters, VARState
from varjax.tablefiles import TableFiles

TIMES = 300
MODEL = MoEConfig(
    vocab_size=40,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=4,
    top_k=2,
)


class Kind(NamedTuple):
    """A kind of file."""

    write: Callable[[Path], Path]  # into a folder; returns the file that is to be damaged
    read: Callable[[Path], Any]  # the file, with what lies next to it


def statistics(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    stats = RoutingStats.empty(np.arange(30, dtype=np.int32)[:, None], (1,), 2, 4)
    top1 = rng.integers(0, 9, stats.top1_counts.shape)
    count = top1.sum(axis=-1)
    half = np.where(count > 0, 0.5, np.nan)
    moments = dataclasses.replace(stats.entropy, mean=half, min=half, max=half)
    observed = {"count": count, "top1_counts": top1, "sum_probs": top1 / 2, "entropy": moments, "confidence": moments}
    statsfile.write(folder / "s.parquet", dataclasses.replace(stats, **observed), {"fingerprint": "abc"})
    return folder / "s.parquet"


def answers(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    empty = Answers.empty(np.arange(9, dtype=np.int32)[:, None], (0, 1), 4, 6)
    count = rng.integers(1, 9, empty.count.shape)
    observed = {"mean": rng.normal(size=empty.mean.shape), "mass": count * 0.5, "m2": count * 0.1, "count": count}
    some = dataclasses.replace(empty, **observed)
    answersfile.write(folder / "a.safetensors", some, {"fingerprint": "abc", "statistics": "def"})
    return folder / "a.safetensors"


def trace(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    experts = rng.random((200, 2, 4)).argsort(axis=-1)[..., :2]
    probs = -np.sort(-rng.random((200, 2, 2))).astype(np.float32) / 2
    ids = rng.integers(0, 20, 200)
    traces.write(folder / "t.parquet", make_trace(experts, 4, token_id=ids, probs=probs, origin={"model": "tiny"}))
    return folder / "t.parquet"


def some_state(value: int) -> VARState:
    cache = context_cache.init(8, 2, 2, 2)
    counters = jax.tree.map(lambda leaf: leaf + jnp.uint32(value), Counters._zero(2))
    return VARState(dataclasses.replace(cache, ids=cache.ids + value), jnp.full((2, 1), value, jnp.int32), counters)


def state(folder: Path) -> Path:
    statefile.save(folder, some_state(7), np.int32(5), {"fingerprint": "abc", "cache_size": 8})
    return folder / statefile.FILE


LIKE = some_state(0)
VALUE = {"sums": np.arange(300.0), "count": np.ones((2, 7), np.int32), "tokens": 5}


def read_state(path: Path) -> VARState:
    return statefile.load(path.parent, LIKE, np.int32(9), {"fingerprint": "abc", "cache_size": 8})


def evaluation(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    figures = rng.integers(5, 90, (3, 40))
    ids = tuple(f"d{i}" for i in range(40))
    scores = Scores(ids, ("g",) * 40, rng.normal(300, 60, 40), *figures, max_length=16, stride=8)
    scores.save(folder / "r.documents.parquet")
    digest = checksums.digest_of_file(folder / "r.documents.parquet")
    beside = {"documents_file": "r.documents.parquet", "documents_sha256": digest, "mode": "var"}
    write_json(folder / "r.json", scores.summary() | beside)
    return folder / "r.json"


def best_configs(folder: Path) -> Path:
    outcome = Outcome(0.001, 0.002, 50, False, 1.2, 0.1, {}, 1.3)
    points = [Point(n, {}, VARConfig(frequency_threshold=10 + n), outcome) for n in range(3)]
    write_chosen(folder, points, 0.01, TableFiles("s.parquet"), {"seed": 0})
    return folder / "best_configs.json"


def calibration(folder: Path) -> Path:
    values = tuple(Calibrated(Stream("error", layer), 30, 0.1, 0.0, 0.25) for layer in range(3))
    Calibration("abc", "def", 0.05, 30, values).save(folder / "c.json")
    return folder / "c.json"


def model(folder: Path) -> Path:
    save_params(folder, init_params(MODEL, jax.random.key(0)), MODEL)
    return folder / SINGLE_FILE


def read_model(path: Path) -> Any:
    """As `load_params` begins."""
    locate_tensors(read_headers(path.parent), MODEL)
    return load_file(path)


def cache_of_embedded(folder: Path) -> Path:
    embedded.save([(f"text {i} of the corpus", "ab"[i % 2]) for i in range(40)], folder / "e.jsonl")
    return folder / "e.jsonl"


def read_embedded(path: Path) -> Any:
    found = embedded._kept(path)
    if found is None:
        raise InputError(f"{path}: parsed again")  # as `embedded.rows` does
    return found


def noted(folder: Path) -> Path:
    note(folder / "run.json", {"model": "abc", "settings": {"batch": 4}}, {"tokens": 17})
    return folder / "run.json"


def checkpoint(folder: Path) -> Path:
    saved = Checkpoints(folder / "steps")
    saved.save(3, VALUE)
    return folder / "steps" / "checkpoint.safetensors"


def read_checkpoint(path: Path) -> Any:
    saved = Checkpoints(path.parent)
    return saved.newest(VALUE)


def losses(folder: Path) -> Path:
    names = [f"d{i}" for i in range(20)]
    scored_points._write(
        folder / "l.parquet", scored_points.Point(names, names, np.arange(20) / 3, np.arange(20), 1.5, 0.25)
    )
    return folder / "l.parquet"


def record(folder: Path) -> Path:
    files = [{"name": f"file-{i}", "size": i, "sha256": "ab" * 32, "git_sha1": None} for i in range(4)]
    checksums.write_json(folder / RECORD, {"repo": "a/b", "revision": "c", "files": files})
    return folder / RECORD


def config(folder: Path) -> Path:
    VARConfig(cache_size=7, layers={0: None}).save(folder / "v.json")
    return folder / "v.json"


def certificate(folder: Path) -> Path:
    write_json(
        folder / "certificate.json", {"certificate": {"level": 0.95, "bounds": [0.1, 0.2]}, "title": "Certificate"}
    )
    return folder / "certificate.json"


def documents_of(path: Path) -> Any:
    return read_result(path.with_name("r.json"))


KINDS = {
    "statistics": Kind(statistics, statsfile.read),
    "answers": Kind(answers, answersfile.read),
    "trace": Kind(trace, traces.read),
    "state": Kind(state, read_state),
    "evaluation": Kind(evaluation, read_result),
    "documents of an evaluation": Kind(lambda f: evaluation(f).with_name("r.documents.parquet"), documents_of),
    "certificate": Kind(certificate, lambda path: checksums.read_json(path, "certify again")),
    "best_configs": Kind(best_configs, read_chosen),
    "config": Kind(config, VARConfig.load),
    "calibration of an audit": Kind(calibration, Calibration.load),
    "model": Kind(model, read_model),
    "embedded corpus": Kind(cache_of_embedded, read_embedded),
    "checkpoint of a pass": Kind(checkpoint, read_checkpoint),
    "note of a run": Kind(noted, lambda path: resumed(path, {"model": "abc", "settings": {"batch": 4}})),
    "losses of a study": Kind(losses, scored_points._read),
    "record of a download": Kind(record, lambda path: _read_record(path.parent)),
}


def frozen(value: Any) -> Any:
    """What can be compared: arrays as their bytes, dataclasses as their fields."""
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return (array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, pd.DataFrame):
        return value.to_json(double_precision=15)
    if dataclasses.is_dataclass(value):
        return [frozen(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {key: frozen(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(one) for one in value]
    return value


def check(kind: Kind, path: Path, seed: int, times: int = TIMES) -> int:
    """Damage the file time after time; nothing but the errors of a bad file may come of it. Returns how many did."""
    content, rng = path.read_bytes(), np.random.default_rng(seed)
    whole = frozen(kind.read(path))
    noticed = 0
    for number in range(times):
        path.write_bytes(damaged(content, rng))
        checksums._digest_of_file.cache_clear()  # two files within one tick of the file system's clock
        try:
            found = kind.read(path)
        except (InputError, OSError) as error:
            assert str(path) in str(error), f"damage {number}: {error}"
            noticed += 1
        else:
            assert frozen(found) == whole, f"damage {number} passed"
    path.write_bytes(content)
    assert frozen(kind.read(path)) == whole
    return noticed


@pytest.mark.parametrize("name", KINDS)
def test_no_damage_passes_silently(tmp_path, name):
    kind = KINDS[name]
    assert check(kind, kind.write(tmp_path), seed=list(KINDS).index(name)) > 0.8 * TIMES


@pytest.mark.parametrize("file", [MANIFEST, "shard-00000.arrow"])
def test_no_damage_to_a_prepared_corpus_passes_silently(tmp_path, corpus_file, saved_model, file):
    some = load_documents(corpus_file)[:20]
    prepare(some, saved_model.tokenizer, tmp_path / "p", Request("x"), progress=False)
    kind = Kind(lambda folder: folder, lambda path: list(open_prepared(path.parent)))
    assert check(kind, tmp_path / "p" / file, seed=20) > 0.8 * TIMES
