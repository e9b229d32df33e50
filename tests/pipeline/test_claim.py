"""One run at a time in a directory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import RequestError
from lmpress.pipeline.claim import claimed, unfinished
from lmpress.pipeline.journal import WORK

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@contextmanager
def other_process(output: Path) -> Iterator[int]:
    """Another process that is at work in `output`, until it is killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(output):
            os.write(told, b"!")
            signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)


@pytest.mark.parametrize("how", [{}, {"force": True}, {"resume": True}])
def test_a_second_run_is_refused_whatever_it_asks_for(
    how: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with other_process(output) as process:
        (output / WORK / "journal.jsonl").write_text("{}\n")
        with pytest.raises(RequestError, match=rf"out: another run is at work here \(process {process}\)"):
            lmpress.compress(tiny("llama"), "int8", output, **how)
        assert (output / WORK / "journal.jsonl").read_text() == "{}\n"


def test_the_lock_of_a_run_that_was_killed_holds_nobody(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with other_process(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / WORK / "lock").is_file()
    assert not unfinished(tmp_path / "out")
    lmpress.compress(tiny("llama"), "int8", tmp_path / "out")
    assert not (tmp_path / "out" / WORK).exists()


def test_two_runs_of_one_process(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(RequestError, match="another run"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_a_claim_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"):
        assert (tmp_path / "out" / WORK / "lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_stays(tmp_path: Path) -> None:
    with claimed(tmp_path):
        (tmp_path / WORK / "journal.jsonl").touch()
    assert unfinished(tmp_path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        pass
