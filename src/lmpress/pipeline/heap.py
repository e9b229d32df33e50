"""Memory that is free, back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any


def give_back_memory() -> None:
    """Let the allocator return what it keeps of memory that was freed.

    Batches that wait in turn free their tensors in another order than they were made in, which leaves holes
    in glibc's heap: without this the resident set grows with every block. Other allocators are left alone.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache
def _trim() -> Callable[[int], Any] | None:
    """`malloc_trim` where the C library has it."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
