"""The prose that every Python installation has."""

import re
import sys

import pytest

from lmpress.corpora import load_corpus
from lmpress.corpora.python_docs import LONG, load_python_docs
from lmpress.errors import RequestError


def test_it_is_a_long_text_and_always_the_same():
    corpus = load_corpus("python-docs")
    assert (corpus.name, corpus.split) == ("python-docs", "all")
    assert len(corpus.documents) > 50
    assert len(corpus.text) > 200_000
    assert corpus == load_corpus("python-docs", "test")
    assert corpus.text.isprintable() or set(filter(lambda c: not c.isprintable(), corpus.text)) <= {
        "\n",
        "\xa0",
    }


def test_it_is_prose_without_repetition():
    text = load_corpus("python-docs").text
    assert "::=" not in text
    assert not re.search(r"^[*=~^-]{3,}$", text, re.MULTILINE)
    paragraphs = [part for part in text.split("\n\n") if len(part) >= LONG]
    assert len(paragraphs) == len(set(paragraphs))


def test_markup_goes_and_code_stays(monkeypatch):
    topics = {
        "b": 'The "b"\n*******\n\nA *rich comparison* of\n2 * 3 * 4 and **kwargs.\n\n'
        "   if x:\n       y = a * b * c\n",
        "a": "Short.\n\nb_stmt ::= x\n       | y\n\n\nOnly\nwrapped.\n",
        "c": "Short.\n\n" + "A paragraph long enough to be known again when it comes back, word for word.\n",
        "d": "A paragraph long enough to be known again when it comes back, word for word.",
    }
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    assert load_python_docs() == (
        "Short.\n\nOnly wrapped.",
        'The "b"\n\nA rich comparison of 2 * 3 * 4 and **kwargs.\n\n   if x:\n       y = a * b * c',
        "Short.\n\nA paragraph long enough to be known again when it comes back, word for word.",
    )


def test_a_python_without_its_docs_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RequestError, match="file:PATH"):
        load_python_docs()
