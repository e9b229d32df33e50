"""What goes to standard output, and what to standard error."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmpress.errors import RequestError

stdout = Console()
stderr = Console(stderr=True)


def print_json(data: Any) -> None:
    """One JSON object on standard output, and nothing else there."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(table: Table) -> None:
    """A table for a person; as wide as it needs to be where no terminal sets a limit."""
    if stdout.is_terminal:
        stdout.print(table)
    else:
        Console(width=160).print(table)


def fail(message: str, code: int, json_mode: bool) -> NoReturn:
    """One clear line on standard error, and the exit code; with --json the object says it too."""
    line = " ".join(message.split())
    stderr.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True, highlight=False)
    if json_mode:
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


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
