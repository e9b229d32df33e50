"""Ctrl-C and the like: the first ends the work in order, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""What ends the work in order, and what it is called. A signal's exit code is 128 more than its number."""


class Interruption:
    """The signal that came; SIGINT until one did."""

    def __init__(self) -> None:
        self.signal = signal.SIGINT
        self.came = False

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal

    @property
    def told(self) -> str:
        """What happened, in a word or two."""
        return SIGNALS[self.signal.name]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler: what is in the middle of its work ends as by Ctrl-C, or, asked twice, as by a kill."""
        if self.came:
            os._exit(128 + number)
        self.came, self.signal = True, signal.Signals(number)
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Signals become KeyboardInterrupt; those that the caller lets be ignored stay ignored."""
    interruption = Interruption()
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, interruption)
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
