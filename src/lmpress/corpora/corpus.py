"""A text with its name and hash, and where texts come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmpress.corpora.decoding import check_readable, read_text
from lmpress.corpora.hub import load_c4, load_wikitext2
from lmpress.corpora.python_docs import load_python_docs
from lmpress.corpora.rows import Taken, take_text
from lmpress.corpora.tables import read_rows
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
        rows: of a file of rows, what was taken of them, as `Taken` says; empty for other texts.
        sha256: of `text`, in UTF-8.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    rows: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.text.encode()).hexdigest())

    @property
    def text(self) -> str:
        """The documents with an empty line between them; of one document, the document unchanged."""
        return "\n\n".join(self.documents)

    @property
    def account(self) -> str | None:
        """One line on what was taken of rows; None where the text has none."""
        if not self.rows:
            return None
        total, different = self.rows["rows"], self.rows["different"]
        fields = ", ".join(f"{name!r} ({count})" for name, count in self.rows["fields"].items())
        line = f"{self.name}: {total} rows, text taken from {fields}"
        if len(self.documents) < total:
            line += f"; passed over, without text: {total - len(self.documents)}"
        return line if 2 * different > len(self.documents) else f"{line}; different texts: {different} alone"


def load_corpus(spec: str, split: str = "train") -> Corpus:
    """The text that `spec` names.

    Args:
        spec: a name (`wikitext2`, `c4`, `python-docs`), `file:PATH`, or the path of an existing file. JSON,
            JSONL, CSV and TSV hold rows, each a document (`lmpress.corpora.rows` says which fields are
            its text); any other file is one document.
        split: which part of a named corpus; files and `python-docs` have no parts.

    Raises:
        RequestError: if the name is unknown, if the file is missing, empty or no text, if it is not what its
            name says, if no field of its rows is known to hold text, or if a named corpus is out of reach.
    """
    if spec in NAMED:
        documents = NAMED[spec](split)
        return Corpus(spec, ALL if spec == "python-docs" else split, documents)
    path = _path(spec)
    text = read_text(path)
    rows = read_rows(path, text)
    taken = Taken((text,), {}) if rows is None else take_text(path, rows)
    return Corpus(f"file:{path.name}", ALL, taken.documents, taken.record)


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
    """Refuse what `load_corpus` could not find or read, by its name and its first bytes alone.

    Raises:
        RequestError: an unknown name, or a file that is missing or binary.
    """
    if spec not in NAMED:
        _path(spec)


def check_distinct(corpora: Sequence[Corpus]) -> None:
    """RequestError where a text is there twice: it would count double."""
    names: dict[str, str] = {}
    for corpus in corpora:
        if corpus.sha256 in names:
            raise RequestError(f"{names[corpus.sha256]} and {corpus.name} are the same text: name it once")
        names[corpus.sha256] = corpus.name


def _path(spec: str) -> Path:
    """The file that a spec names; it is there, and may be text."""
    if not spec.startswith("file:") and not os.path.exists(spec):
        hint = "; `self` is text that the model writes, and needs the model" if spec == "self" else ""
        raise RequestError(
            f"there is no corpus or file {spec!r}: give file:PATH or one of {', '.join(NAMED)}{hint}"
        )
    path = Path(spec.removeprefix("file:")).expanduser()
    check_readable(path)
    return path


def evaluation_split(spec: str) -> str:
    """The split of a named corpus that evaluation reads; calibration reads `train`."""
    return NO_TEST.get(spec, "test")
