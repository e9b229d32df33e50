"""Progress on standard error: bars where a person watches, silence where nobody does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

T = TypeVar("T")

MINUTE = 60.0
"""Seconds between two lines of progress where no terminal shows a bar."""

console = Console(stderr=True, markup=False, emoji=False, highlight=False)
"""Text is shown as it is: a path may have brackets and colons."""


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, with a bar on standard error when it is a terminal, else a line now and then."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not console.is_terminal:
        yield from _told(items, description, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


def _told(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield `items`; a line at the start, and one a minute."""
    of = "" if total is None else f"/{total}"
    note(f"{description} (0{of})")
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= MINUTE:
            last = time.monotonic()
            note(f"{description} ({done}{of})")


def note(message: str) -> None:
    """One line for the person who watches, on standard error; if that is full, the work goes on unwatched."""
    with suppress(OSError):
        console.print(" ".join(message.split()), highlight=False, markup=False, soft_wrap=True)
