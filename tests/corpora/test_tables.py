"""Files of rows, by what their names say."""

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmpress.corpora import load_corpus
from lmpress.errors import RequestError

TEXTS = ('Rain, "heavy" rain, falls.', "Rivers\tflow\nto the sea.", "naïve — 日本\u2028still here")
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def _lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def _load(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_corpus(str(path))


def _table(path, delimiter=",", end="\r\n", **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter, lineterminator=end, **options)
        writer.writeheader()
        writer.writerows(ROWS)
    return load_corpus(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", _lines(ROWS)),
        ("a.JSONL", _lines(ROWS).replace("\n", "\n\n") + "\n"),
        ("a.ndjson", _lines(ROWS).replace("\n", "\r\n")),
        ("a.jsonl", "\ufeff" + _lines(ROWS)),
        ("a.jsonl", "\ufeff" + _lines(ROWS[:1]) + "\n\ufeff" + _lines(ROWS[1:])),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.json", json.dumps(ROWS).encode("utf-16")),
        ("a.json", _lines(ROWS)),
        ("a.json", json.dumps({"version": "1", "data": ROWS})),
        ("a.json", json.dumps({"text": TEXTS, "id": [0, 1, 2]})),
        ("a.json", json.dumps({"text": TEXTS})),
        ("a.json", json.dumps({"text": dict(enumerate(TEXTS)), "id": dict(enumerate(range(3)))})),
        ("a.json", json.dumps({"text": dict(enumerate(TEXTS))})),
        ("a.json", json.dumps(dict(enumerate(ROWS)))),
        ("a.json", json.dumps({f"id_{row['id']}": row for row in ROWS})),
        ("a.json", json.dumps(TEXTS)),
        ("a.txt", _lines(ROWS)),
        ("a", json.dumps(ROWS, indent=1)),
    ],
)
def test_json_is_read_as_rows(tmp_path, name, content):
    assert _load(tmp_path, name, content).documents == TEXTS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.csv", {}),
        ("a.csv", {"quoting": csv.QUOTE_ALL, "end": "\n"}),
        ("a.csv", {"delimiter": ";"}),
        ("a.tsv", {"delimiter": "\t"}),
    ],
)
def test_tables_are_read_as_rows(tmp_path, name, options):
    corpus = _table(tmp_path / name, **options)
    assert corpus.documents == TEXTS
    assert corpus.rows == {"rows": 3, "fields": {"text": 3}, "different": 3}
    assert csv.field_size_limit() < 1_000_000


def test_a_cell_may_hold_a_book(tmp_path):
    book = "Rain falls on the hills. " * 20_000
    assert _load(tmp_path, "a.csv", f'text\n"{book}"\nshort\n').documents == (book, "short")
    assert _load(tmp_path, "b.csv", f'"{book}"\n').documents == (book,)


def test_tabs_may_stand_between_cells_without_quotes(tmp_path):
    content = 'text\tlabel\n"Rain," she said\t1\nHe said "no\t0\n\n'
    assert _load(tmp_path, "a.tsv", content).documents == ('"Rain," she said', 'He said "no')


def test_a_table_without_a_header_loses_no_row(tmp_path):
    texts = [f"{i},Rain falls on the hills and the rivers flow {i}." for i in range(3)]
    corpus = _load(tmp_path, "a.csv", "\n".join(texts))
    assert corpus.documents == tuple(text[2:] for text in texts)
    assert corpus.rows["fields"] == {"column 2": 3}


def test_a_first_row_that_is_a_sentence_is_no_header(tmp_path):
    texts = tuple(f"Rain falls on the hills in week {i}." for i in range(3))
    assert _load(tmp_path, "a.csv", "\n".join(texts)).documents == texts


def test_a_line_that_names_the_delimiter_is_no_row(tmp_path):
    assert _load(tmp_path, "a.csv", "sep=;\r\nid;text\r\n0;one, two\r\n").documents == ("one, two",)


def test_the_index_that_pandas_writes_has_no_name(tmp_path):
    assert _load(tmp_path, "a.csv", ",text\n0,one\n1,two\n").documents == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{not json\n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "one"}\n' + "[" * 100_000, "line 2: not JSON"),
        ("a.json", '[{"text": "one"},\n {"text": ', r"a\.json: not JSON"),
        ("a.txt", '{"text": "one"}\nnot json', r"a\.txt, line 2: not JSON"),
        ("a.json", "[]", "it has no rows"),
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', r"several lists \(train, test\)"),
        ("a.json", '{"name": "package", "version": "1.0"}', "no field holds a text"),
        ("a.json", "3", "not int"),
        ("a.csv", "id,text\n", "it has no rows"),
        ("a.csv", "id,text\n1,one, two\n", "line 2: 3 cells, and 2 columns"),
        ("a.csv", 'id,text\n1,ok\n2,"never closed\n', "line 3: not CSV"),
        ("a.csv", "text,Text\none,two\n", "line 1: 2 columns are called 'text'"),
        ("a.json", '{"text": {"en": "one", "de": "eins"}}', "its fields hold objects, not strings"),
        ("a.csv", "id,source\nconv_1,x\nconv_2,x\n", r"no field holds a text.*id, source"),
    ],
)
def test_what_is_not_what_its_name_says_is_refused(tmp_path, name, content, reason):
    with pytest.raises(RequestError, match=reason) as refused:
        _load(tmp_path, name, content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[1] A footnote.\nText.", "{x | x > 0} is a set.", "[1]\nText."])
def test_a_bracket_does_not_make_json(tmp_path, text):
    corpus = _load(tmp_path, "a.txt", text)
    assert corpus.documents == (text,)
    assert corpus.account is None


PIECES = [
    '{"text": "one"}',
    '"messages"',
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    '"',
    "\\ud800",
    "\n",
    "\r",
    "\t",
    ";",
    "id,text",
    "3",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt"]),
    st.lists(st.sampled_from(PIECES), max_size=12),
)
def test_whatever_a_file_holds_is_read_or_refused_in_one_line(tmp_path, suffix, pieces):
    told = ""
    try:
        assert all(document.strip() for document in _load(tmp_path, f"a{suffix}", "".join(pieces)).documents)
    except RequestError as error:
        told = str(error)
    assert "\n" not in told
