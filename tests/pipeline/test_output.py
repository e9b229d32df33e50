"""Where a checkpoint can be, and a disk that is full at any moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import LmpressError, RequestError
from tests.conftest import EVERY_STEP
from tests.pipeline.test_resume import digest


def test_places_where_no_checkpoint_can_be(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, words in (
        ("file", "is a file"),
        ("file/out", "out: not a directory"),
        ("dangling", "is a link to nowhere, which does not exist"),
        ("x" * 300, "xxx: file name too long"),
    ):
        with pytest.raises(RequestError, match=words):
            lmpress.compress(tiny("llama"), "int8", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_disk_that_is_full_at_any_moment(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"model": tiny("llama"), "recipe": EVERY_STEP, "calibration": str(text_file)}
    synced = count_of_syncs(monkeypatch, lambda: lmpress.compress(output=tmp_path / "whole", **arguments))
    assert synced > 10
    for moment in range(0, synced, 3):
        output = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_after(moment))
            with pytest.raises(LmpressError, match="no space left on device; make room, and go on") as caught:
                lmpress.compress(output=output, **arguments)
        assert str(caught.value).startswith(f"{output}: ")
        lmpress.compress(output=output, resume=True, **arguments)
        assert digest(output) == digest(tmp_path / "whole")


def full_after(moment: int) -> Callable[[int], None]:
    """An `os.fsync` that finds room `moment` times."""
    left = moment

    def fsync(descriptor: int) -> None:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1

    return fsync


def count_of_syncs(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", calls.append)
        work()
    return len(calls)
