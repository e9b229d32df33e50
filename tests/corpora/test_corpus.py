"""Texts from files and by name."""

import hashlib
import json

import pytest

from lmpress.corpora import Corpus, load_corpus
from lmpress.errors import RequestError


def test_a_plain_file_is_one_document_unchanged(tmp_path):
    text = "First line\r\n\n  naïve — 日本\n\n"
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode())
    corpus = load_corpus(f"file:{path}")
    assert corpus.documents == (text,)
    assert corpus.text == text
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (corpus.name, corpus.split) == ("file:notes.txt", "all")
    assert load_corpus(str(path)) == corpus


def test_jsonl_takes_text_or_else_the_first_string(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"id": "x", "text": "one\u2028still one"},
        {"n": 1, "title": "two", "body": "no"},
        {"text": 7, "body": "three"},
        {"text": ""},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:2]) + "\n\n")
    with path.open("a") as file:
        file.write("\n".join(json.dumps(row) for row in rows[2:]))
    corpus = load_corpus(str(path))
    assert corpus.documents == ("one\u2028still one", "two", "three")
    assert corpus.text == "one\u2028still one\n\ntwo\n\nthree"
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not list"),
        ('{"n": 3}', "no field holds a text"),
        (r'{"text": "\ud800"}', "half a surrogate pair"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(RequestError, match=f"line 3: .*{reason}"):
        load_corpus(str(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt", b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": ""}\n', "every document is empty"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=reason):
        load_corpus(f"file:{tmp_path / name}")


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"gone\.txt': No such file"):
        load_corpus(f"file:{tmp_path}/gone.txt")
    with pytest.raises(RequestError, match="Is a directory"):
        load_corpus(str(tmp_path))


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(RequestError, match=r"'wikitext'.*file:PATH.*wikitext2, c4, python-docs"):
        load_corpus("wikitext")
    for text in ("a whole sentence " * 1000, "null\0character"):
        with pytest.raises(RequestError, match="no corpus or file"):
            load_corpus(text)
    with pytest.raises(RequestError, match="null"):
        load_corpus("file:null\0character")
    with pytest.raises(RequestError, match="needs the model"):
        load_corpus("self")


def test_equal_texts_have_equal_hashes_whatever_they_are_called():
    a, b = Corpus("a", "train", ("x", "y")), Corpus("b", "all", ("x\n\ny",))
    assert a.sha256 == b.sha256
    assert a.sha256 != Corpus("a", "train", ("x", "z")).sha256
