"""One run at a time in a directory: a lock in the work directory, which the kernel frees with the process."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lmpress.errors import RequestError
from lmpress.pipeline.assemble import LOCK, discard
from lmpress.pipeline.journal import WORK

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""What a file system says that knows no locks."""

ATTEMPTS = 100
"""A run that ends takes its lock file with it, so that the next one may have to make it again."""


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold the right to work in `output`, which is made; without a trace where nothing comes of it.

    Raises:
        RequestError: another run holds it.
        OSError: nothing can be made at such a place.
    """
    made, work = not output.exists(), output / WORK
    file = _take(output)
    try:
        yield
    finally:
        ours = _is_at(file, work / LOCK)
        if sys.platform == "win32":  # where nothing is deleted that is open
            file.close()
        if ours and not unfinished(output):
            (work / LOCK).unlink(missing_ok=True)
            discard(work)
        file.close()
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def unfinished(output: Path) -> bool:
    """Whether a run left its work in `output`, or is at work there."""
    work = output / WORK
    return work.is_dir() and any(path.name != LOCK for path in work.iterdir())


def _take(output: Path) -> BinaryIO:
    path = output / WORK / LOCK
    for _ in range(ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+b")  # noqa: SIM115
        except FileNotFoundError:
            continue
        if not _lock(file):
            _refuse(output, file)
        if _is_at(file, path):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            return file
        file.close()
    raise RequestError(f"{output}: other runs come and go here; name another directory")


def _refuse(output: Path, file: BinaryIO) -> None:
    with file:
        file.seek(0)
        owner = file.read(20).decode("ascii", "replace")
    who = f" (process {owner})" if owner.isdigit() else ""
    raise RequestError(
        f"{output}: another run is at work here{who}; wait until it ends, or name another directory"
    )


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open `file` is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    BEYOND = 1 << 30
    """The byte that is locked: others may read what is before it."""

    def _lock(file: BinaryIO) -> bool:
        file.seek(BEYOND)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        """Lock an open file; False where another process, or another part of this one, has done so."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True
