"""Which fields of a row are its text."""

from pathlib import Path

import pytest

from lmpress.corpora.rows import take_text
from lmpress.errors import RequestError

PATH = Path("data.jsonl")
PROSE = "Rain falls on the hills, and the rivers carry it to the sea."


def _take(*rows):
    return take_text(PATH, [(f"line {i}", row) for i, row in enumerate(rows, start=1)])


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
PARTS = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:xyz"}}]


@pytest.mark.parametrize(
    ("row", "text", "field"),
    [
        ({"id": "conv_1", "text": "one"}, "one", "text"),
        ({"ID": "conv_1", " Text ": "one"}, "one", "text"),
        ("one", "one", "text"),
        ({"text": ["one", "two"]}, "one\n\ntwo", "text"),
        ({"text": "a\r\nb"}, "a\nb", "text"),
        ({"id": "conv_1", "messages": TURNS}, "Why?\n\nBecause.", "messages"),
        (TURNS, "Why?\n\nBecause.", "messages"),
        (
            {
                "id": "7",
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
            },
            "Why?\n\nSo.",
            "conversations",
        ),
        ({"source": "x", "dialog": ["Why?", "So."]}, "Why?\n\nSo.", "dialog"),
        ({"conversation": [{"user": "Why?", "assistant": "So."}]}, "Why?\n\nSo.", "conversation"),
        (
            {"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}},
            "Why?\n\nSo.",
            "messages",
        ),
        ({"messages": [{"role": "user", "content": PARTS}, TURNS[1]]}, "Look:\n\nBecause.", "messages"),
        ({"messages": [{"role": "tool", "content": None}, *TURNS]}, "Why?\n\nBecause.", "messages"),
        ({"messages": str(TURNS)}, "Why?\n\nBecause.", "messages"),
        ({"messages": '[{"role": "user", "content": "Why?"}]'}, "Why?", "messages"),
        ({"prompt": "Why?", "messages": TURNS}, "Why?\n\nBecause.", "messages"),
        ({"system": "Be brief.", "messages": TURNS}, "Be brief.\n\nWhy?\n\nBecause.", "system + messages"),
        (
            {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
            "Be brief.\n\nWhy?\n\nBecause.",
            "messages",
        ),
        ({"system": None, "messages": TURNS}, "Why?\n\nBecause.", "messages"),
        ({"system": "Be brief.", "messages": [], "body": "one"}, "one", "body"),
        ({"prompt": "Why?", "chosen": TURNS, "rejected": TURNS[:1]}, "Why?\n\nBecause.", "chosen"),
        ({"prompt": PROSE, "chosen": f"{PROSE} It does.", "rejected": "No."}, f"{PROSE} It does.", "chosen"),
        ({"prompt": "I", "completion": "It"}, "I\n\nIt", "prompt + completion"),
        ({"text": None, "messages": TURNS}, "Why?\n\nBecause.", "messages"),
        (
            {"output": "ba", "instruction": "Turn it.", "input": "ab"},
            "Turn it.\n\nab\n\nba",
            "instruction + input + output",
        ),
        ({"instruction": "Turn it.", "input": "", "output": "ba"}, "Turn it.\n\nba", "instruction + output"),
        ({"prompt": "Why?", "completion": "So."}, "Why?\n\nSo.", "prompt + completion"),
        ({"prompt": "Why?", "response": "So."}, "Why?\n\nSo.", "prompt + response"),
        ({"question": "Why?", "answer": "So.", "id": "3"}, "Why?\n\nSo.", "question + answer"),
        ({"user": "Why?", "assistant": "So."}, "Why?\n\nSo.", "user + assistant"),
        ({"prompt": [TURNS[0]], "completion": [TURNS[1]]}, "Why?\n\nBecause.", "prompt + completion"),
        ({"title": "two", "body": "no"}, "no", "body"),
        ({"text": 7, "body": "three"}, "three", "body"),
        ({"id": "a b c", "review": PROSE, "stars": "five"}, PROSE, "review"),
        ({"id": "1", "prompt": PROSE}, PROSE, "prompt"),
        ({"row_idx": 0, "row": {"text": PROSE}}, PROSE, "row"),
        ({"url": "https://a.b/c-d-e-f-g", "文": "雨落在山上，河流将其带入大海。水又变成云。"}, None, "文"),
    ],
)
def test_a_row_tells_its_text_by_the_names_of_its_fields(row, text, field):
    taken = _take(row)
    assert taken.documents == (text or row[field],)
    assert taken.record == {"rows": 1, "fields": {field: 1}, "different": 1}


def test_kinds_may_be_mixed_and_empty_rows_are_passed_over():
    taken = _take(
        {"text": "one"},
        {"messages": TURNS},
        None,
        {"text": None},
        {"instruction": "Turn it.", "output": " "},
        {},
        {"id": 7},
        {"question": "Why?", "answer": "So."},
    )
    assert taken.documents == ("one", "Why?\n\nBecause.", "Why?\n\nSo.")
    assert taken.record == {
        "rows": 8,
        "fields": {"text": 1, "messages": 1, "question + answer": 1},
        "different": 3,
    }


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no rows"),
        ([{"text": ""}, None, {}], "every document is empty"),
        ([{"id": f"conv_{i:06}", "source": "x"} for i in range(9)], r"no field holds a text.*id, source"),
        ([{"id": "x", "sha": "0f" * 32, "url": "https://a.b/c-d-e-f-g-h-i"}], "no field holds a text"),
        ([{"instruction": f"{PROSE} Say it again.", "label": 3}] * 4, "no field holds a text"),
        ([{"instruction": "Turn it.", "output": ""}] * 4, "every document is empty"),
        ([{"abstract": PROSE, "review": PROSE.upper()}], "it may be abstract or review"),
        ([{"text": "one"}, {"id": 1}, {"id": 2}], "in 2 of 3 rows"),
        ([{"text": "one"}, [1, 2]], "data.jsonl, line 2: .*not list"),
        ([{"text": "one"}, 3], "data.jsonl, line 2: .*not int"),
        ([{"text": "one"}, {"text": "\ud800"}], "data.jsonl, line 2: half a surrogate pair"),
        ([{"messages": "[{'role': 'user'}\n {'role': 'x'}]"}], "line 1: the conversation is a string"),
    ],
)
def test_rows_without_a_text_are_refused(rows, reason):
    with pytest.raises(RequestError, match=reason) as refused:
        _take(*rows)
    assert "\n" not in str(refused.value)


def test_a_label_beside_a_repeated_question_leaves_the_field_that_differs():
    rows = [
        {
            "instruction": "Is the following review a good one, or is it not?",
            "label": i,
            "review": f"{PROSE} {i}",
        }
        for i in range(4)
    ]
    assert _take(*rows).documents == tuple(row["review"] for row in rows)


def test_texts_within_texts_end_somewhere():
    deep = "text"
    for _ in range(500):
        deep = [deep]
    with pytest.raises(RequestError, match="every document is empty"):
        _take({"text": deep})
