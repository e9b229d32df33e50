"""How files get damaged: values that are swapped, counts that lie, bits that flip.

Everything draws from a `random.Random`: hypothesis gives one that it can shrink, a benchmark a seeded one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import gguf

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
)
NAMES = ("", ".", "..", "../outside", "/etc/hostname", "a\0b", "weight", "x" * 300, "\ud800", "a/b", "модель")


class Twice(dict[str, Any]):
    """An object whose first key stands in the text a second time, with another value."""


def odd_value(rng: Random) -> Any:
    """Something that stands where it should not."""
    deep: Any = []
    for _ in range(rng.choice((3, 20, 60))):
        deep = [deep] if rng.random() < 0.5 else {"form": "sum", "terms": [deep]}
    kinds = (
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(NAMES),
        lambda: rng.choice((None, True, False, [], {}, [[]], {"": {}})),
        lambda: rng.choice((float("nan"), float("inf"), -float("inf"), 0.5, 1e308, -0.0)),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(4))],
        lambda: deep,
    )
    return rng.choice(kinds)()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in items for place in places(part, (*path, key)))]


def damaged_json(value: Any, rng: Random) -> Any:
    """A JSON value with one to three changes somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(places(value))
        if not path:
            if rng.random() < 0.1:
                return odd_value(rng)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        _change(parent, path[-1], rng)
    return value


def _change(parent: Any, key: Any, rng: Random) -> None:
    old, kind = parent[key], rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(NAMES)] = parent.pop(key)
    elif kind == 2 and isinstance(old, dict):
        parent[key] = Twice(old)
    elif kind == 3 and isinstance(old, int | float):
        parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old)))
    elif kind == 4 and isinstance(old, list | dict) and isinstance(parent, dict):
        parent[rng.choice(list(parent))] = old
    else:
        parent[key] = odd_value(rng)


def json_text(value: Any) -> str:
    """JSON, with what the library would refuse or lose: keys that stand twice, depth without end."""
    if isinstance(value, dict):
        items = [f"{json.dumps(str(key))}: {json_text(part)}" for key, part in value.items()]
        if isinstance(value, Twice) and items:
            items.append(f"{json.dumps(str(next(iter(value))))}: 3")
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


def damaged_bytes(data: bytes, rng: Random) -> bytes:
    """Cut, lengthened, overwritten, with flipped bits, or all of them."""
    data_out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, at = rng.randrange(5), rng.randrange(len(data_out) + 1)
        if kind == 0:
            del data_out[at:]
        elif kind == 1:
            data_out[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 2:
            data_out[at : at + 8] = (rng.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little")
        elif kind == 3:
            del data_out[at : at + rng.randrange(1, 40)]
        elif at < len(data_out):
            data_out[at] ^= 1 << rng.randrange(8)
    return bytes(data_out)


def damaged_text(text: str, rng: Random) -> bytes:
    """The bytes of a text file, damaged somewhere, or nested without end, or not there at all."""
    if rng.random() < 0.1:
        return rng.choice(
            (b"", b"\0", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{", b"1" * 5000, b"null")
        )
    return damaged_bytes(text.encode(), rng)


def damaged_json_file(path: Path, rng: Random, inside: tuple[str, ...] = ()) -> None:
    """Damage a JSON file; only what lies at `inside`, where that is given, in its structure."""
    text = path.read_text(encoding="utf-8")
    if not inside and rng.random() < 0.3:
        path.write_bytes(damaged_text(text, rng))
        return
    whole = json.loads(text)
    parent = whole
    for key in inside[:-1]:
        parent = parent[key]
    if inside:
        parent[inside[-1]] = damaged_json(parent[inside[-1]], rng)
    else:
        whole = damaged_json(whole, rng)
    path.write_text(json_text(whole), encoding="utf-8")


def damaged_safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file whose header, length or data are no longer right."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    kind = rng.randrange(4)
    if kind == 0:  # one tensor lies on another, or where none is
        low, high = header[rng.choice(names)]["data_offsets"]
        shift = rng.choice((-8, -1, 0, 1, 8, 1 << 20))
        header[rng.choice(names)]["data_offsets"] = [low + shift, high + shift]
    elif kind == 1:
        header[rng.choice(names)]["dtype"] = rng.choice(
            ("F64", "F16", "I8", "U64", "BOOL", "F8_E8M0", "C64", "X")
        )
    elif kind == 2:
        header[rng.choice(names)]["shape"] = rng.choice(
            ([], [0], [-1, -64], [1 << 40, 1 << 40], [64.0], "64", [1], None)
        )
    else:
        header = damaged_json(header, rng)
    text = json_text(header).encode("utf-8", "surrogatepass")
    told = len(text) if rng.random() < 0.8 else rng.choice(NUMBERS) % (1 << 64)
    return told.to_bytes(8, "little") + text + data[8 + length :]


def gguf_numbers(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of the numbers in the header of a healthy GGUF file: counts, types, offsets."""
    found = [(4, 4), (8, 8), (16, 8)]
    reader = gguf.GGUFReader(path)
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    for field in [*fields, *(tensor.field for tensor in reader.tensors)]:
        at = field.offset
        for part in field.parts:
            if part.dtype.itemsize >= 4 and len(part) <= 4:
                found += [(at + i * part.dtype.itemsize, part.dtype.itemsize) for i in range(len(part))]
            at += part.nbytes
    return found


def damaged_gguf(data: bytes, numbers: list[tuple[int, int]], rng: Random) -> bytes:
    """A GGUF file with one to three numbers of its header changed, or damaged as any file."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.choice(numbers)
        old = int.from_bytes(changed[at : at + size], "little")
        new = rng.choice((*NUMBERS, old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * size)))
        changed[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(changed)
