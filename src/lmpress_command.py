"""The command `lmpress`: in order from its first second on, while the libraries below are still being loaded."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run `lmpress.cli.main`. An interruption before it has begun, or after it has ended, is no traceback."""
    try:
        from lmpress.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done but to leave
