"""A text with its name and hash, and where texts come from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmpress.corpora.hub import load_c4, load_wikitext2
from lmpress.corpora.python_docs import load_python_docs
from lmpress.errors import RequestError

NAMED: dict[str, Callable[[str], tuple[str, ...]]] = {
    "wikitext2": load_wikitext2,
    "c4": load_c4,
    "python-docs": load_python_docs,
}
"""Every corpus that has a name: split -> documents."""

NO_TEST = {"c4": "validation"}
"""Corpora that were published without a test split, and the split that stands for it."""

ALL = "all"
"""The split of a text that has none."""


@dataclass(frozen=True)
class Corpus:
    """A text, as it is used.

    Attributes:
        name: "wikitext2", or "file:notes.txt" for a file.
        split: "train", "validation" or "test"; "all" where the text has no splits.
        documents: a plain text file is one document.
        sha256: of `text`, in UTF-8.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.text.encode()).hexdigest())

    @property
    def text(self) -> str:
        """The documents with an empty line between them; of one document, the document unchanged."""
        return "\n\n".join(self.documents)


def load_corpus(spec: str, split: str = "train") -> Corpus:
    """The text that `spec` names.

    Args:
        spec: a name (`wikitext2`, `c4`, `python-docs`), `file:PATH`, or the path of an existing file. A
            `.jsonl` file holds one JSON object a line, whose "text" (or else first string) is a document;
            any other file is one document of UTF-8 text.
        split: which part of a named corpus; files and `python-docs` have no parts.

    Raises:
        RequestError: if the name is unknown, if the file is missing, empty or not UTF-8, if a line is not
            what JSONL should hold, or if a named corpus is out of reach.
    """
    if spec in NAMED:
        documents = NAMED[spec](split)
        return Corpus(spec, ALL if spec == "python-docs" else split, documents)
    path = _path(spec)
    text = _read(path)
    documents = _jsonl_documents(path, text) if path.suffix.lower() == ".jsonl" else (text,)
    return Corpus(f"file:{path.name}", ALL, documents)


def split_specs(specs: str) -> list[str]:
    """Several specs that are joined by commas.

    Raises:
        RequestError: there is none.
    """
    parts = [part.strip() for part in specs.split(",") if part.strip()]
    if not parts:
        raise RequestError(f"no text is named in {specs!r}: give file:PATH or one of {', '.join(NAMED)}")
    return parts


def check_corpus(spec: str) -> None:
    """Refuse what `load_corpus` could not find, without reading any text.

    Raises:
        RequestError: an unknown name, or a file that is missing.
    """
    if spec not in NAMED:
        _path(spec)


def _path(spec: str) -> Path:
    """The file that a spec names; it is there."""
    if not spec.startswith("file:") and not os.path.exists(spec):
        hint = "; `self` is text that the model writes, and needs the model" if spec == "self" else ""
        raise RequestError(
            f"there is no corpus or file {spec!r}: give file:PATH or one of {', '.join(NAMED)}{hint}"
        )
    path = Path(spec.removeprefix("file:")).expanduser()
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return path


def _unreadable(path: Path, error: Exception) -> RequestError:
    reason = getattr(error, "strerror", None) or error  # ValueError: a path with a null character
    return RequestError(f"cannot read the text file {str(path)!r}: {reason}")


def evaluation_split(spec: str) -> str:
    """The split of a named corpus that evaluation reads; calibration reads `train`."""
    return NO_TEST.get(spec, "test")


def _read(path: Path) -> str:
    """The text of a file, line ends and all."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not text.strip():
        raise RequestError(f"the text file {path} is empty")
    return text


def _jsonl_documents(path: Path, text: str) -> tuple[str, ...]:
    """The documents of a JSONL file; empty lines and empty texts are passed over."""
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            document = _document(f"{path}, line {number}", line)
            if document.strip():
                documents.append(document)
    if not documents:
        raise RequestError(f"the file {path} holds no text: every document is empty")
    return tuple(documents)


def _document(where: str, line: str) -> str:
    """The text of one JSONL line."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise RequestError(f"{where}: a JSON object with a text is wanted, not {type(record).__name__}")
    strings = [value for value in record.values() if isinstance(value, str)]
    text = record["text"] if isinstance(record.get("text"), str) else next(iter(strings), None)
    if text is None:
        raise RequestError(f'{where}: no field holds a text; name it "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: half a surrogate pair, which is no text") from error
    return str(text)
