"""Surveys that several recipes share: kept whole, or not found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lmpress.checkpoint import read_json, sha256_file, write_bytes, write_tensors
from lmpress.errors import RequestError
from lmpress.plan import Plan
from lmpress.version import __version__

Survey = tuple[dict[str, Any], dict[str, Tensor]]
"""What the journal keeps, and tensors."""


def key_of(plan: Plan, model: str, text: str, precision: torch.dtype, **more: Any) -> str:
    """All that decides a survey, hashed.

    Args:
        model: the fingerprint of the source.
        text: of the calibration windows.
        precision: that products are computed in.
        more: what tells this kind of survey from others, JSON-able.
    """
    told = more | {
        "calibration": plan.recipe.calibration.model_dump(mode="json"),
        "precision": str(precision),
        "seed": plan.recipe.seed,
        "model": model,
        "text": text,
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def shared_survey(directory: Path | None, key: str | None, make: Callable[[], Survey]) -> Survey:
    """What was kept under `key`, else what `make` tells, which is kept; without either, nothing is kept."""
    if directory is None or key is None:
        return make()
    kept = kept_survey(directory, key)
    if kept is None:
        kept = make()
        keep_survey(directory, key, *kept)
    return kept


def keep_survey(directory: Path, key: str, survey: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Keep a survey under the hash of all that decides it; the tensors first."""
    directory.mkdir(parents=True, exist_ok=True)
    told, data = _paths(directory, key)
    write_tensors(data, tensors)
    kept = json.dumps({"tensors": sha256_file(data), "survey": survey})  # as it is: a loss may be infinite
    write_bytes(told, kept.encode())


def kept_survey(directory: Path, key: str) -> Survey | None:
    """What was kept under `key`; None for nothing, and where it is torn or damaged."""
    told, data = _paths(directory, key)
    if not told.is_file() or not data.is_file():
        return None
    try:
        kept = read_json(told)
    except RequestError:
        return None
    if not isinstance(kept, dict) or kept.get("tensors") != sha256_file(data):
        return None
    return dict(kept["survey"]), load_file(data)


def _paths(directory: Path, key: str) -> tuple[Path, Path]:
    return directory / f"{key}.json", directory / f"{key}.safetensors"
