"""Texts from files and by name."""

import hashlib
import json

import pytest

from lmpress.corpora import Corpus, load_corpus
from lmpress.errors import RequestError


def test_a_plain_file_is_one_document_unchanged(tmp_path):
    text = "First line\n\n  naïve — 日本\n\n"
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode())
    corpus = load_corpus(f"file:{path}")
    assert corpus.documents == (text,)
    assert corpus.text == text
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (corpus.name, corpus.split) == ("file:notes.txt", "all")
    assert load_corpus(str(path)) == corpus


def test_documents_of_rows_are_hashed_as_their_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two", "", "three")))
    corpus = load_corpus(str(path))
    assert corpus.text == "one\n\ntwo\n\nthree"
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def test_what_was_taken_of_rows_is_told_in_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one"}, {"text": None}, {"question": "Why?", "answer": "So."}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_corpus(str(path)).account == (
        "file:a.jsonl: 3 rows, text taken from 'text' (1), 'question + answer' (1);"
        " passed over, without text: 1"
    )
    path.write_text("\n".join([json.dumps({"text": "the same"})] * 8))
    assert load_corpus(str(path)).account == (
        "file:a.jsonl: 8 rows, text taken from 'text' (8); different texts: 1 alone"
    )


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
