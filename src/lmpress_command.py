"""The command `lmpress`: in order from its first second on, while the libraries below are being loaded."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType


def main() -> None:
    """Run `lmpress.cli.main`. A signal before it has begun is one line, and after it has ended nothing."""
    signals = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    for each in signals:
        signal.signal(each, _stop)
    from lmpress.cli import main as run

    try:
        run()
    finally:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # all is done but to leave


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave at once: nothing is begun, and an exception would be taken for one of the imports."""
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(128 + number)
