"""What a model is, in a few hundred bits: seconds for one of 16 GB, and the same wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmpress.source.accounting import Stored

WHOLE = 1 << 16
"""Bytes up to which a tensor is read whole: norms, biases, small matrices."""

PIECES = 64
"""How many places of a larger tensor are looked at, the first at its start and the last at its end."""

PIECE = 512
"""Bytes that are read at each place."""

PLACE = ("_name_or_path", "transformers_version")
"""Keys of a config that tell where it was read and by what, not what it is."""


def fingerprint(config: Any, tensors: Mapping[str, Stored], beside: Iterable[bytes]) -> str:
    """sha256 over the config, what stands beside the weights, and samples of every tensor.

    Fine-tuning, merging and quantizing again change nearly all values of a tensor, so that the samples see
    them; how the tensors are shared out among files, and where these lie, plays no part.

    Args:
        config: the model's transformers config.
        tensors: the stored tensors, by their names in the model.
        beside: whatever else decides what the model computes, such as the files of its tokenizer.
    """
    told = {key: value for key, value in config.to_dict().items() if key not in PLACE}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for content in beside:
        digest.update(hashlib.sha256(content).digest())
    by_file: dict[Path, list[str]] = {}
    for name in sorted(tensors):
        by_file.setdefault(tensors[name].path, []).append(name)
    samples = {}
    for path, names in by_file.items():
        with open(path, "rb", buffering=0) as file:
            for name in names:
                samples[name] = _sample(file, tensors[name])
    for name in sorted(samples):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.kind}:{tensor.shape};".encode() + samples[name])
    return digest.hexdigest()


def places(length: int) -> list[tuple[int, int]]:
    """Where a tensor of `length` bytes is looked at: (offset, bytes) pairs, in order."""
    if length <= WHOLE:
        return [(0, length)]
    return [(i * (length - PIECE) // (PIECES - 1), PIECE) for i in range(PIECES)]


def _sample(file: Any, tensor: Stored) -> bytes:
    digest = hashlib.sha256()
    for offset, count in places(tensor.length):
        file.seek(tensor.start + offset)
        digest.update(file.read(count))
    return digest.digest()
