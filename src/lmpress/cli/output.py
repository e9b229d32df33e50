"""What goes to standard output, and what to standard error."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmpress.checkpoint import json_text
from lmpress.errors import LmpressError, RequestError

WIDTH = 160
"""Of a table where no terminal sets a limit."""

stdout = Console(markup=False, emoji=False, highlight=False)
stderr = Console(stderr=True, markup=False, emoji=False, highlight=False)


class UnprintedError(LmpressError):
    """Standard output does not take what was to be shown."""


def open_streams() -> None:
    """Make the standard streams take any text: none is closed, and none lacks a character.

    A closed one would be the next file that is opened. What an encoding lacks is shown by its code.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def close_stdout() -> None:
    """Drop what standard output did not take, which the interpreter would try once more at its end."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


@contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        close_stdout()
        told = (error.strerror or str(error)).lower()
        raise UnprintedError(
            f"standard output: {told}; what was asked for is done, but cannot be shown"
        ) from error


def print_json(data: Any) -> None:
    """One JSON object on standard output, and nothing else there."""
    with _printing():
        sys.stdout.write(json_text(data, indent=2, encoding=sys.stdout.encoding or "ascii") + "\n")


def print_text(text: str) -> None:
    """Text as it is, down to the last blank."""
    with _printing():
        sys.stdout.write(text)


def say(*parts: str | tuple[str, str]) -> None:
    """A line for a person, of plain parts and of (part, style)."""
    with _printing():
        stdout.print(Text.assemble(*parts), soft_wrap=True)


def print_table(table: Table) -> None:
    """A table for a person; as wide as it needs to be where no terminal sets a limit."""
    wide = Console(width=WIDTH, markup=False, emoji=False, highlight=False)
    with _printing():
        (stdout if stdout.is_terminal else wide).print(table)


def fail(message: str, code: int, json_mode: bool) -> NoReturn:
    """One clear line on standard error, and the exit code; with --json the object says it too.

    Without a message, the exit code alone.
    """
    line = " ".join(message.split())
    if not line:
        sys.exit(code)
    with suppress(OSError):
        stderr.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)
    if json_mode:
        with suppress(OSError, UnprintedError):
            print_json({"error": line, "exit_code": code})
    sys.exit(code)


def parse_bytes(text: str | None) -> int | None:
    """`6GB` -> 6_000_000_000; None for None. RequestError for what is no size."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if match is None:
        raise RequestError(f"{text!r} is no size; write it as 6GB, 512MB or 4GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
