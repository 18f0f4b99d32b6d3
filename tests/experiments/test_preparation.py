"""The preparing scripts as a user runs them: what they write, print and refuse."""

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoSibling

from analysis.text.corpus import load_documents
from analysis.text.prepared import open_prepared, read_manifest
from models.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from tests.running import run_python

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def script(capsys):
    """`script(name, *arguments) -> str`: run it in this process; what it prints."""

    def run(name: str, *arguments: object) -> str:
        run_python([str(SCRIPTS / name), *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def prepare(script, model_directory, tmp_path):
    def run(*arguments: object) -> str:
        return script("prepare_datasets.py", "--model", model_directory, "--output", tmp_path / "out", *arguments)

    return run


@pytest.fixture
def tokenizer_only(tmp_path):
    """A directory with another tokenizer and nothing else."""
    save_tokenizer(train_bpe(["other text entirely"] * 3, 270), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def refused(call, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert str(stop.value).startswith("error: ")
    return str(stop.value)


def times(folder: Path) -> dict[Path, int]:
    """When each file below the folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- datasets --------------------------------------------------------------------------------------------------------


def test_datasets_are_prepared_each_in_its_folder(prepare, corpus_file, model_directory, tmp_path):
    shutil.copytree(corpus_file.parent, tmp_path / "folder")
    printed = prepare("--dataset", corpus_file, tmp_path / "folder", "--split", "build", "--num_samples", 20)
    documents = load_documents(corpus_file, split="build", limit=20)
    for name in ("sentences-build", "folder-build"):
        prepared = open_prepared(tmp_path / "out" / name, load_tokenizer(model_directory), check_hashes=True)
        assert [one.id for one in prepared] == [one.id for one in documents]
    manifest = read_manifest(tmp_path / "out" / "sentences-build")
    for words in (str(corpus_file), "split build", "20", f"{manifest.tokens:,}", "bytes/token", "sentences-build"):
        assert words in printed


def test_the_same_request_does_nothing_and_another_one_is_refused(prepare, corpus_file, tokenizer_only, tmp_path):
    prepare("--dataset", corpus_file, "--max_tokens", 200)
    before = times(tmp_path / "out")
    assert "kept (see --overwrite)" in prepare("--dataset", corpus_file, "--max_tokens", 200)
    for other in (("--max_tokens", 300), ("--max_tokens", 200, "--tokenizer", tokenizer_only)):
        message = refused(prepare, "--dataset", corpus_file, *other)
        assert "sentences" in message and "--overwrite" in message and "max_tokens=200" in message
    assert times(tmp_path / "out") == before

    prepare("--dataset", corpus_file, "--tokenizer", tokenizer_only, "--overwrite")
    assert len(open_prepared(tmp_path / "out" / "sentences", load_tokenizer(tokenizer_only))) == 160


def test_short_names_stand_for_the_hubs(script):
    names = runpy.run_path(str(SCRIPTS / "prepare_datasets.py"))
    full, folder = names["_full_name"], names["_folder_name"]
    assert full("c4") == "allenai/c4:en"
    assert full("c4:validation") == "allenai/c4:en:validation"
    assert full("wikitext2:test") == "Salesforce/wikitext:wikitext-2-raw-v1:test"
    assert full("slimpajama") == "DKYoon/SlimPajama-6B"
    assert full("slimpajama:test") == "DKYoon/SlimPajama-6B::test"
    assert full("owner/other:config") == "owner/other:config"
    assert folder("owner/other:config", "tune") == "owner-other-config-tune"
    assert folder("wikitext2:test", None) == "wikitext2-test"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "no_such_file.txt"), "no_such_file.txt: no such file"),
        (("--dataset", "owner/no-such-dataset"), "owner/no-such-dataset: neither a file here nor a dataset that opens"),
        (("--dataset", "a/b", "a:b"), "would get the same folder"),
        (("--model", "no/such/directory"), "no/such/directory is no directory"),
        (("--num_samples", "0"), "limit must be at least 1"),
        (("--max_tokens", "0"), "max_tokens must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_message(prepare, corpus_file, tmp_path, arguments, message):
    assert message in refused(prepare, "--dataset", corpus_file, *arguments)
    assert not list(tmp_path.iterdir())  # nothing half written


def test_a_directory_without_a_tokenizer_is_refused(prepare, corpus_file, tmp_path):
    assert "holds no tokenizer" in refused(prepare, "--dataset", corpus_file, "--model", tmp_path)


def test_what_is_in_the_way_is_said_before_any_work(prepare, corpus_file, tmp_path):
    prepare("--dataset", corpus_file)
    shutil.copy(corpus_file, tmp_path / "first.jsonl")
    refused(prepare, "--dataset", tmp_path / "first.jsonl", corpus_file, "--num_samples", 3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sentences"]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(model_directory, monkeypatch):
    """The hub's two calls, answered by the tiny model's directory."""
    files = [RepoSibling(path.name, path.stat().st_size) for path in sorted(model_directory.iterdir())]

    def snapshot_download(repo, *, local_dir, allow_patterns, **_):
        for name in allow_patterns:
            shutil.copy(model_directory / name, local_dir)

    info = SimpleNamespace(sha="f" * 40, siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_model_is_fetched_and_its_directory_ready(script, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = script("download_models.py", "--model", "owner/tiny", "--dry_run")
    assert "model.safetensors" in printed and "GB are free at checkpoints/tiny" in printed
    assert printed.splitlines()[-1] == "dry run: nothing was downloaded"
    assert not list(tmp_path.iterdir())

    printed = script("download_models.py", "--model", "owner/tiny")
    assert printed.splitlines()[-1] == "checkpoints/tiny is ready: use it with --model checkpoints/tiny"
    assert (tmp_path / "checkpoints" / "tiny" / "model.safetensors").is_file()
    assert "contents as published on the hub" in script("download_models.py", "--verify_only", "checkpoints/tiny")


def test_a_local_directory_is_verified(script, model_directory, tmp_path):
    printed = script("download_models.py", "--verify_only", model_directory)
    assert "contents were not compared" in printed
    assert printed.splitlines()[-1] == f"{model_directory} is ready: use it with --model {model_directory}"
    broken = shutil.copytree(model_directory, tmp_path / "broken")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-5])
    assert "model.safetensors: was damaged" in refused(script, "download_models.py", "--verify_only", broken)


def test_no_network_is_one_message_and_leaves_nothing(script, tmp_path):
    message = refused(script, "download_models.py", "--model", "owner/tiny", "--output", tmp_path / "deep" / "here")
    assert "owner/tiny cannot be fetched: the hub cannot be reached" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["prepare_datasets.py", "download_models.py"])
def test_help(script, name, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name, "--help")
    assert stop.value.code == 0
    assert "--output" in capsys.readouterr().out
