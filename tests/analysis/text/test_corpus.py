"""Corpora: every source gives the same documents, splits follow the text alone, faults name file and fix."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.text import corpus, embedded
from analysis.text.corpus import SPLITS, Document, corpus_hash, iter_documents, load_documents
from analysis.text.sources import CorpusError

TEXTS = ["The first document.\n\nTwo paragraphs.", "The second.", "Ein drittes, größeres Dokument."]


def write(path: Path, texts: list[str]) -> Path:
    """The texts as a corpus file of the kind that the suffix says."""
    if path.suffix.lower() == ".txt":
        path.write_text("\n<|endofdoc|>\n".join(texts), encoding="utf-8")
    elif path.suffix.lower() in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": texts}), path)
    return path


def pack(path: Path, suffix: str) -> Path:
    """The file packed by the program that the suffix says, in its place."""
    whole = path.read_bytes()
    packed = gzip.compress(whole) if suffix.lower() == ".gz" else pa.compress(whole, codec="zstd", asbytes=True)
    path.unlink()
    path = path.with_name(path.name + suffix)
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".JSONL", ".Txt"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, suffix, packed):
    path = write(tmp_path / f"my.notes{suffix}", TEXTS)
    documents = load_documents(pack(path, packed) if packed else path)
    assert documents == [Document(text, "my.notes") for text in TEXTS]
    assert load_documents(tmp_path) == documents


def test_a_json_file_may_hold_a_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert [one.text for one in load_documents(tmp_path)] == TEXTS
    (tmp_path / "a.json").write_text('[{"text": "one"}, 2]')
    with pytest.raises(CorpusError, match=r"a\.json, record 1: expected an object"):
        load_documents(tmp_path)
    (tmp_path / "a.json").write_text('[{"text": "one"},')
    with pytest.raises(CorpusError, match=r"a\.json: not a JSON list"):
        load_documents(tmp_path / "a.json")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_packed_files_that_were_cut_or_are_something_else_are_named(tmp_path, suffix, packed):
    path = pack(write(tmp_path / f"a{suffix}", [*TEXTS, "x" * 1000]), packed)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"something else"):
        path.write_bytes(damaged)
        for dataset in (path, tmp_path):
            with pytest.raises(
                CorpusError, match=rf"a{suffix}{packed}: (cannot be read to its end|not a readable Par)"
            ):
                load_documents(dataset)


def test_archives_of_several_members_are_read_to_their_end(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n<|endofdoc|>\n") + gzip.compress(b"two\n"))
    assert [one.text for one in load_documents(tmp_path)] == ["one", "two"]


def test_a_directory_gives_its_files_in_order_with_their_stems_as_groups(tmp_path):
    write(tmp_path / "b.txt", TEXTS[:1])
    write(tmp_path / "a.jsonl", TEXTS[1:])
    (tmp_path / "ignored.md").write_text("not a corpus file")
    groups = [(one.group, one.text) for one in load_documents(tmp_path)]
    assert groups == [("a", TEXTS[1]), ("a", TEXTS[2]), ("b", TEXTS[0])]


def test_what_a_directory_holds_besides_texts_is_skipped_counted_and_named_once(tmp_path, caplog):
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "part").mkdir(parents=True)
    (folder / ".git").mkdir()
    elsewhere.mkdir()
    write(folder / "a.jsonl", TEXTS[:1])
    write(folder / "part" / "b.txt", TEXTS[1:2])
    (folder / "same.txt").symlink_to(folder / "part" / "b.txt")
    (folder / "linked.txt").symlink_to(write(elsewhere / "secret.txt", ["not of this corpus"]))
    (folder / "further").symlink_to(elsewhere)
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    for name in (".hidden.txt", ".git/description.txt", "x.csv", "y.CSV", "requirements.txt", "README.txt", "LICENSE"):
        (folder / name).write_text("nothing to learn from")
    (folder / "requirements-dev.txt").write_text("pytest")
    (folder / "shapes.tar.gz").write_bytes(b"")
    (folder / "settings.json").write_text('{\n "text": "over several lines"\n}')
    (folder / "more.json").write_text('{"other": 1}')
    for _ in range(2):
        assert [one.text for one in load_documents(folder)] == TEXTS[:2]
    (said,) = caplog.messages
    assert "files read: 3 (a.jsonl, b.txt, same.txt); skipped: .csv: 2 (x.csv, y.CSV); .json without" in said
    assert ".tar.gz: 1 (shapes.tar.gz)" in said and "without the field 'text': 2 (more.json, settings.json)" in said
    assert "links that leave the directory: 2 (further, linked.txt)" in said
    assert "notes about the others: 3 (README.txt, requirements-dev.txt, requirements.txt)" in said
    assert "special files: 1 (circle.txt)" in said and "without a suffix: 1 (LICENSE)" in said
    assert "idden" not in said and "description" not in said


def test_a_file_that_is_given_by_its_name_is_read_whatever_it_is_called(tmp_path):
    assert load_documents(write(tmp_path / "README.txt", TEXTS[:1])) == [Document(TEXTS[0], "README")]


def test_a_directory_without_a_file_to_read_says_what_it_skipped(tmp_path):
    (tmp_path / "README.txt").write_text("about nothing")
    with pytest.raises(CorpusError, match=r"files read: 0; skipped: notes about the others: 1 \(README\.txt\)"):
        load_documents(tmp_path)


def test_a_byte_order_mark_hides_no_separator_and_is_in_no_text(tmp_path):
    content = "<|endofdoc|>\r\nOne.\r\n\ufeff<|endofdoc|>\r\nTwo.\r\n"  # two files put together
    (tmp_path / "a.txt").write_bytes(content.encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes(" = Three = \n \n Text . \n".encode("utf-8-sig"))
    (tmp_path / "c.jsonl").write_bytes('{"text": "Four."}\n'.encode("utf-8-sig"))
    (tmp_path / "d.json").write_bytes('[{"text": "Five."}]'.encode("utf-8-sig"))
    texts = [one.text for one in load_documents(tmp_path)]
    assert texts == ["One.", "Two.", " = Three = \n \n Text . ", "Four.", "Five."]


def null_jsonl(folder: Path) -> Path:
    lines = [{"text": TEXTS[0]}, {"text": None}, {"text": TEXTS[1]}, {"text": float("nan")}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "a.jsonl"


def null_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [TEXTS[0], None, TEXTS[1], None]}), folder / "a.parquet")
    return folder / "a.parquet"


def null_saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": [TEXTS[0], None, TEXTS[1], None]}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("make", [null_jsonl, null_parquet, null_saved])
def test_null_texts_are_left_out_counted_and_said_once(tmp_path, caplog, make):
    path = make(tmp_path)
    for _ in range(2):
        assert [one.text for one in load_documents(path)] == TEXTS[:2]
    assert caplog.messages == [f"{path}: records left out because their field 'text' is null: 2"]


def test_null_texts_of_a_stream_are_left_out_too(monkeypatch, caplog):
    stream = [{"text": " = One = \n"}, {"text": None}, {"text": " Text .\n"}, {"text": " = Two = \n"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(stream))
    assert [one.text for one in iter_documents("owner/wikitext")] == [" = One = \n Text .\n", " = Two = \n"]
    assert "owner/wikitext: records left out because their field 'text' is null: 1" in caplog.messages


def test_a_field_that_is_always_null_is_not_taken_for_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null, "body": "x"}\n' * 3)
    with pytest.raises(
        CorpusError, match=r"no document.*; in 3 records the field 'text' is null: is it the text \(--text"
    ):
        load_documents(tmp_path / "a.jsonl")


def test_a_saved_hugging_face_dataset_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"body": TEXTS, "group": ["x", "y", "x"]}).save_to_disk(str(tmp_path / "saved"))
    documents = load_documents(tmp_path / "saved", text_column="body")
    assert [(one.text, one.group) for one in documents] == list(zip(TEXTS, "xyx", strict=True))


def test_wikitext_is_cut_at_top_level_titles_only(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n Text . \n \n = = Section = = \n \n More . \n = Two = \n \n End . \n")
    assert [one.text.split()[1] for one in load_documents(path)] == ["One", "Two"]


def test_plain_text_without_separators_is_one_document(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("A paragraph.\n\nAnother one.\n")
    assert [one.text for one in load_documents(path)] == ["A paragraph.\n\nAnother one."]


def test_a_text_that_occurs_twice_is_given_once(tmp_path):
    assert len(load_documents(write(tmp_path / "twice.jsonl", TEXTS * 2))) == len(TEXTS)


def test_a_limit_counts_the_documents_that_hold_something(tmp_path):
    path = write(tmp_path / "a.jsonl", ["  ", *TEXTS])
    assert [one.text for one in load_documents(path, limit=2)] == TEXTS[:2]


def test_a_limit_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nnot JSON\n')
    assert [one.text for one in iter_documents(path, limit=1)] == ["good"]


@given(st.text(st.characters(codec="utf-8")))
def test_id_is_the_sha256_of_the_text_and_alone_decides_the_split(text):
    document = Document(text, "a")
    assert document.id == hashlib.sha256(text.encode()).hexdigest()
    assert document.split == Document(text, "b").split
    assert document.split in SPLITS


def test_splits_are_disjoint_complete_and_of_the_stated_size(tmp_path):
    count = 4000
    path = write(tmp_path / "many.jsonl", [f"document {i}" for i in range(count)])
    parts = {split: load_documents(path, split=split) for split in SPLITS}
    assert Counter(one.text for part in parts.values() for one in part) == Counter(
        one.text for one in load_documents(path)
    )
    for split, share in SPLITS.items():  # five standard deviations
        assert abs(len(parts[split]) / count - share) < 5 * (share * (1 - share) / count) ** 0.5
    assert load_documents(path, split="build") == parts["train"]


def test_corpus_hash_depends_on_the_texts_and_their_order():
    documents = [Document(text, "a") for text in TEXTS]
    wanted = hashlib.sha256("\n".join(document.id for document in documents).encode()).hexdigest()
    assert corpus_hash(one.id for one in documents) == corpus_hash(Document(text, "b").id for text in TEXTS) == wanted
    assert wanted not in (
        corpus_hash(one.id for one in reversed(documents)),
        corpus_hash(one.id for one in documents[:2]),
    )


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', ["a.jsonl, line 2", "not a JSON object"]),
        ("a.jsonl", b'{"body": "no text"}\n', ["a.jsonl, line 1", "'text' is missing", "body"]),
        ("a.jsonl", b'{"text": 7}\n', ["a.jsonl, line 1", "'text' is int"]),
        ("a.jsonl", b"[1, 2]\n", ["a.jsonl, line 1", "expected an object"]),
        ("a.jsonl", b"\n", ["a.jsonl", "no document"]),
        ("a.txt", b"", ["a.txt", "no document"]),
        ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8 at byte 3"]),
        ("a.parquet", b"PAR1 is not enough", ["a.parquet", "not a readable Parquet file"]),
        ("a.csv", b"text\nx\n", ["a.csv", ".jsonl"]),
    ],
)
def test_a_fault_names_the_file_and_the_place(tmp_path, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as raised:
        load_documents(path)
    assert all(part in str(raised.value) for part in [str(tmp_path), *named])


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(CorpusError, match=r"a\.parquet: no column 'body' among text"):
        load_documents(path, text_column="body")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "./absent.jsonl"}, "no such file"),
        ({"dataset": "absent.txt.zst"}, "no such file"),
        ({"dataset": ""}, "the dataset is ''; give 'embedded', a file, a directory"),
        ({"dataset": " "}, "the dataset is ' '"),
        ({"dataset": "name:config:split:more"}, "name:config:split"),
        ({"dataset": "embedded", "split": "validation"}, "choose one of build, train"),
        ({"dataset": "embedded", "limit": 0}, "at least 1"),
    ],
)
def test_a_wrong_argument_is_explained(arguments, message):
    with pytest.raises(CorpusError, match=message):
        load_documents(**arguments)


def test_an_empty_directory_is_explained(tmp_path):
    with pytest.raises(CorpusError, match="holds no file"):
        load_documents(tmp_path)


def test_a_dataset_that_cannot_be_opened_is_explained():
    with pytest.raises(CorpusError, match="neither a file here nor a dataset that opens"):
        load_documents("no-such-owner/no-such-dataset")


def test_the_real_corpora_are_cut_into_documents(shared_data):
    counts = {path.stem: len(load_documents(path)) for path in (shared_data / "corpora").glob("*.txt")}
    assert counts["books_valid"] == counts["books_test"] == 8
    assert 55 <= counts["wikitext2_valid"] <= 65  # 60 articles each
    assert 55 <= counts["wikitext2_test"] <= 65


class TestEmbedded:
    """On a few small packages and without the standard library, which takes a minute to parse."""

    @pytest.fixture(autouse=True)
    def small(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(embedded, "DISTRIBUTIONS", ("optax", "tqdm", "not-installed-anywhere"))
        monkeypatch.setattr(embedded, "_standard_library", lambda: iter(()))

    def test_documents_are_docstrings_by_package_in_hash_order(self):
        documents = load_documents("embedded")
        assert {one.group for one in documents} == {"optax", "tqdm"}
        assert all(len(one.text) >= embedded.MIN_CHARS for one in documents)
        ids = [one.id for one in documents]
        assert ids == sorted(set(ids))

    def test_the_cache_gives_what_parsing_gave(self, tmp_path, monkeypatch):
        parsed = load_documents("embedded")
        (cache,) = (tmp_path / "varjax").iterdir()
        assert cache.suffix == ".jsonl"
        monkeypatch.setattr(embedded, "_extract", lambda: pytest.fail("parsed again"))
        assert load_documents("embedded") == parsed

    def test_other_versions_do_not_share_a_cache(self, monkeypatch):
        first = embedded._cache_file()
        monkeypatch.setattr(embedded, "DISTRIBUTIONS", ("optax",))
        assert embedded._cache_file() != first

    def test_a_cache_that_cannot_be_written_costs_a_warning_only(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert load_documents("embedded")
        assert "is not cached" in caplog.text


def test_docstrings_come_in_order_of_line_and_broken_sources_give_none(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        '"""Module."""\n'
        'class A:\n    """A."""\n    def f(self):\n        """F."""\n        def g():\n            """G."""\n'
        'try:\n    pass\nexcept ValueError:\n    def h():\n        """H."""\n'
        'def plain():\n    return """no docstring"""\n'
    )
    assert list(embedded._docstrings(source)) == ["Module.", "A.", "F.", "G.", "H."]
    source.write_text("def broken(:\n")
    assert list(embedded._docstrings(source)) == []


def test_near_copies_are_left_out(tmp_path, monkeypatch):
    lines = [f"    A line of documentation with the number {i} in it." for i in range(8)]
    for name, body in [("a", lines), ("b", [*lines[:6], "    And a line of its own, longer than most."])]:
        (tmp_path / f"{name}.py").write_text('"""' + "\n".join(body).strip() + '"""\n')
    files = [(tmp_path / "a.py", "a"), (tmp_path / "b.py", "b")]
    monkeypatch.setattr(embedded, "_standard_library", lambda: iter(files))
    monkeypatch.setattr(embedded, "DISTRIBUTIONS", ())
    assert [group for _, group in embedded._extract()] == ["a"]


def test_a_streamed_dataset_is_read_as_it_comes_and_a_stream_that_breaks_off_is_explained(monkeypatch):
    def stream(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("owner/articles", "en", "validation", True)
        yield from ({"text": text, "meta": {"redpajama_set_name": "Books"}} for text in TEXTS)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    documents = iter_documents("owner/articles:en:validation")
    assert [next(documents) for _ in TEXTS] == [Document(text, "Books") for text in TEXTS]
    with pytest.raises(CorpusError, match=r"owner/articles.*stopped after 3 rows \(ConnectionError: reset by peer\)"):
        next(documents)


def test_a_text_that_comes_again_is_given_once_while_it_is_remembered(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["a", "b", "a", "c", "d", "a"])
    assert [document.text for document in iter_documents(path)] == ["a", "b", "c", "d"]
    monkeypatch.setattr(corpus, "_REMEMBERED", 2)
    assert [document.text for document in iter_documents(path)] == ["a", "b", "c", "d", "a"]
