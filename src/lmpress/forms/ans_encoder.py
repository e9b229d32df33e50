"""The encoder of `lmpress.forms.ans`: contexts and tables that take the fewest bits, and the streams."""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np

from lmpress.forms.ans import (
    CLASSES,
    FRACTION,
    KNOTS,
    LARGEST,
    LEFT,
    PRECISION,
    Array,
    Coded,
    Contexts,
    checksum,
    expand_table,
    rectangles,
)

PART = 1 << 22
"""Codes that are counted at a time."""
RAW_BITS = 48
"""What an escaped code costs, about: 32 bits and the escape symbol."""
NEAREST = np.minimum(LEFT + (FRACTION >= 16), len(KNOTS) - 1)
"""The knot that counts for every magnitude."""


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
