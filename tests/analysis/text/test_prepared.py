"""Prepared corpora: what tokenizing gives, whole or not at all, lazily made and lazily read, every fault named."""

import dataclasses

import datasets
import numpy as np
import pyarrow as pa
import pytest

from analysis.report.provenance import write_json
from analysis.text import encoding, prepared
from analysis.text.corpus import Document, corpus_hash, iter_documents
from analysis.text.encoding import Encoded, iter_encode
from analysis.text.prepared import (
    MANIFEST,
    Request,
    is_prepared,
    open_prepared,
    prepare,
    read_manifest,
    tokenizer_hash,
)
from analysis.text.sources import CorpusError
from models.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from varjax import checksums


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return load_tokenizer(model_directory)


@pytest.fixture
def many_batches(monkeypatch):
    """Record batches and the tokenizer's parts of a few documents each."""
    monkeypatch.setattr(prepared, "_BATCH_TOKENS", 300)
    monkeypatch.setattr(encoding, "_TOGETHER", 7)


@pytest.fixture
def folder(corpus_file, tokenizer, tmp_path, many_batches):
    """A good prepared corpus in several record batches, for a test to spoil."""
    make(corpus_file, tokenizer, tmp_path / "prepared")
    return tmp_path / "prepared"


def make(corpus_file, tokenizer, folder, documents=None, overwrite=False, **request):
    request = Request(str(corpus_file), **request)
    documents = iter_documents(request.dataset, split=request.split) if documents is None else documents
    return prepare(documents, tokenizer, folder, request, overwrite=overwrite, progress=False)


def same(left: Encoded, right: Encoded) -> bool:
    rest = [[getattr(one, name) for name in ("id", "group", "words", "bytes")] for one in (left, right)]
    return rest[0] == rest[1] and np.array_equal(left.ids, right.ids) and left.ids.dtype == right.ids.dtype


# --- what is written is what is read ---------------------------------------------------------------------------------


def test_a_prepared_corpus_is_what_tokenizing_gives(folder, documents, tokenizer):
    found = open_prepared(folder, tokenizer, check_hashes=True)
    assert len(found.table.to_batches()) > 2
    assert len(found) == len(documents)
    for _ in range(2):
        assert all(same(one, other) for one, other in zip(found, documents, strict=True))


