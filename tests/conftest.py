"""Shared fixtures: tiny checkpoints on disk, text, and a recipe that uses every step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from tests.tiny import save_tiny, tiny_text

torch.set_num_threads(1)  # tiny matrices: a second thread only waits

# where a shell has put the tests into the background, Ctrl-C is ignored, also by the programs that they start
signal.signal(signal.SIGINT, signal.default_int_handler)

EVERY_STEP: dict[str, Any] = {
    "name": "every-step",
    "calibration": {"samples": 8, "seq_len": 32},
    "steps": [
        {"svd": {"targets": "attention", "ratio": 0.8}},
        {
            "prune_neurons": {
                "allocation": "loss",
                "ratio": 0.2,
                "multiple_of": 8,
            }
        },
        {"quantize": {"targets": "linears", "bits": 8}},
        {"quantize": {"targets": "embeddings", "bits": 8}},
    ],
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English-like text, enough for a tiny calibration."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny_text(20_000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English-like text that no calibration sees."""
    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    words = tiny_text(6_000, seed=77).split()
    path.write_text(" ".join(reversed(words)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, made once a session."""
    root = tmp_path_factory.mktemp("tiny")

    def directory(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else save_tiny(name, path)

    return directory


@pytest.fixture(scope="session")
def compressed(
    tiny: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The checkpoint of a tiny model under EVERY_STEP, made once a session; not to be changed."""
    root = tmp_path_factory.mktemp("compressed")

    def directory(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            lmpress.compress(tiny(name), EVERY_STEP, path, calibration=str(text_file))
        return path

    return directory
