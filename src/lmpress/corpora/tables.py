"""Files of rows: JSON, a JSON value a line, and tables of cells; each row with its place in the file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmpress.corpora.rows import has_text, is_conversation, reads_like_text
from lmpress.errors import RequestError

Rows = list[tuple[str, Any]]

DELIMITERS = ",;\t|"

HEADER = 4096
"""Characters by which it is told what separates cells."""

NAME = 64
"""Characters that the name of a column has at most."""


def read_rows(path: Path, text: str) -> Rows | None:
    """The rows of a file, by the kind that its name tells; None for plain text.

    A file of another name holds rows if it is JSON with objects, or if its first line is such an object.

    Raises:
        RequestError: the file is not what its name says; the line is named.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        return reader(path, text)
    return _json_rows(path, text) if _looks_like_json(text) else None


def _looks_like_json(text: str) -> bool:
    start = text.lstrip()
    return start.startswith(("{", "[")) and any(map(_holds_objects, (start.partition("\n")[0], text)))


def _holds_objects(text: str) -> bool:
    """Whether a text is a JSON object, or a list that begins with one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value[0] if isinstance(value, list) and value else value, dict)


def _json_rows(path: Path, text: str) -> Rows:
    """One JSON value, or one a line, whatever the file is called."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _json_lines(path, text, error)
    return [(f"row {i}", row) for i, row in enumerate(_rows_of(path, value), start=1)]


def _json_lines(path: Path, text: str, whole: Exception) -> Rows:
    """A JSON value a line; `whole` is why the text is not a single one."""
    rows: Rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            if not rows and path.suffix.lower() == ".json":
                raise RequestError(f"{path}: not JSON ({whole})") from whole
            raise RequestError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def _rows_of(path: Path, value: Any) -> Sequence[Any]:
    """The rows in a JSON value: a list of them, the one list of an object, its columns, or a single row."""
    value = _without_index(value)
    if isinstance(value, list):
        return [value] if is_conversation(value) else value
    if not isinstance(value, dict):
        return [value]
    if _is_columns(value):
        first: list[Any] = next(iter(value.values()))
        if len(value) == 1:
            return first
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if has_text(str(path), value):
        return [value]
    lists = {name: part for name, part in value.items() if isinstance(part, list) and part}
    if len(lists) > 1:
        raise RequestError(f"{path} holds several lists ({', '.join(lists)}): write one into its own file")
    return _rows_of(path, next(iter(lists.values()))) if lists else [value]


def _without_index(value: Any) -> Any:
    """Rows or columns that stand under the numbers or names of rows, as pandas writes them, without these."""
    parts = list(value.values()) if isinstance(value, dict) else []
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        return value
    if len({tuple(part) for part in parts}) == 1 and all(map(str.isdecimal, parts[0])):
        return {name: list(part.values()) for name, part in value.items()}
    return parts if all(has_text(name, part) for name, part in value.items()) else value


def _is_columns(value: dict[str, Any]) -> bool:
    """Whether an object holds columns of one length, of which none is a list of objects."""
    columns = list(value.values())
    return (
        all(isinstance(column, list) and column for column in columns)
        and len({len(column) for column in columns}) == 1
        and not any(isinstance(cell, dict) for column in columns for cell in column)
    )


def _csv_rows(path: Path, text: str) -> Rows:
    """Cells between what makes the most of them, or what a first line such as "sep=;" names."""
    told = re.match(r"sep=(.)(?=\n)", text)
    if told:
        return _cells(path, text[told.end() :], told[1], csv.QUOTE_MINIMAL)
    return _cells(path, text, _delimiter(text), csv.QUOTE_MINIMAL)


def _tsv_rows(path: Path, text: str) -> Rows:
    """Cells between tabs: with quotes as in CSV, or, where that does not come out even, without any."""
    try:
        return _cells(path, text, "\t", csv.QUOTE_MINIMAL)
    except RequestError:
        return _cells(path, text, "\t", csv.QUOTE_NONE)


def _delimiter(text: str) -> str:
    """What makes the most cells of the first line; some spreadsheets write semicolons."""
    first = [text.partition("\n")[0][:HEADER]]
    return max(DELIMITERS, key=lambda sign: len(next(csv.reader(first, delimiter=sign), [])))


def _cells(path: Path, text: str, delimiter: str, quoting: Any) -> Rows:
    """Rows under a header; one that reads like a row is none, and the columns have numbers."""
    lines = list(_records(path, text, delimiter, quoting))
    if not lines:
        return []
    number, header = lines[0]
    numbers = [f"column {i}" for i in range(1, len(header) + 1)]
    if any(map(_is_cell, header)):
        names = numbers
    else:
        names = [cell.strip() or number for cell, number in zip(header, numbers, strict=True)]
        lines = lines[1:]
    name, count = Counter(map(str.lower, names)).most_common(1)[0]
    if count > 1:
        raise RequestError(f"{path}, line {number}: {count} columns are called {name!r}; give each its own")
    for number, cells in lines:
        if len(cells) > len(names):
            raise RequestError(
                f"{path}, line {number}: {len(cells)} cells, and {len(names)} columns; put quotes around"
                f" cells that hold {delimiter!r}"
            )
    return [(f"line {number}", dict(zip(names, cells, strict=False))) for number, cells in lines]


def _is_cell(name: str) -> bool:
    """Whether what stands in the first line is no name of a column."""
    return len(name.strip()) > NAME or name.strip().isdigit() or reads_like_text(name)


def _records(path: Path, text: str, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not empty, and the line on which it begins."""
    limit = csv.field_size_limit(min(len(text) + 1, 2**31 - 1))  # a cell may hold a whole book
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{path}, line {start}: not {path.suffix[1:].upper()} ({error})") from error
    finally:
        csv.field_size_limit(limit)


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}
