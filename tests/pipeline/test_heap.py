"""Memory goes back after every block, where the C library can be told to."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.pipeline import heap, run


def test_after_every_block(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(run, "give_back_memory", lambda: calls.append(None))
    lmpress.compress(tiny("llama-untied"), "int8", tmp_path / "out")
    assert len(calls) == 3


def test_a_library_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: object) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", none)
    heap._trim.cache_clear()
    try:
        heap.give_back_memory()
        assert heap._trim() is None
    finally:
        heap._trim.cache_clear()
