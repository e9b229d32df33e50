"""A line of the journal: an entry in JSON under a checksum that goes on from the line before it.

A line that was damaged, lost or put elsewhere breaks the chain there, and nothing behind it counts.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from lmpress.checkpoint import is_plain_name

SEAL = "crc32"
"""The key of the checksum, which is no part of the entry."""

KINDS: dict[str, type] = {
    "fingerprint": str,
    "block": int,
    "file": str,
    "bytes": int,
    "sha256": str,
    "plan": dict,
    "report": dict,
    "publishing": str,
    "stale": list,
}
"""What stands under the keys that the journal itself reads."""

TOGETHER = {
    "file": ("bytes", "sha256"),
    "block": ("file", "plan", "report"),
    "outer": ("file", "plan", "report"),
    "publishing": ("stale",),
}
"""Keys that come with others."""


def sealed(entry: dict[str, Any], before: int) -> tuple[str, int]:
    """The line of an entry, and its checksum, `before` being that of the line before it (0 at the start)."""
    plain = json.loads(json.dumps(entry))
    seal = _seal(plain, before)
    return json.dumps(plain | {SEAL: seal}) + "\n", seal


def unsealed(line: bytes, before: int) -> tuple[dict[str, Any], int] | None:
    """The entry of a line and its checksum; None where it is damaged, cut off, or out of its place."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(entry, dict):
        return None
    seal = entry.pop(SEAL, None)
    if not isinstance(seal, int) or seal != _seal(entry, before) or not _is_whole(entry):
        return None
    return entry, seal


def _seal(entry: dict[str, Any], before: int) -> int:
    return zlib.crc32(json.dumps(entry).encode(), before)


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an entry is one that can be worked with, and leads to no file but those beside the journal."""
    kinds = all(isinstance(entry[key], kind) for key, kind in KINDS.items() if key in entry)
    others = all(set(keys) <= entry.keys() for key, keys in TOGETHER.items() if key in entry)
    return kinds and others and all(is_plain_name(entry.get(key, "none")) for key in ("file", "publishing"))
