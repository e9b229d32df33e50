"""The header of a GGUF file, read with suspicion: a count is believed once the file is known to hold as much.

The layout: magic "GGUF", version u32, tensors u64, keys u64; the keys (name, type u32, value); the tensors
(name, dimensions u32, sizes u64 each, type u32, offset u64); padding; the data. A string is its length (u64)
and UTF-8. In files for big-endian machines every number stands the other way round.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lmpress.errors import RequestError

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The format of a value (that of `struct`), by the number of its type."""
STRING, ARRAY = 8, 9
DIMENSIONS = 4
"""The most that a tensor has."""
ALIGNMENT = 32
SMALLEST = {"key": 13, "tensor": 24, "string": 8}
"""The fewest bytes that one of them takes."""
LENGTHS = (
    "embedding_length",
    "feed_forward_length",
    "head_count",
    "head_count_kv",
    "key_length",
    "value_length",
    "dimension_count",
)
"""How the keys end whose values are sizes of the model's matrices."""

T = TypeVar("T")


Value = int | float | str | None
"""What stands under a key; None for a list."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        shape: outermost first, the other way round than in the file.
        kind: the number of its type.
        start: of its data in the file, in bytes.
        stop: where its data ends.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself: its keys with their values, and its tensors by name."""

    keys: dict[str, Value]
    tensors: dict[str, TensorEntry]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; its data is not looked at.

    Raises:
        RequestError: a file that cannot be read, is no GGUF file, is truncated, or has a damaged header.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(data)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as fault:  # that an empty file cannot be mapped is one, too
        raise RequestError(f"{path} is no GGUF file, or it is damaged: {fault}; fetch it again") from None


class _Cursor:
    """A place in the file, and the reading from there on; ValueError beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.order = "<"

    def number(self, code: str) -> Any:
        """The next number, of a format of `struct`."""
        return struct.unpack(self.order + code, self.take(struct.calcsize(f"={code}")))[0]

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        start = self.skip(size)
        return self.data[start : start + size]

    def skip(self, size: int) -> int:
        """Pass `size` bytes by; where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise ValueError(f"truncated at byte {len(self.data)}, where its header goes on")
        self.at += size
        return start

    def string(self) -> str:
        """The next string."""
        return self.take(self.number("Q")).decode("utf-8")  # UnicodeDecodeError is a ValueError

    def count(self, what: str) -> int:
        """How many of something follow; refused where the rest of the file cannot hold as many."""
        count = int(self.number("Q"))
        if count * SMALLEST[what] > len(self.data) - self.at:
            raise ValueError(f"truncated, or it counts wrong: {count} {what}s in {len(self.data)} bytes")
        return count


def _header(data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        cursor.order, cursor.at = ">", 4
        version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; known: {', '.join(map(str, VERSIONS))}")
    tensors = cursor.count("tensor")
    keys = _unique(_key(cursor) for _ in range(cursor.count("key")))
    entries = [_tensor(cursor) for _ in range(tensors)]
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}, no power of two")
    placed = _placed(_unique(entries), -(-cursor.at // alignment) * alignment, len(data))
    _check_sizes(keys, len(placed), len(data))
    return GgufHeader(keys, placed)


def _unique(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in named:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _key(cursor: _Cursor) -> tuple[str, Value]:
    name, kind = cursor.string(), cursor.number("I")
    if kind == ARRAY:
        _skip_array(cursor, name)
        return name, None
    if kind == STRING:
        return name, cursor.string()
    if kind not in SCALARS:
        raise ValueError(f"the value of {name!r} is of an unknown type, {kind}")
    value: Value = cursor.number(SCALARS[kind])
    return name, value


def _skip_array(cursor: _Cursor, name: str) -> None:
    kind = cursor.number("I")
    if kind == STRING:
        for _ in range(cursor.count("string")):
            cursor.string()
    elif kind in SCALARS:
        cursor.skip(cursor.number("Q") * struct.calcsize(f"={SCALARS[kind]}"))
    else:
        raise ValueError(f"{name!r} is a list of an unknown type, {kind}")


def _tensor(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """Name, shape, type and offset of the next tensor."""
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {dimensions} dimensions; {DIMENSIONS} are the most")
    shape = tuple(int(cursor.number("Q")) for _ in range(dimensions))[::-1]
    return name, (shape, cursor.number("I"), cursor.number("Q"))


def _placed(
    tensors: dict[str, tuple[tuple[int, ...], int, int]], start: int, size: int
) -> dict[str, TensorEntry]:
    """Where the tensors lie, in data from `start` on; ValueError where it is not in it, or on each other."""
    from gguf import GGML_QUANT_SIZES

    block_of = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
    placed = {}
    for name, (shape, kind, offset) in tensors.items():
        if kind not in block_of:
            raise ValueError(f"the tensor {name!r} is of an unknown type, {kind}")
        weights, length = block_of[kind]
        if 0 in shape or (shape and shape[-1] % weights):
            raise ValueError(
                f"the rows of {name!r}, of {shape[-1]} weights, are no whole blocks of {weights}"
            )
        stop = start + offset + math.prod(shape) // weights * length
        placed[name] = TensorEntry(shape, kind, start + offset, stop)
        if stop > size:
            raise ValueError(f"truncated: {size} bytes, and {name!r} ends at {stop}")
    last = start
    for name, entry in sorted(placed.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < last:
            raise ValueError(f"the tensor {name!r} lies on another one")
        last = entry.stop
    return placed


def _check_sizes(keys: dict[str, Value], tensors: int, size: int) -> None:
    """ValueError where the model would be larger than any that the file can hold."""
    for name, value in keys.items():
        most = tensors if name.endswith(".block_count") else size if name.endswith(LENGTHS) else None
        if isinstance(value, int) and most is not None and not 0 <= value <= most:
            raise ValueError(f"{name} is {value}, and the file has {tensors} tensors in {size} bytes")
