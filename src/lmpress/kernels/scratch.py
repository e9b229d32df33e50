"""Buffers that a runner fills and forgets: reused, so that no call pays for fresh pages.

A fresh allocation of some megabytes costs a page fault every 4 KB, often more than the work done in it.
Each thread has its own buffers, a few for each device and at most `LIMIT` bytes each; nothing in them
outlives the call that asked for them.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LIMIT = 4 << 20
"""Bytes of a buffer that is kept: it should stay within the cache that the cores share."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.bytes: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized contiguous CPU tensor; the next call with the same `name` may overwrite it.

    What does not fit into `LIMIT` bytes is allocated for this call alone.
    """
    key = (name, shape, dtype)
    view = _buffers.views.get(key)
    if view is not None:
        return view
    size = math.prod(shape) * dtype.itemsize
    if size > LIMIT:
        return torch.empty(shape, dtype=dtype)
    with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
        whole = _buffers.bytes.get(name)
        if whole is None:
            whole = _buffers.bytes[name] = torch.empty(LIMIT, dtype=torch.uint8, device="cpu")
        view = whole[:size].view(dtype).view(shape)
    if len(_buffers.views) >= 256:  # views are cheap to make anew, and must not pile up
        _buffers.views.clear()
    _buffers.views[key] = view
    return view


def fitting(row_bytes: int, rows: int) -> int:
    """How many of `rows` rows of `row_bytes` bytes fit into a buffer: at least one, and even parts."""
    most = max(1, LIMIT // max(1, row_bytes))
    parts = -(-rows // most)
    return -(-rows // max(1, parts))
