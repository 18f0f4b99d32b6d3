"""Fetching and verifying checkpoints: a stubbed hub on a local folder; each damage named; whole or not there."""

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling
from safetensors.numpy import load_file, save_file

from models import CheckpointError, ConfigError, load_model
from models.config import read_config
from models.download import RECORD, DownloadError, RemoteFile, _damage, check_disk, download, look_up, verify
from models.tokenizer import save_tokenizer, train_bpe
from models.weights import load_params, save_params

INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def sharded(model_directory, tmp_path_factory):
    """The tiny model in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    config = read_config(model_directory / "config.json")
    save_params(folder, load_params(model_directory, config)[0], config, shard_bytes=20_000)
    for path in model_directory.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def directory(sharded, tmp_path):
    """A good directory, for a test to spoil."""
    return shutil.copytree(sharded, tmp_path / "model")


@pytest.fixture
def hub(directory, monkeypatch):
    """A hub with one repository, whose files are those of `directory`; `fetched` lists what was transferred."""
    hub = SimpleNamespace(folder=directory.rename(directory.with_name("hub")), fetched=[], after=None)

    def sibling(path):
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            return RepoSibling(path.name, len(content), "?", BlobLfsInfo(len(content), sha(content), 130))
        return RepoSibling(path.name, len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())

    def model_info(self, repo, *, revision=None, files_metadata=False):
        assert files_metadata
        return SimpleNamespace(sha=COMMIT, siblings=[sibling(path) for path in sorted(hub.folder.iterdir())])

    def snapshot_download(repo, *, revision, local_dir, allow_patterns):
        assert revision == COMMIT
        for path in sorted(hub.folder.iterdir()):
            if any(fnmatch(path.name, one) for one in allow_patterns) and not (local_dir / path.name).exists():
                if len(hub.fetched) == hub.after:
                    raise ConnectionError("reset by peer")
                shutil.copy(path, local_dir)
                hub.fetched.append(path.name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit_index(change):
    def spoil(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


# --- verification ----------------------------------------------------------------------------------------------------


def test_a_whole_directory_is_verified_without_a_network(directory, saved_model):
    verified = verify(directory, progress=False)
    tensors = {name: value for file in shards(directory) for name, value in load_file(file).items()}
    assert verified.files == len(shards(directory)) > 2
    assert (verified.tensors, verified.parameters) == (len(tensors), sum(value.size for value in tensors.values()))
    assert verified.bytes == sum(value.nbytes for value in tensors.values())
    assert (verified.hashed, verified.tokenizer) == (0, 300)
    assert load_model(directory).fingerprint == saved_model.fingerprint


def test_one_file_and_no_tokenizer_are_whole_too(model_directory, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_directory / name, tmp_path)
    verified = verify(tmp_path, progress=False)
    assert (verified.files, verified.tokenizer) == (1, None)


def unseal(folder) -> None:
    """Rewrite the shards as other programs do, without a checksum."""
    for shard in shards(folder):
        save_file(load_file(shard), shard)


def truncate(folder) -> None:
    for shard in shards(folder)[1:3]:
        shard.write_bytes(shard.read_bytes()[:-7])


def lengthen(folder) -> None:
    with shards(folder)[1].open("ab") as file:
        file.write(b"more")


def spoil_header(folder) -> None:
    content = shards(folder)[1].read_bytes()
    shards(folder)[1].write_bytes(content[:8] + b"?" * 40 + content[48:])


def move_a_tensor(index) -> None:
    places = index["weight_map"]
    (places["model.norm.weight"],) = {places["model.embed_tokens.weight"]} - {places["model.norm.weight"]}


def change_a_shape(folder) -> None:
    for shard in shards(folder):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            save_file(tensors | {"lm_head.weight": np.ones((3, 4), np.float32)}, shard)


def large_tokenizer(folder) -> None:
    texts = [f"some {n} words {n * n} more {n**3}" for n in range(300)]
    save_tokenizer(train_bpe(texts, 320), folder)


FAULTS = {
    "truncated": (truncate, ["model-00002-of", "do not match their checksum", "fetch or save the file again"]),
    "truncated-without-checksum": (
        lambda d: (unseal(d), truncate(d)),
        ["model-00002-of", "model-00003-of", "truncated or not safetensors", "fetch the file again"],
    ),
    "empty": (lambda d: shards(d)[1].write_bytes(b""), ["model-00002-of", "truncated or not safetensors"]),
    "lengthened": (lambda d: (unseal(d), lengthen(d)), ["model-00002-of", "truncated or not safetensors"]),
    "header": (lambda d: (unseal(d), spoil_header(d)), ["model-00002-of", "truncated or not safetensors"]),
    "shard-missing": (lambda d: shards(d)[1].unlink(), ["missing: model-00002-of", "fetch"]),
    "elsewhere": (
        edit_index(move_a_tensor),
        [INDEX, "model.norm.weight is in model-", "the index says model-00001-of"],
    ),
    "not-named": (
        edit_index(lambda i: i["weight_map"].pop("model.norm.weight")),
        [INDEX, "model.norm.weight is in", "the index says nothing about it"],
    ),
    "not-there": (
        edit_index(lambda i: i["weight_map"].update(extra=i["weight_map"]["lm_head.weight"])),
        [INDEX, "extra is in no file"],
    ),
    "total-size": (edit_index(lambda i: i["metadata"].update(total_size=7)), [INDEX, "total_size 7"]),
    "shape": (change_a_shape, ["lm_head.weight", "(3, 4)", "expected (300, 24)"]),
    "tokenizer": (large_tokenizer, ["the tokenizer has 320 entries", "vocab_size 300"]),
    "no-config": (lambda d: (d / "config.json").unlink(), ["config.json does not exist"]),
    "record": (lambda d: (d / RECORD).write_text("{"), [RECORD, "not valid JSON", "delete it"]),
}


@pytest.mark.parametrize(("spoil", "named"), FAULTS.values(), ids=FAULTS.keys())
def test_damage_is_named(directory, spoil, named):
    spoil(directory)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        verify(directory, progress=False)
    for words in (str(directory), *named):
        assert words in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {}, []])
def test_an_index_need_not_state_the_size(directory, metadata):
    edit_index(lambda index: index.update(metadata=metadata))(directory)
    assert verify(directory, progress=False).files > 2


def test_hashes_are_those_of_the_hub_and_of_git(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    git = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    good = [RemoteFile("a", 6, sha256=sha(b"hello\n")), RemoteFile("a", 6, git_sha1=git), RemoteFile("a", 6)]
    bad = [RemoteFile("a", 6, sha256=sha(b"other")), RemoteFile("a", 6, git_sha1=git[::-1]), RemoteFile("a", 7)]
    assert [_damage(tmp_path, [file], False) for file in good] == [{}, {}, {}]
    assert [bool(_damage(tmp_path, [file], False)) for file in bad] == [True, True, True]


# --- fetching --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_fetched_verified_and_used(hub, tmp_path, saved_model):
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "README.md"):
        (hub.folder / name).write_text("not wanted")
    remote = look_up("owner/name")
    target = tmp_path / "deep" / "here"
    verified = download(remote, target, progress=False)
    fetched = {file.name for file in remote.files}
    assert set(names(target)) == fetched | {RECORD}
    assert not fetched & {"pytorch_model.bin", "modeling.py", "consolidated.safetensors", "README.md"}
    assert (verified.directory, verified.hashed) == (target, len(fetched))
    assert names(target.parent) == ["here"]
    assert load_model(target).fingerprint == saved_model.fingerprint
    assert verify(target, progress=False).hashed == len(fetched)

    hub.fetched.clear()
    assert download(remote, target, progress=False) == verified
    assert hub.fetched == []


@pytest.mark.parametrize("after", [0, 2, 6])
def test_an_interrupted_download_is_taken_up_again(hub, tmp_path, after):
    remote, target, hub.after = look_up("owner/name"), tmp_path / "here", after
    with pytest.raises(DownloadError, match=r"broke off \(ConnectionError: reset by peer\).*are kept"):
        download(remote, target, progress=False)
    assert not target.exists()
    hub.after = None
    part = (
        tmp_path / f".here.{COMMIT[:12]}.partial" / ".cache" / "huggingface" / "download" / "a.etag.1234abcd.incomplete"
    )
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of a killed process")
    download(remote, target, progress=False)
    assert not list(target.rglob("*.incomplete"))
    assert sorted(hub.fetched) == sorted(file.name for file in remote.files)  # nothing twice
    assert names(tmp_path) == ["here", "hub"]


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_shard_damaged_on_the_way_is_named_and_fetched_again(hub, tmp_path):
    remote, target = look_up("owner/name"), tmp_path / "here"
    shard = shards(hub.folder)[1]
    good = shard.read_bytes()
    flip(shard)
    with pytest.raises(DownloadError, match=rf"{shard.name} is damaged: its hash.*run this again"):
        download(remote, target, progress=False)
    assert not target.exists()
    shard.write_bytes(good)
    hub.fetched.clear()
    download(remote, target, progress=False)
    assert hub.fetched == [shard.name]


def test_what_was_fetched_and_damaged_later_is_found_and_mended(hub, tmp_path):
    remote, target = look_up("owner/name"), tmp_path / "here"
    download(remote, target, progress=False)
    shard = shards(target)[1]
    flip(shard)
    for call, error in (
        (lambda: verify(target, progress=False), CheckpointError),
        (fetch(remote, target), DownloadError),
    ):
        with pytest.raises(error, match=rf"{shard.name} is damaged.*delete"):
            call()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        verify(target, progress=False)
    hub.fetched.clear()
    download(remote, target, progress=False)
    assert hub.fetched == [shard.name]


def fetch(remote, target):
    return lambda: download(remote, target, progress=False)


def test_other_peoples_directories_are_left_alone(hub, tmp_path, model_directory):
    remote = look_up("owner/name")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    shutil.copytree(model_directory, tmp_path / "same_config")
    shutil.copytree(hub.folder, tmp_path / "same_names")
    flip(shards(tmp_path / "same_names")[0])
    (tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in (
        ("notes", "holds other files"),
        ("same_config", "holds other files"),
        ("same_names", r"is not owner/name at commit 0123456789ab: .*choose another --output"),
        ("file", "is a file"),
    ):
        with pytest.raises(DownloadError, match=message):
            download(remote, tmp_path / name, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert hub.fetched == []


def test_two_beginnings_are_not_mixed(hub, tmp_path):
    remote, target, hub.after = look_up("owner/name"), tmp_path / "here", 5
    with pytest.raises(DownloadError):
        download(remote, target, progress=False)
    target.mkdir()
    shutil.copy(hub.folder / "config.json", target)
    with pytest.raises(DownloadError, match="both hold a part"):
        download(remote, target, progress=False)


def test_an_empty_directory_is_filled(hub, tmp_path):
    (tmp_path / "here").mkdir()
    assert download(look_up("owner/name"), tmp_path / "here", progress=False).tensors


def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    fields = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"^owner/name/config\.json: model_type is 'llama'"):
        download(look_up("owner/name"), tmp_path / "here", progress=False)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    assert names(tmp_path) == ["hub"]


def test_weights_that_are_there_already_outlive_a_config_that_cannot_be_run(hub, tmp_path):
    fields = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    (tmp_path / "here").mkdir()
    own = Path(shutil.copy(shards(hub.folder)[0], tmp_path / "here"))
    with pytest.raises(ConfigError, match=r"^owner/name/config\.json: model_type is 'llama'"):
        download(look_up("owner/name"), tmp_path / "here", progress=False)
    assert own.read_bytes() == shards(hub.folder)[0].read_bytes()
    assert names(tmp_path) == ["here", "hub"]


def test_a_repository_whose_own_files_do_not_fit_does_not_look_complete(hub, tmp_path):
    edit_index(lambda index: index["metadata"].update(total_size=7))(hub.folder)
    with pytest.raises(CheckpointError, match="total_size 7"):
        download(look_up("owner/name"), tmp_path / "here", progress=False)
    assert not (tmp_path / "here").exists()


def test_a_disk_too_small_is_noticed_first(hub, tmp_path, monkeypatch):
    remote = look_up("owner/name")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=remote.size - 1))
    with pytest.raises(DownloadError, match=r"still to be fetched and 0\.0 GB are free; free some space"):
        download(remote, tmp_path / "deep" / "here", progress=False)
    assert names(tmp_path) == ["hub"] and hub.fetched == []

    partial = tmp_path / f".here.{COMMIT[:12]}.partial"
    partial.mkdir()
    (partial / remote.files[0].name).write_bytes(b"12")  # what is here already need not fit again
    assert check_disk(remote, tmp_path / "here") == remote.size - 1


def test_a_whole_checkpoint_needs_no_more_room(hub, tmp_path, monkeypatch):
    remote = look_up("owner/name")
    download(remote, tmp_path / "here", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert check_disk(remote, tmp_path / "here") == 0


HUB_FAULTS = {
    "gated": (errors.GatedRepoError, ["is gated", "https://huggingface.co/owner/name", "hf auth login"]),
    "absent": (errors.RepositoryNotFoundError, ["owner/name is not on the hub, or is private"]),
    "revision": (errors.RevisionNotFoundError, ["no revision 'v9'"]),
    "name": (errors.HFValidationError, ["owner/name is not a hub id"]),
    "offline": (errors.OfflineModeIsEnabled, ["cannot be reached", "OfflineModeIsEnabled", "check the network"]),
    "timeout": (TimeoutError, ["cannot be reached", "TimeoutError"]),
}


@pytest.mark.parametrize(("kind", "named"), HUB_FAULTS.values(), ids=HUB_FAULTS.keys())
def test_what_the_hub_answers_is_explained(hub, tmp_path, monkeypatch, kind, named):
    remote = look_up("owner/name")

    def refuse(*_, **__):
        raise kind.__new__(kind)  # their constructors want a server's response

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(DownloadError) as caught:
        look_up("owner/name", "v9")
    for words in named:
        assert words in str(caught.value)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DownloadError):
        download(remote, tmp_path / "here", progress=False)
    assert not (tmp_path / "here").exists()


def test_a_disk_that_fills_up_is_explained(hub, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(DownloadError, match="the disk is full"):
        download(look_up("owner/name"), tmp_path / "here", progress=False)


def test_a_repository_without_safetensors_is_refused(hub):
    for shard in shards(hub.folder):
        shard.rename(shard.with_suffix(".bin"))
    with pytest.raises(DownloadError, match=r"has no config\.json with \*\.safetensors"):
        look_up("owner/name")


def test_without_a_network_there_is_one_message():
    with pytest.raises(DownloadError, match=r"owner/name cannot be fetched: .*check the network"):
        look_up("owner/name")  # HF_HUB_OFFLINE is set for all tests
