"""Bytes of a file as text: its encoding, its line ends, and what is no text at all."""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path

from lmpress.errors import RequestError

_UNPACK = "it is compressed: unpack it first"
_TABLE = (
    "it is a binary table: write it as JSON lines first, such as with pandas"
    " `to_json(..., orient='records', lines=True)`"
)
_DOCUMENT = "it is a formatted document: save its text as a plain text file first"
_MARKUP = "it is markup: save the text in it as a plain text file first"
_TENSORS = "it holds tensors: name a file of text"

_BY_SUFFIX = {
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar"), _UNPACK),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro", ".sqlite"), _TABLE),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".pptx", ".ppt"), _DOCUMENT),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "it is a spreadsheet: save it as CSV first"),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".ipynb"), _MARKUP),
    **dict.fromkeys((".yaml", ".yml"), "YAML is not read: write its rows as JSON lines first"),
    **dict.fromkeys((".safetensors", ".gguf", ".pt", ".pth", ".npy", ".npz", ".pkl"), _TENSORS),
}
"""What is no text by its name, and the way out."""

_BY_HEAD = {
    b"\x1f\x8b": _UNPACK,
    b"BZh": _UNPACK,
    b"\xfd7zXZ\0": _UNPACK,
    b"\x28\xb5\x2f\xfd": _UNPACK,
    b"PK\x03\x04": _UNPACK,
    b"7z\xbc\xaf\x27\x1c": _UNPACK,
    b"PAR1": _TABLE,
    b"ARROW1": _TABLE,
    b"SQLite format 3\0": _TABLE,
    b"%PDF-": _DOCUMENT,
    b"{\\rtf": _DOCUMENT,
    b"\xd0\xcf\x11\xe0": _DOCUMENT,
    b"GGUF": _TENSORS,
}
"""What is no text by its first bytes, whatever it is called."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks, and the encodings that they announce; without one, a text is in UTF-8."""


def check_readable(path: Path) -> None:
    """Refuse what is not there or is no text, by its name and its first bytes alone.

    Raises:
        RequestError: nothing is there, it cannot be read, or it is a directory or a binary file.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)}: name the files in it")
        head = b""
        if stat.S_ISREG(mode):  # a pipe gives its bytes only once
            with path.open("rb") as file:
                head = file.read(max(map(len, _BY_HEAD)))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    advice = _BY_SUFFIX.get(path.suffix.lower()) or next(
        (advice for mark, advice in _BY_HEAD.items() if head.startswith(mark)), None
    )
    if advice is not None:
        raise RequestError(f"{path} is no text: {advice}")


def read_text(path: Path) -> str:
    """The text of a file, without byte order marks, its lines ended by a newline.

    Raises:
        RequestError: no text, an encoding other than UTF-8 that no mark announces, null characters, or
            nothing but white space.
    """
    check_readable(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    text = _decoded(path, data)
    if not text.strip():
        raise RequestError(f"the text file {path} is empty")
    return newlines(text)


def newlines(text: str) -> str:
    """A text with newlines for the line ends of other systems: how a file ends its lines is no content."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(path: Path, data: bytes) -> str:
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place, name = len(mark) + error.start, encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise RequestError(
            f"{path} is not {name} text (byte {place}): convert it to UTF-8 first, such as with"
            " `iconv -f ENCODING -t UTF-8`"
        ) from error
    if "\0" in text:
        place = len(mark) + len(text[: text.index("\0")].encode(encoding))
        raise RequestError(
            f"{path} holds a null character (byte {place}): it is binary, or UTF-16 without a byte order"
            " mark; convert it to UTF-8 first"
        )
    return text.replace("\ufeff", "")  # marks of files that were put together


def _unreadable(path: Path, error: Exception) -> RequestError:
    reason = getattr(error, "strerror", None) or error  # ValueError: a path with a null character
    return RequestError(f"cannot read the text file {str(path)!r}: {reason}")
