"""Rows of a data set as documents: which fields of a row are its text.

A row says it by the names of its fields: `text`; a conversation, whose turns follow one another; a task,
with what was asked and answered; or a field such as `content`. Where no row has such a name, the only field
that holds prose is the text. An id, a label or a question without its answer is none.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lmpress.corpora.decoding import newlines
from lmpress.errors import RequestError

Row = Mapping[str, Any]
"""The fields of a row, by their names in lower case."""

CONVERSATIONS = ("messages", "conversations", "conversation", "turns", "dialogue", "dialog", "chat")
ROLES = ("role", "from", "speaker", "author")
CONTENTS = ("content", "value", "text", "parts", "message", "utterance")
SPEAKERS = ("system", "user", "human", "assistant", "bot", "gpt", "model")
"""A turn holds its content under one of CONTENTS, or under who spoke."""

SETTINGS = ("system", "system_prompt")
ASKED = ("instruction", "instructions", "prompt", "question", "query", "problem", "inputs", "user", "human")
GIVEN = ("context", "input")
ANSWERED = (
    *("output", "outputs", "completion", "response", "answer", "target", "targets", "solution"),
    *("chosen", "assistant", "bot", "gpt"),
)
PROSE = (
    *("content", "document", "article", "body", "passage", "page_content", "raw_content"),
    *("paragraph", "story", "sentence"),
)

WORDS = 6
"""A field holds prose if its values have so many words on average."""

LOOKED_AT = 1000
"""Rows by which it is told which field holds prose."""

FEW = 8
"""Names of fields that a message has at most."""

DEPTH = 6
"""Texts within texts, at most: the parts of the content of a turn of a conversation."""


class Found(NamedTuple):
    """The text of a row, and the names of the fields that gave it."""

    field: str
    text: str


EMPTY = Found("", "")
"""Of a row whose fields are known, and hold no text."""


@dataclass(frozen=True)
class Taken:
    """The documents of a file of rows, and where they come from.

    Attributes:
        documents: the texts, none of them empty.
        record: `rows`, how many were looked at; `fields`, how many documents each field gave (or each
            combination, as "instruction + output"); `different`, how many documents differ.
    """

    documents: tuple[str, ...]
    record: dict[str, Any]


def take_text(path: Path, rows: Iterable[tuple[str, Any]]) -> Taken:
    """The text of all rows of a file.

    Args:
        rows: each with its place, such as "line 3"; an object, a string, a list of turns, or null.

    Raises:
        RequestError: a row that is none of these, half a surrogate pair, or no text in more than half of
            the rows that are not empty.
    """
    cleaned = dict(_row(f"{path}, {place}", row) for place, row in rows)
    found = {place: _text(place, row) for place, row in cleaned.items()}
    foreign = [cleaned[place] for place, text in found.items() if text is None]
    texts = {place: text for place, text in found.items() if text is not None and text != EMPTY}
    if foreign and not texts:
        field = _prose_field(path, foreign)
        texts = {
            place: Found(field, text) for place, row in cleaned.items() if (text := _content(row.get(field)))
        }
    elif len(foreign) > len(texts):
        raise _no_field(path, f"in {len(foreign)} of {len(cleaned)} rows", foreign)
    if not texts:
        reason = "it has no rows"
        if cleaned:
            parts = any(
                isinstance(value, dict) and value for row in cleaned.values() for value in row.values()
            )
            reason = "its fields hold objects, not strings" if parts else "every document is empty"
        raise RequestError(f"the file {path} holds no text: {reason}")
    for place, (_, text) in texts.items():
        _check_unicode(place, text)
    documents = tuple(text for _, text in texts.values())
    fields = Counter(field for field, _ in texts.values())
    return Taken(documents, {"rows": len(cleaned), "fields": dict(fields), "different": len(set(documents))})


def is_conversation(value: Any) -> bool:
    """Whether a JSON value is a list of turns, each with who spoke."""
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def has_text(place: str, value: Any) -> bool:
    """Whether a JSON value is a row whose fields tell their text by their names."""
    found = _text(place, _lower(value)) if isinstance(value, dict) else None
    return found is not None and found != EMPTY


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(r in value for r in ROLES) and any(c in value for c in CONTENTS)


def _lower(row: Mapping[str, Any]) -> Row:
    return {str(name).strip().lower(): value for name, value in row.items()}


def _row(place: str, value: Any) -> tuple[str, Row]:
    """Its place and a row as an object; a string, a conversation and null stand for one."""
    if isinstance(value, dict):
        return place, _lower(value)
    if value is None or isinstance(value, str) or is_conversation(value):
        return place, {"messages" if isinstance(value, list) else "text": value}
    raise RequestError(f"{place}: a JSON object with a text is wanted, not {type(value).__name__}")


def _text(place: str, row: Row) -> Found | None:
    """The text of a row, by its fields' names; EMPTY if they hold none, None if no name is known."""
    known = False
    for kind in (_plain, _conversation, _task, _named):
        text = kind(place, row)
        if text is not None and text != EMPTY:
            return text
        known = known or text is not None
    return EMPTY if known or not any(row.values()) else None


