"""Entropy coding of a matrix of integer codes: ANS with static models by context, in chunks.

The coder is `constriction`'s (asymmetric numeral systems, arXiv 1311.2540); all that it is told are whole
numbers, so that a stream means the same on every machine. This module imports numpy and constriction alone:
it is also the program that a second process runs to share the decoding (`python ans.py JOBS RESULTS`),
because the coder holds the interpreter's lock.

Contexts. Codes are about as large as (class of the row) + (class of the column), both logarithmic; that sum
is the context of a code. A context has one table of densities, symmetric in the sign: one byte at every knot,
in eighths of an octave below the densest, and straight lines between (of the logarithm). Knots are the
magnitudes up to 8, then 4 to an octave. What lies beyond a table's last knot is an escape, stored raw.

Stored are

    payload  uint8 (bytes,)      chunk after chunk: 32-bit words of the ANS coder, then 32-bit raw codes
    chunks   int32 (chunks, 3)   words, raw codes, CRC-32 of the decoded codes (seeded with that of `model`)
    model    uint8 (bytes,)      flags, classes of rows and of columns in nibbles, tables by context

A chunk holds whole rows, in the order of their class; within a chunk the codes of one context are together.
"""

from __future__ import annotations

import math
import sys
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import constriction
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CLASSES = 16
PRECISION = 22
"""Frequencies of a model sum to 2^22: exact in float32, and within the 24 bits of the coder."""
CODES_A_BYTE = 1 << 16
"""A matrix that claims more codes for each of its bytes is damaged: a chunk of equal ones takes 12 bytes."""
FEW_CODES = 1 << 26
"""So many are believed whatever the bytes."""
KNOTS = np.array([*range(8), *((4 + i % 4) << (i // 4 + 1) for i in range(37))])
"""0, 1, .. 8, 10, 12, 14, 16, 20, .. 4096."""
LARGEST = int(KNOTS[-1])
"""Larger magnitudes are always raw."""
LEFT = np.searchsorted(KNOTS, np.arange(LARGEST + 1), side="right") - 1
"""The last knot at or below every magnitude."""
FRACTION = 32 * (np.arange(LARGEST + 1) - KNOTS[LEFT]) // np.diff(KNOTS, append=LARGEST + 1)[LEFT]
"""How far every magnitude is towards the next knot, in 1/32."""


def _roots() -> Array:
    """2^32 * 2^(-i/256) for i in 0..255, in whole numbers alone."""
    root, halves = 1 << 31, []
    for _ in range(8):  # 2^(-1/2), 2^(-1/4), .. 2^(-1/256)
        root = math.isqrt(root << 32)
        halves.append(root)
    values = []
    for i in range(256):
        value = 1 << 32
        for bit, half in enumerate(halves):
            if i >> (7 - bit) & 1:
                value = value * half >> 32
        values.append(value)
    return np.array(values, dtype=np.uint64)


ROOTS = _roots()


@dataclass(frozen=True)
class Contexts:
    """Classes of rows and columns; the context of a code is the sum of the two."""

    rows: Array  # (out,) uint8 in 0..15
    columns: Array  # (in,) uint8 in 0..15

    @property
    def count(self) -> int:
        """Contexts that may occur."""
        return int(self.rows.max(initial=0)) + int(self.columns.max(initial=0)) + 1


def expand_table(table: bytes) -> tuple[int, Array]:
    """The largest magnitude L and the frequencies of -L..L and of the escape, whole numbers of sum 2^22."""
    used = table[0]
    steps = np.frombuffer(table, np.uint8, used + 1, 1).astype(np.int64)
    left, fraction = LEFT[: int(KNOTS[used - 1]) + 1], FRACTION[: int(KNOTS[used - 1]) + 1]
    right = np.minimum(left + 1, used - 1)
    exponents = 32 * steps[left] + fraction * (steps[right] - steps[left])
    exponents = np.concatenate([exponents[:0:-1], exponents, 32 * steps[used:]])
    weights = ROOTS[exponents & 255] >> (exponents >> 8).astype(np.uint64)
    scaled = (weights << np.uint64(8)) // (weights.sum() >> np.uint64(PRECISION - 8))
    frequencies = np.maximum(scaled, 1).astype(np.int64)
    frequencies[int(frequencies.argmax())] += (1 << PRECISION) - int(frequencies.sum())
    return len(left) - 1, frequencies


@dataclass(frozen=True)
class Coded:
    """An entropy-coded matrix, see the head of this module.

    Attributes:
        payload: uint8 (bytes,).
        chunks: int32 (chunks, 3).
        model: uint8 (bytes,).
        shape: (out, in) of the matrix.
        rows_per_chunk: rows in every chunk but the last.
        itemsize: bytes of a decoded code: 1, 2 or 4.
    """

    payload: Array
    chunks: Array
    model: Array
    shape: tuple[int, int]
    rows_per_chunk: int
    itemsize: int
    name: str = field(default="", compare=False)

    @cached_property
    def parsed(self) -> tuple[Contexts, list[bytes]]:
        """Contexts and tables. ValueError where the model is broken."""
        data = self.model.tobytes()
        try:
            flags, at = data[0], 1
            sizes = []
            for bit, n in enumerate(self.shape):
                packed = np.frombuffer(data, np.uint8, (n + 1) // 2 if flags >> bit & 1 else 0, at)
                at += len(packed)
                nibbles = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:n]
                sizes.append(nibbles if flags >> bit & 1 else np.zeros(n, np.uint8))
            contexts = Contexts(*sizes)
            tables = []
            for _ in range(contexts.count):
                used = data[at]
                tables.append(data[at : at + used + 2] if used else b"\0")
                at += len(tables[-1])
        except (IndexError, ValueError):
            raise ValueError(f"the model of {self._what} is truncated") from None
        if at != len(data) or any(t[0] > len(KNOTS) for t in tables):
            raise ValueError(f"the model of {self._what} is corrupt")
        return contexts, tables

    def check(self) -> None:
        """ValueError where there are more codes than the bytes can tell of; before any is made room for."""
        size = max(1, self.shape[0]) * max(1, self.shape[1])
        stored = len(self.payload) + 4 * self.chunks.size + len(self.model)
        if size > max(FEW_CODES, CODES_A_BYTE * stored):
            raise ValueError(f"{self._what} claims {size} codes in {stored} bytes")

    @property
    def _what(self) -> str:
        return self.name or f"an entropy-coded matrix of {self.shape[0]} x {self.shape[1]}"

    @cached_property
    def row_order(self) -> Array:
        """The rows as they are stored."""
        return np.argsort(self.parsed[0].rows, kind="stable")

    @cached_property
    def _starts(self) -> Array:
        """Where every chunk starts in the payload, and where the last ends. ValueError where that is off."""
        rows = self.shape[0] if self.shape[1] else 0
        expected = -(-rows // self.rows_per_chunk)
        if self.chunks.shape != (expected, 3) or bool((self.chunks[:, :2] < 0).any()):
            raise ValueError(f"the chunk table of {self._what} is corrupt")
        starts = np.append(0, 4 * np.cumsum(self.chunks[:, :2].sum(1, dtype=np.int64)))
        if int(starts[-1]) != len(self.payload):
            sizes = f"{len(self.payload)} bytes, its chunks take {int(starts[-1])}"
            raise ValueError(f"the payload of {self._what} has {sizes}")
        return starts

    def decode(self) -> Array:
        """The codes (out, in), int8, int16 or int32. ValueError names the chunk that is corrupt."""
        self.check()
        result = np.zeros(self.shape, np.dtype(f"i{self.itemsize}"))
        for number in range(len(self._starts) - 1):
            rows, codes = self.decode_chunk(number)
            result[rows] = codes
        return result

    def chunk_rows(self, number: int) -> Array:
        """The rows that a chunk holds."""
        return self.row_order[number * self.rows_per_chunk : (number + 1) * self.rows_per_chunk]

    def decode_rows(self, rows: Array) -> Array:
        """The codes of the rows `rows` (k,), each at most once; only their chunks are decoded."""
        self.check()
        place = np.empty(self.shape[0], np.int64)
        place[self.row_order] = np.arange(self.shape[0])
        chunk, offset = np.divmod(place[rows], self.rows_per_chunk)
        result = np.zeros((len(rows), self.shape[1]), np.dtype(f"i{self.itemsize}"))
        for number in np.unique(chunk).tolist() if result.size else ():
            here = chunk == number
            result[here] = self.decode_chunk(number)[1][offset[here]]
        return result

    def decode_chunk(self, number: int) -> tuple[Array, Array]:
        """The rows of one chunk and their codes (rows, in). ValueError where the chunk is corrupt."""
        rows = self.chunk_rows(number)
        try:
            codes = self._decode_rows(number, rows)
        except (ValueError, IndexError, OverflowError, AssertionError):
            codes = None
        wanted = int(self.chunks[number, 2]) & 0xFFFFFFFF
        if codes is None or checksum(codes, self._seed) != wanted:
            raise ValueError(f"chunk {number} of {self._what} is corrupt")
        return rows, codes

    @cached_property
    def _seed(self) -> int:
        return zlib.crc32(self.model.tobytes())

    @cached_property
    def _layout(self) -> tuple[Array, Array, list[Any]]:
        """Columns in the order of their class, the bounds of the classes, the coder's model by context."""
        contexts, tables = self.parsed
        order = np.argsort(contexts.columns, kind="stable")
        bounds = np.append(0, np.cumsum(np.bincount(contexts.columns, minlength=1)))
        return order, bounds, [_coder_model(t) if t[0] else None for t in tables]

    def _decode_rows(self, number: int, rows: Array) -> Array:
        words, raws, _ = (int(v) for v in self.chunks[number])
        start = int(self._starts[number])
        data = self.payload[start : start + 4 * words].tobytes()
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, "<u4").astype(np.uint32))
        data = self.payload[start + 4 * words : start + 4 * (words + raws)].tobytes()
        raw, used = np.frombuffer(data, "<i4"), 0
        order, bounds, models = self._layout
        block = np.empty((len(rows), self.shape[1]), np.dtype(f"i{self.itemsize}"))
        for context, places in rectangles(self.parsed[0].rows[rows], bounds):
            if models[context] is None:
                raise ValueError("a context without a table")
            middle, model = models[context]
            size = sum(block[place].size for place in places)
            values = coder.decode(model, size) - np.int32(middle)
            escaped = np.flatnonzero(values == middle + 1)
            if len(escaped):
                values[escaped] = raw[used : used + len(escaped)]
                used += len(escaped)
            at = 0
            for place in places:
                part = block[place]
                part[...] = values[at : at + part.size].reshape(part.shape)
                at += part.size
        if used != raws or not coder.is_empty():
            raise ValueError("codes are left over")
        result = np.empty_like(block)
        result[:, order] = block
        return result


def checksum(codes: Array, seed: int) -> int:
    """CRC-32 of codes as little-endian bytes."""
    little = codes.astype(codes.dtype.newbyteorder("<"), copy=False)
    return zlib.crc32(np.ascontiguousarray(little).data, seed)


def rectangles(row_classes: Array, bounds: Array) -> list[tuple[int, list[tuple[slice, slice]]]]:
    """Contexts in ascending order, each with its rectangles of a chunk whose rows are sorted by class."""
    cuts = [*np.flatnonzero(np.diff(row_classes, prepend=-1)).tolist(), len(row_classes)]
    places: dict[int, list[tuple[slice, slice]]] = {}
    for top, bottom in pairwise(cuts):
        for column_class in range(len(bounds) - 1):
            left, right = int(bounds[column_class]), int(bounds[column_class + 1])
            if right > left:
                context = int(row_classes[top]) + column_class
                places.setdefault(context, []).append((slice(top, bottom), slice(left, right)))
    return sorted(places.items())


def _coder_model(table: bytes) -> tuple[int, Any]:
    middle, frequencies = expand_table(table)
    model = constriction.stream.model.Categorical(frequencies.astype(np.float32), perfect=False)
    return middle, model


def write_jobs(file: BinaryIO, jobs: list[Coded]) -> None:
    """Matrices to decode, for another process."""
    for job in jobs:
        numbers = np.array([*job.shape, job.rows_per_chunk, job.itemsize])
        for part in (numbers, job.payload, job.chunks, job.model):
            np.lib.format.write_array(file, np.ascontiguousarray(part), allow_pickle=False)


def main(jobs: str, results: str) -> None:
    """Decode every matrix of the file `jobs`, and write the codes one after the other to `results`."""
    size = Path(jobs).stat().st_size
    with open(jobs, "rb") as source, open(results, "wb") as target:
        while source.tell() < size:
            numbers, payload, chunks, model = (
                np.lib.format.read_array(source, allow_pickle=False) for _ in range(4)
            )
            rows, columns, per_chunk, itemsize = (int(n) for n in numbers)
            Coded(payload, chunks, model, (rows, columns), per_chunk, itemsize).decode().tofile(target)


if __name__ == "__main__":
    main(*sys.argv[1:3])
