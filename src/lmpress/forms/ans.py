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
PART = 1 << 22
"""Codes that are counted at a time."""
RAW_BITS = 48
"""What an escaped code costs, about: 32 bits and the escape symbol."""
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
NEAREST = np.minimum(LEFT + (FRACTION >= 16), len(KNOTS) - 1)
"""The knot that counts for every magnitude."""


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


def classify(codes: Array, resolution: float) -> Contexts:
    """Classes by mean magnitude, `resolution` classes an octave; 0 makes one class of all."""
    rows, columns = codes.shape
    if not resolution or not codes.size:
        return Contexts(np.zeros(rows, np.uint8), np.zeros(columns, np.uint8))
    magnitude = np.abs(codes.astype(np.float32))
    by_column = np.maximum(magnitude.mean(0), 0.25 / rows)
    by_row = np.maximum((magnitude / by_column).mean(1), 0.25 / columns)
    by_column = np.maximum((magnitude / by_row[:, None]).mean(0), 0.25 / rows)
    return Contexts(_levels(by_row, resolution), _levels(by_column, resolution))


def _levels(size: Array, resolution: float) -> Array:
    level = np.round(resolution * np.log2(size)).astype(np.int64)
    level -= max(int(level.min()), int(level.max()) - (CLASSES - 1))
    return np.clip(level, 0, CLASSES - 1).astype(np.uint8)


def histogram(codes: Array, contexts: Contexts) -> Array:
    """How often every magnitude occurs in every context, (contexts, M + 2); the last column counts above M.

    M is the largest magnitude that occurs, or `LARGEST` if that is less.
    """
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    top = min(max(-low, high), LARGEST)
    size = contexts.count * (top + 2)
    by_row, by_column = (
        classes.astype(np.int64) * (top + 2) for classes in (contexts.rows, contexts.columns)
    )
    counts = np.zeros(size, np.int64)
    part = max(1, PART // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], part):  # of a whole table, the indices would take gigabytes
        magnitude = np.abs(codes[start : start + part].astype(np.int64))
        index = np.minimum(magnitude, top + 1, out=magnitude)
        index += by_row[start : start + part, None]
        index += by_column
        counts += np.bincount(index.reshape(-1), minlength=size)
    return counts.reshape(contexts.count, top + 2)


def fit_table(counts: Array) -> tuple[bytes, float]:
    """One context's table from its histogram (M + 2,), and the bits that codes and table will take."""
    total = int(counts.sum())
    if not total:
        return b"\0", 8.0
    top = len(counts) - 2
    beyond = total - np.cumsum(counts[:-1])
    knots = KNOTS[: int(np.searchsorted(KNOTS, top)) + 1]
    cost = beyond[np.minimum(knots, top)] * RAW_BITS + 8 * np.arange(1, len(knots) + 1)
    used = int(np.argmin(cost)) + 1
    last = min(int(KNOTS[used - 1]), top)
    escapes = int(beyond[last])
    near = np.minimum(NEAREST[: last + 1], used - 1)
    width = np.bincount(NEAREST[: int(KNOTS[used - 1]) + 1], minlength=used)[:used]
    signs = np.where(np.arange(used) > 0, 2, 1)
    density = np.maximum(np.bincount(near, counts[: last + 1], used), 0.4) / (signs * width)
    density = np.append(density, max(escapes, 0.02))
    steps = np.clip(np.round(8 * np.log2(density.max() / density)), 0, 255).astype(np.uint8)
    table = bytes([used]) + steps.tobytes()
    middle, frequencies = expand_table(table)
    bits = PRECISION - np.log2(frequencies[middle : middle + last + 1])
    spent = float((counts[: last + 1] * bits).sum())
    spent += escapes * (PRECISION - float(np.log2(frequencies[-1])) + 32)
    return table, spent + 8 * len(table)


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


def model_bytes(contexts: Contexts, tables: list[bytes]) -> bytes:
    """The stored model: flags, nibbles, tables."""
    flags, parts = 0, []
    for bit, classes in enumerate((contexts.rows, contexts.columns)):
        if classes.any():
            flags |= 1 << bit
            padded = np.append(classes, np.zeros(len(classes) % 2, np.uint8))
            parts.append((padded[::2] | padded[1::2] << 4).astype(np.uint8).tobytes())
    return b"".join([bytes([flags]), *parts, *tables])


RESOLUTIONS = (0.0, 1.0, 2.0, 4.0)
"""Classes an octave that `choose_model` tries."""


def choose_model(codes: Array) -> tuple[Contexts, list[bytes], float]:
    """Contexts and tables that take the fewest bits for `codes` (out, in), and these bits, model included."""
    best: tuple[Contexts, list[bytes], float] | None = None
    for resolution in RESOLUTIONS:
        contexts = classify(codes, resolution)
        fitted = [fit_table(counts) for counts in histogram(codes, contexts)]
        tables = [table for table, _ in fitted]
        kept = len(model_bytes(contexts, tables)) - sum(len(t) for t in tables)
        bits = sum(bits for _, bits in fitted) + 8 * kept
        if best is None or bits < best[2]:
            best = contexts, tables, bits
    assert best is not None
    return best


def encode(codes: Array, chunk_size: int = 1 << 16) -> Coded:
    """Entropy-code whole numbers (out, in) within 32 signed bits, `chunk_size` codes a chunk."""
    rows, columns = codes.shape
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    itemsize = next((s for s in (1, 2, 4) if -(1 << 8 * s - 1) <= low and high < 1 << 8 * s - 1), 0)
    if not itemsize:
        raise ValueError("codes do not fit into 32 bits")
    codes = codes.astype(np.dtype(f"i{itemsize}"))
    contexts, tables, _ = choose_model(codes)
    model = np.frombuffer(model_bytes(contexts, tables), np.uint8)
    empty = np.zeros((0, 3), np.int32)
    per_chunk = max(1, chunk_size // max(1, columns))
    coded = Coded(np.zeros(0, np.uint8), empty, model, (rows, columns), per_chunk, itemsize)
    parts, table = [], []
    for number in range(-(-rows // per_chunk) if columns else 0):
        chosen = coded.chunk_rows(number)
        words, raw = _encode_rows(codes[chosen], contexts.rows[chosen], coded._layout)
        parts += [words.astype("<u4").tobytes(), raw.astype("<i4").tobytes()]
        table.append((len(words), len(raw), checksum(codes[chosen], coded._seed)))
    payload = np.frombuffer(b"".join(parts), np.uint8)
    chunks = np.array(table, np.int64).reshape(-1, 3).astype(np.uint32).view(np.int32)
    coded = Coded(payload, chunks, model, (rows, columns), per_chunk, itemsize)
    coded.check()
    return coded


def _encode_rows(
    block: Array, row_classes: Array, layout: tuple[Array, Array, list[Any]]
) -> tuple[Array, Array]:
    """The words and the raw codes of one chunk."""
    order, bounds, models = layout
    block = block[:, order]
    coder = constriction.stream.stack.AnsCoder()
    raw: list[Array] = []
    for context, places in reversed(rectangles(row_classes, bounds)):
        middle, model = models[context]
        values = np.concatenate([block[place].reshape(-1) for place in places]).astype(np.int64)
        escaped = np.abs(values) > middle
        raw.append(values[escaped])
        symbols = np.where(escaped, 2 * middle + 1, values + middle).astype(np.int32)
        coder.encode_reverse(symbols, model)
    return coder.get_compressed(), np.concatenate(raw[::-1])


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