def _plain(place: str, row: Row) -> Found | None:
    return _joined(row, ("text",))


def _conversation(place: str, row: Row) -> Found | None:
    turns = {name: _decoded(place, row[name]) for name in CONVERSATIONS if name in row}
    found = _first(turns)
    if found is None or found == EMPTY:
        return found
    return _joined({**row, **turns}, (*SETTINGS, found.field))


def _task(place: str, row: Row) -> Found | None:
    """What was asked, given and answered; a question alone is often the same in every row."""
    answers = [row[name] for name in (*GIVEN, *ANSWERED) if name in row]
    if any(map(_content, answers)):
        return _joined(row, (*SETTINGS, *ASKED, *GIVEN, *ANSWERED))
    return EMPTY if answers and not any(answers) else None  # a number answers too, and is no text


def _named(place: str, row: Row) -> Found | None:
    return _first({name: row[name] for name in PROSE if name in row})


def _first(row: Row) -> Found | None:
    """The first of the fields that has a text."""
    found = [_joined(row, (name,)) for name in row]
    return next((each for each in found if each != EMPTY), EMPTY if found else None)


def _joined(row: Row, names: Sequence[str]) -> Found | None:
    """The texts of the fields that are there, one after the other, and none that the next repeats."""
    texts = {name: _content(row[name]) for name in names if name in row}
    told = {name: text for name, text in texts.items() if text}
    for name, following in pairwise(tuple(told)):
        if _repeats(told[following], told[name]):
            del told[name]
    return Found(" + ".join(told), "\n\n".join(told.values())) if texts else None


def _repeats(text: str, earlier: str) -> bool:
    """Whether a text begins with all of an earlier one: a conversation with the prompt that it answers."""
    if not text.startswith(earlier):
        return False
    return text[len(earlier) :][:1] in ("", "\n") or _words(earlier) >= WORDS


def _content(value: Any, depth: int = DEPTH) -> str:
    """The text of a value: a string, or all strings of a list of turns or parts; "" of anything else."""
    if isinstance(value, str):
        return newlines(value) if value.strip() else ""
    if not depth or not isinstance(value, list | dict):
        return ""
    parts: Iterable[Any] = value
    if isinstance(value, dict):
        names = [name for name in CONTENTS if value.get(name)][:1] or [n for n in value if n in SPEAKERS]
        parts = (value[name] for name in names)
    return "\n\n".join(filter(None, (_content(part, depth - 1) for part in parts)))


def _decoded(place: str, value: Any) -> Any:
    """A conversation; in a table it may be written out, as JSON or in Python's way."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise RequestError(f"{place}: the conversation is a string that is no JSON; write it as JSON")


def _prose_field(path: Path, rows: Sequence[Row]) -> str:
    """The only field that holds prose, which is not the same in most rows."""
    names = dict.fromkeys(name for row in islice(rows, LOOKED_AT) for name in row)
    values = {name: [_content(row.get(name)) for row in islice(rows, LOOKED_AT)] for name in names}
    prose = [name for name in names if _is_prose([text for text in values[name] if text], len(values[name]))]
    if len(prose) == 1:
        return prose[0]
    raise _no_field(path, f"for certain (it may be {' or '.join(prose)})" if prose else "in any row", rows)


def reads_like_text(name: str) -> bool:
    """Whether what may be the name of a field is a sentence."""
    return _words(name) >= WORDS


def _is_prose(texts: Sequence[str], rows: int) -> bool:
    words = sum(map(_words, texts))
    return 2 * len(texts) >= rows and words >= WORDS * len(texts) and 2 * len(set(texts)) >= len(texts)


def _words(text: str) -> int:
    """Words with two letters or more; of scripts that write no spaces, two signs count as a word."""
    spaced = sum(bool(re.search(r"[^\W\d_]{2}", word)) for word in text.split())
    return max(spaced, sum(sign > "\u2e7f" for sign in text) // 2)


def _no_field(path: Path, where: str, rows: Sequence[Row]) -> RequestError:
    names = ", ".join(islice(dict.fromkeys(name for row in rows for name in row), FEW)) or "none"
    return RequestError(f'{path}: no field holds a text {where}; name it "text" (fields: {names})')


def _check_unicode(place: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{place}: half a surrogate pair, which is no text") from error
