"""The two ways in which lmpress says no, and what the machine's refusals become of them."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LmpressError(Exception):
    """The work failed. The message is one clear line: what, where, and what to do. Exit code 1."""

    exit_code = 1


class RequestError(LmpressError):
    """The request was wrong (a bad recipe, a missing file, a full directory). Exit code 2."""

    exit_code = 2


FULL = {"ENOSPC": "no space left on device", "EDQUOT": "disk quota exceeded"}
"""What making room helps against."""

BAD_PLACE = {"EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ENAMETOOLONG", "ELOOP"}
"""What another place helps against."""

FROM_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers tell what the system said."""

NO_MEMORY = ("CUDA out of memory", "can't allocate memory", "not enough memory")
"""How torch tells that memory is full."""


def system_error(error: BaseException) -> OSError | None:
    """What the system refused, as an OSError with its number; None where `error` is of another kind.

    Libraries that are written in Rust tell of it in the words of an exception of their own.
    """
    if isinstance(error, OSError):
        of_network = isinstance(error, ConnectionError) or (error.errno or 0) <= 0  # as of names not found
        return None if of_network else error
    found = FROM_RUST.search(str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """System errors inside are about `path`: those of a write name no file, those of a copy the other one."""
    try:
        yield
    except Exception as error:
        refused = system_error(error)
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


@contextmanager
def writing(place: str | Path, again: str) -> Iterator[None]:
    """System errors inside become one line about the place that the user named.

    Args:
        place: what is written, in the user's words.
        again: what to do when the trouble is mended, such as "go on with --resume".

    Raises:
        RequestError: nothing can be written at such a place.
        LmpressError: the disk is full, or broken.
    """
    try:
        yield
    except LmpressError:
        raise
    except Exception as error:
        refused = system_error(error)
        if refused is None:
            raise
        raise refusal(refused, again, Path(place)) from error


def refusal(error: OSError, again: str, place: Path | None = None) -> LmpressError:
    """What the system refused, in one line.

    Args:
        again: what to do when the trouble is mended.
        place: what was being written, in the user's words; None for nothing.
    """
    path = None if error.filename is None else Path(os.fsdecode(error.filename))
    ours = place is not None and (path is None or _related(path, place))
    where = place if ours else path
    of = "" if where is None else f"{where}: "
    name = errno.errorcode.get(error.errno or 0, "")
    if name in FULL:
        return LmpressError(f"{of}{FULL[name]}; make room, and {again}")
    reason = (error.strerror or str(error)).lower()
    at = f" (at {path})" if ours and path not in (None, place) else ""
    if name in BAD_PLACE:
        return RequestError(f"{of}{reason}{at}; mend that, or name another place")
    return LmpressError(f"{of}{reason}{at}; mend that, and {again}")


def out_of_memory(error: Exception) -> LmpressError | None:
    """That the memory is full, in one line; None where `error` is of another kind."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return LmpressError(
            "out of memory; let other programs go, or take shorter windows or a smaller --memory"
        )
    return None


def _related(path: Path, place: Path) -> bool:
    """Whether `path` is `place`, in it, or on the way to it."""
    one, other = Path(os.path.abspath(path)), Path(os.path.abspath(place.expanduser()))
    return one.is_relative_to(other) or other.is_relative_to(one)