def test_a_folder_of_several_shards_is_read(folder, documents):
    table, manifest = open_prepared(folder).table, read_manifest(folder)
    shards = []
    for number, rows in enumerate((table[:70], table[70:])):
        path = folder / f"shard-{number:05d}.arrow"
        with pa.OSFile(str(path.with_suffix(".new")), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(rows)
        path.with_suffix(".new").rename(path)
        digest = checksums.digest_of_file(path)
        shards.append(prepared.Shard(path.name, rows.num_rows, path.stat().st_size, digest))
    write_json(folder / MANIFEST, dataclasses.replace(manifest, shards=tuple(shards)))
    assert all(same(one, other) for one, other in zip(open_prepared(folder), documents, strict=True))


def test_the_manifest_says_what_is_inside(folder, documents, corpus_file, tokenizer):
    manifest = read_manifest(folder)
    lengths = [len(one.ids) for one in documents]
    assert (manifest.documents, manifest.left_out) == (len(documents), 0)
    assert (manifest.tokens, manifest.min_length, manifest.max_length) == (sum(lengths), min(lengths), max(lengths))
    assert (manifest.words, manifest.bytes) == (sum(o.words for o in documents), sum(o.bytes for o in documents))
    assert manifest.max_id == max(one.ids.max() for one in documents)
    assert manifest.corpus == corpus_hash(one.id for one in iter_documents(corpus_file))
    assert sum(shard.documents for shard in manifest.shards) == len(documents)
    assert manifest.provenance["versions"]["varjax"]
    assert (manifest.request, manifest.tokenizer) == (Request(str(corpus_file)), tokenizer_hash(tokenizer))


def test_datasets_opens_a_shard(folder, documents):
    shard = datasets.Dataset.from_file(str(folder / "shard-00000.arrow"))
    assert shard[3]["ids"] == documents[3].ids.tolist()


def test_reading_copies_nothing(folder):
    before = pa.total_allocated_bytes()
    ids = next(iter(open_prepared(folder))).ids
    assert pa.total_allocated_bytes() - before < 1_000
    assert not ids.flags.writeable


def test_split_and_max_tokens(corpus_file, tokenizer, tmp_path, documents):
    manifest = make(corpus_file, tokenizer, tmp_path / "a", split="build", max_tokens=500)
    ids = [one.id for one in iter_documents(corpus_file, split="build")]
    lengths = [len(one.ids) for one in open_prepared(tmp_path / "a")]
    assert sum(lengths[:-1]) < 500 <= sum(lengths) == manifest.tokens
    assert [one.id for one in open_prepared(tmp_path / "a")] == ids[: len(lengths)]


def test_documents_without_two_tokens_are_left_out_and_counted(corpus_file, tokenizer, tmp_path):
    texts = ["", "two words", "", "three more words"]
    manifest = make(corpus_file, tokenizer, tmp_path / "a", [Document(text, "g") for text in texts])
    assert (manifest.documents, manifest.left_out) == (2, 2)


def test_documents_leave_memory_in_parts(corpus_file, tokenizer, tmp_path, many_batches):
    """Record batches are on the disk while the documents still come."""
    sizes_seen = []

    def documents():
        for index in range(2_000):
            sizes_seen.append(sum(path.stat().st_size for path in tmp_path.glob(".prepared.unfinished/*.arrow")))
            yield Document(f"document {index} about routers", "g")

    (shard,) = make(corpus_file, tokenizer, tmp_path / "prepared", documents()).shards
    assert sizes_seen[len(sizes_seen) // 2] >= shard.size * 0.4


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizers_hash_is_of_what_it_does(model_directory, tokenizer):
    fresh = load_tokenizer(model_directory)
    original = tokenizer_hash(fresh)
    assert original == tokenizer_hash(tokenizer)
    fresh.pad_token = fresh.eos_token
    original = tokenizer_hash(fresh)
    fresh(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(fresh) == original
    fresh.add_tokens(["<new>"])
    assert tokenizer_hash(fresh) != original


def test_another_tokenizer_is_refused(folder, tmp_path):
    save_tokenizer(train_bpe(["other text entirely"] * 3, 270), tmp_path / "other")
    with pytest.raises(CorpusError, match=r"another tokenizer.*prepare the dataset again"):
        open_prepared(folder, load_tokenizer(tmp_path / "other"))


# --- whole or not at all ---------------------------------------------------------------------------------------------


def breaking_off(documents, error, after=60):
    for index, document in enumerate(documents):
        if index == after:
            raise error
        yield document


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CorpusError("x.jsonl, line 61: broken"), "x.jsonl, line 61: broken"),
        (KeyboardInterrupt("by hand"), "by hand"),
    ],
)
@pytest.mark.parametrize("there_before", [True, False])
def test_an_interrupted_call_leaves_what_was_there(
    corpus_file, tokenizer, tmp_path, many_batches, error, message, there_before
):
    if there_before:
        make(corpus_file, tokenizer, tmp_path / "a", split="test")
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    documents = breaking_off(iter_documents(corpus_file), error)
    with pytest.raises((CorpusError, KeyboardInterrupt), match=message):
        make(corpus_file, tokenizer, tmp_path / "a", documents, overwrite=True)
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert is_prepared(tmp_path / "a") == there_before


def test_a_dataset_that_cannot_be_reached_leaves_no_trace(corpus_file, tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="no route"):
        make(corpus_file, tokenizer, tmp_path / "deep" / "a", breaking_off([1], CorpusError("no route"), after=0))
    assert not list(tmp_path.iterdir())


