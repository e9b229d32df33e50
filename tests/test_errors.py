"""What the system refuses, in one line about the place that was named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lmpress.errors import LmpressError, RequestError, naming, out_of_memory, system_error, writing

AGAIN = "go on with --resume"


def refused(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            refused(errno.ENOSPC),
            LmpressError,
            "out: no space left on device; make room, and go on with --resume",
        ),
        (refused(errno.ENOSPC, "out/a/b"), LmpressError, "out: no space left on device; make room"),
        (refused(errno.EDQUOT), LmpressError, "out: disk quota exceeded; make room, and go on with --resume"),
        (refused(errno.EIO), LmpressError, "out: input/output error; mend that, and go on with --resume"),
        (refused(errno.EROFS, "out/x"), RequestError, "out: read-only file system (at out/x); mend that, or"),
        (
            refused(errno.EACCES, "."),
            RequestError,
            "out: permission denied (at .); mend that, or name another",
        ),
        (refused(errno.ENOSPC, "/elsewhere/x"), LmpressError, "/elsewhere/x: no space left on device; make"),
        (refused(errno.EACCES, "/model/x"), RequestError, "/model/x: permission denied; mend that, or name"),
        (Exception("I/O error: full (os error 28)"), LmpressError, "out: no space left on device; make room"),
    ],
)
def test_a_refusal_is_one_line(error: Exception, kind: type[LmpressError], words: str) -> None:
    with pytest.raises(LmpressError) as caught, writing("out", AGAIN):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), RequestError("no"), BrokenPipeError(errno.EPIPE, "gone"), OSError("no number")],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing("out", AGAIN):
        raise error
    assert caught.value is error


def test_the_users_own_words_for_a_place() -> None:
    inside = str(Path("~/out/x").expanduser())
    with pytest.raises(LmpressError, match=r"^~/out: no space left"), writing("~/out", AGAIN):
        raise refused(errno.ENOSPC, inside)


def test_an_error_is_about_the_file_that_was_written() -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming("target"):
        raise refused(errno.ENOSPC, "source")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "target")
    with pytest.raises(ValueError, match="other"), naming("target"):
        raise ValueError("other")


def test_what_is_no_refusal_of_the_system() -> None:
    assert system_error(ValueError("28")) is None
    assert out_of_memory(ValueError("28")) is None
    assert "out of memory" in str(
        out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"))
    )
