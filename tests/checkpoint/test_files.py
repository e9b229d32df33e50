"""Files are whole or not there, and an error names the file that was to be written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmpress.checkpoint import copy_file, json_text, write_bytes, write_json, write_tensors


def copied(path: Path) -> None:
    source = path.with_name("source")
    source.write_bytes(b"x")
    try:
        copy_file(source, path)
    finally:
        source.unlink()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bytes(path, b"x"),
        lambda path: write_json(path, {"x": 1}),
        lambda path: write_tensors(path, {"x": torch.zeros(3)}),
        copied,
    ],
    ids=["bytes", "json", "tensors", "copy"],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_nothing_is_left_of_a_write_that_failed(
    number: int, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"file") as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x.safetensors"
    with pytest.raises(OSError, match=r"x\.safetensors") as caught:
        write_tensors(path, {"x": torch.zeros(3)})  # safetensors tells it in words
    assert caught.value.errno == errno.ENOENT


def test_json_is_json() -> None:
    told = {"nan": float("nan"), "far": [float("inf"), 1.5], 3: ("é", None)}
    assert json.loads(json_text(told)) == {"nan": None, "far": [None, 1.5], "3": ["é", None]}
    assert "é" in json_text("é")
    assert json_text("é", encoding="ascii") == '"\\u00e9"'
    assert json.loads(json_text("not \udcff UTF-8")) == "not \udcff UTF-8"
