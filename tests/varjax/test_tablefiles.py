"""The files of a table are found next to each other and in saved configs; those that do not fit are refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from varjax import LayerPolicy, VARConfig, answersfile, checksums, statsfile
from varjax.answers import Answers
from varjax.errors import InputError
from varjax.stats import RoutingStats
from varjax.tablefiles import TableFiles, answers_next_to, saved_files

SOME = Answers.empty(np.zeros((1, 1), np.int32), (0,), 2, 4)


def some_stats(count: int) -> RoutingStats:
    """One key that occurred `count` times."""
    stats = RoutingStats.empty(np.zeros((1, 1), np.int32), (1,), 1, 2)
    half = dataclasses.replace(stats.entropy, **{name: np.full((1, 1), 0.5) for name in ("mean", "min", "max")})
    counted = {"count": np.full((1, 1), count), "top1_counts": np.full((1, 1, 2), [count, 0])}
    return dataclasses.replace(stats, **counted, entropy=half, confidence=half, sum_probs=np.full((1, 1, 2), count / 2))


@pytest.fixture
def stats(tmp_path):
    path = tmp_path / "s.parquet"
    statsfile.write(path, some_stats(3), {"fingerprint": "abc"})
    return path


def write_answers(path, stats):
    answersfile.write(path, SOME, {"statistics": statsfile.identity(stats)})
    return str(path)


def test_answers_are_found_next_to_the_statistics(stats, tmp_path):
    assert TableFiles.find(stats) == TableFiles(str(stats))
    assert VARConfig.from_routing_stats(stats, cache_size=3) == VARConfig(
        default=LayerPolicy(experts_kept=None, use_answers=False), cache_size=3
    )
    former = write_answers(tmp_path / "s.residuals.safetensors", stats)
    assert TableFiles.find(stats).answers == former == str(answers_next_to(stats))
    beside = write_answers(tmp_path / "s.answers.safetensors", stats)
    assert TableFiles.find(stats).answers == beside == str(answers_next_to(stats))
    assert VARConfig.from_routing_stats(stats).default == LayerPolicy()
    elsewhere = shutil.copy(beside, tmp_path / "own.safetensors")
    assert TableFiles.find(stats, elsewhere) == TableFiles(str(stats), str(elsewhere))


def test_missing_and_foreign_files_are_named(stats, tmp_path):
    with pytest.raises(FileNotFoundError, match="collect routing statistics first"):
        TableFiles.find(tmp_path / "none.parquet")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        TableFiles.find(stats, tmp_path / "none.safetensors")
    (tmp_path / "text.parquet").write_bytes(b"not a table")
    with pytest.raises(ValueError, match=r"text\.parquet: not a Parquet file"):
        TableFiles.find(tmp_path / "text.parquet")


def test_answers_of_other_statistics_are_refused(stats, tmp_path):
    """Of other texts, seen in their counts, or of another model."""
    own = tmp_path / "own.safetensors"
    write_answers(own, stats)
    for count, fingerprint in ((4, "abc"), (3, "def")):
        statsfile.write(stats, some_stats(count), {"fingerprint": fingerprint})
        with pytest.raises(
            ValueError, match=r"own\.safetensors: these answers belong to other statistics, .* give the"
        ):
            TableFiles.find(stats, own)
    answersfile.write(own, SOME, {})
    with pytest.raises(ValueError, match="these answers name no statistics"):
        TableFiles.find(stats, own)


def test_the_digest_tells_contents_apart_but_not_places(tmp_path):
    def digest(name, content):
        (tmp_path / name).write_bytes(content)
        return TableFiles(str(tmp_path / name)).digest()

    assert digest("a.parquet", b"statistics") == digest("b.parquet", b"statistics")
    assert digest("a.parquet", b"statistics") != digest("a.parquet", b"other statistics")


def test_a_saved_config_names_its_files(stats, tmp_path):
    path, files = tmp_path / "config.json", TableFiles(str(stats), "its own")
    VARConfig(cache_size=7).save(path, files)
    assert VARConfig.load(path) == VARConfig(cache_size=7) and saved_files(path) == files
    VARConfig().save(path)
    assert saved_files(path) is None
    for moved in ("s.parquet", "/elsewhere/s.parquet"):
        VARConfig().save(path, TableFiles(moved))
        assert saved_files(path) == TableFiles(str(stats))
    checksums.write_json(path, {"routing_stats": str(stats), "residuals": "old"})  # as an earlier version did
    assert VARConfig.load(path) == VARConfig() and saved_files(path) == TableFiles(str(stats), "old")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cache_size": 8}))
    with pytest.raises(ValueError, match=r"config\.json: was damaged"):
        saved_files(path)


def test_a_name_without_a_folder_is_that_of_a_file_next_to_the_config(stats, tmp_path, monkeypatch):
    path, elsewhere = tmp_path / "config.json", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / stats.name).write_bytes(stats.read_bytes())
    VARConfig().save(path, TableFiles(stats.name))
    assert saved_files(path) == TableFiles(str(stats))
    stats.unlink()
    assert saved_files(path) == TableFiles(stats.name)  # of the working directory, as the command that saved it


@pytest.mark.parametrize("named", ["stats.parquet", {"routing_stats": 5}, {"routing_stats": "s", "answers": ["a"]}])
def test_a_config_that_names_its_files_wrongly_is_refused(named, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"table": named}))
    with pytest.raises(InputError, match=r"config\.json: table=.*: expected the paths routing_stats and answers"):
        saved_files(path)
