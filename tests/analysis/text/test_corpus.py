"""Corpora: every source gives the same documents, splits follow the text alone, faults name file and mend."""

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
from analysis.text.corpus import SPLITS, CorpusError, Document, corpus_hash, iter_documents, load_documents

TEXTS = ["The first document.\n\nTwo paragraphs.", "The second.", "Ein drittes, größeres Dokument."]


def write(path: Path, texts: list[str]) -> Path:
    """The texts as a corpus file of the kind that the suffix says."""
    if path.suffix == ".txt":
        path.write_text("\n<|endofdoc|>\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, suffix):
    documents = load_documents(write(tmp_path / f"notes{suffix}", TEXTS))
    assert documents == [Document(text, "notes") for text in TEXTS]


def test_a_directory_gives_its_files_in_order_with_their_stems_as_groups(tmp_path):
    write(tmp_path / "b.txt", TEXTS[:1])
    write(tmp_path / "a.jsonl", TEXTS[1:])
    (tmp_path / "ignored.md").write_text("not a corpus file")
    groups = [(one.group, one.text) for one in load_documents(tmp_path)]
    assert groups == [("a", TEXTS[1]), ("a", TEXTS[2]), ("b", TEXTS[0])]


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
    assert corpus_hash(documents) == corpus_hash([Document(text, "b") for text in TEXTS]) == wanted
    assert wanted not in (corpus_hash(reversed(documents)), corpus_hash(documents[:2]))


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
        monkeypatch.setattr(embedded, "extract", lambda: pytest.fail("parsed again"))
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
    assert [group for _, group in embedded.extract()] == ["a"]


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