def test_a_killed_call_leaves_nothing_that_passes_for_complete(
    corpus_file, tokenizer, tmp_path, many_batches, monkeypatch
):
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(prepared.shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        make(corpus_file, tokenizer, tmp_path / "a", breaking_off(iter_documents(corpus_file), KeyboardInterrupt()))
    (leftover,) = tmp_path.iterdir()
    assert list(leftover.glob("*.arrow"))
    assert not is_prepared(tmp_path / "a") and not is_prepared(leftover)

    make(corpus_file, tokenizer, tmp_path / "a", [Document("another text", "g")])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(open_prepared(tmp_path / "a", check_hashes=True)) == 1


def test_a_complete_folder_is_overwritten_only_on_purpose(folder, corpus_file, tokenizer):
    with pytest.raises(CorpusError, match="holds a prepared corpus"):
        make(corpus_file, tokenizer, folder, split="test")
    make(corpus_file, tokenizer, folder, overwrite=True, split="test")
    assert len(open_prepared(folder, check_hashes=True)) == len(list(iter_documents(corpus_file, split="test")))
    assert [path.name for path in folder.parent.iterdir()] == ["prepared"]


def test_a_call_killed_between_its_renamings_loses_nothing(folder, corpus_file, tokenizer):
    folder.rename(folder.with_name(".prepared.former"))
    with pytest.raises(CorpusError, match="no route"):
        make(corpus_file, tokenizer, folder, breaking_off(iter_documents(corpus_file), CorpusError("no route")))
    assert open_prepared(folder, check_hashes=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_peoples_folders_are_left_alone(corpus_file, tokenizer, tmp_path, overwrite):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match="holds no prepared corpus"):
        make(corpus_file, tokenizer, tmp_path, overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    make(corpus_file, tokenizer, tmp_path / "empty")
    assert is_prepared(tmp_path / "empty")


def test_a_full_disk_is_explained(corpus_file, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "digest_of_file", full)
    with pytest.raises(CorpusError, match=r"cannot be written.*No space left.*free some space"):
        make(corpus_file, tokenizer, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "request_", "message"),
    [
        (["", ""], {}, "none of the 2 documents holds two tokens"),
        (["fine", "not \ud800 fine"], {}, "a document of g .* is not Unicode text"),
        (["fine"], {"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_prepared_is_explained(corpus_file, tokenizer, tmp_path, texts, request_, message):
    with pytest.raises(CorpusError, match=message):
        make(corpus_file, tokenizer, tmp_path / "a", [Document(text, "g") for text in texts], **request_)
    assert not list(tmp_path.iterdir())


def edit_manifest(**changes):
    def spoil(folder):
        fields = checksums.read_json(folder / MANIFEST, "") | changes
        checksums.write_json(folder / MANIFEST, {k: v for k, v in fields.items() if v is not None})

    return spoil


def truncate(folder) -> None:
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])


def overwrite_start(folder) -> None:
    with (folder / "shard-00000.arrow").open("r+b") as file:
        file.write(b"x" * 64)


FAULTS = {
    "no-manifest": (lambda f: (f / MANIFEST).unlink(), ["no manifest.json", "prepare_datasets.py"]),
    "not-json": (lambda f: (f / MANIFEST).write_text("{"), [MANIFEST, "not valid JSON", "prepare the dataset again"]),
    "a-list": (lambda f: (f / MANIFEST).write_text("[]"), [MANIFEST, "expected a JSON object"]),
    "newer": (edit_manifest(version=2), [MANIFEST, "version 2", "reads 1"]),
    "field-missing": (edit_manifest(tokens=None), [MANIFEST, "damaged", "tokens"]),
    "request-missing": (edit_manifest(request=None), [MANIFEST, "damaged", "request"]),
    "too-few": (edit_manifest(documents=7), ["holds 160 documents", "says 7"]),
    "no-shards": (edit_manifest(shards=[]), ["holds 0 documents"]),
    "shard-missing": (lambda f: (f / "shard-00000.arrow").unlink(), ["shard-00000.arrow is missing", "restore it"]),
    "shard-truncated": (truncate, ["shard-00000.arrow has", "its manifest says"]),
    "shard-damaged": (overwrite_start, ["shard-00000.arrow", "its contents have changed"]),
}


@pytest.mark.parametrize(("spoil", "named"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_named(folder, spoil, named):
    spoil(folder)
    with pytest.raises(CorpusError) as caught:
        open_prepared(folder)
    for words in (str(folder), *named):
        assert words in str(caught.value)


def test_changed_contents_are_found_unless_nobody_looks(folder):
    shard = folder / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    place = content.rindex(np.int32(1).tobytes())  # a begin id
    content[place] ^= 1
    shard.write_bytes(content)
    open_prepared(folder, check_hashes=False)
    with pytest.raises(CorpusError, match=r"shard-00000\.arrow: its contents have changed"):
        open_prepared(folder)


def test_requests_compare_by_value():
    request = Request("c4", "build", 5, None)
    assert dataclasses.replace(request) == request != dataclasses.replace(request, max_tokens=9)


def test_iter_encode_and_prepare_agree_on_what_is_left_out(corpus_file, saved_model, tmp_path):
    texts = [Document(text, "g") for text in ("", "a", "a b", " ", "longer text")]
    encoded = list(iter_encode(texts, saved_model.tokenizer, saved_model.config))
    make(corpus_file, saved_model.tokenizer, tmp_path / "a", texts)
    assert all(same(one, other) for one, other in zip(open_prepared(tmp_path / "a"), encoded, strict=True))
