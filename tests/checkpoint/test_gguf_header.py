"""The header of a GGUF file, against files put together by hand and against those of the `gguf` package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from lmpress.checkpoint.gguf_header import TensorEntry, read_gguf_header
from lmpress.errors import RequestError

F32, Q8_0 = 0, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def file_of(
    folder: Path,
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    counts: tuple[int, int] | None = None,
) -> Path:
    """A file with a header, padding, and `data` bytes; `counts` of tensors and keys where they lie."""
    numbers = counts or (len(tensors), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join([*keys, *tensors])
    path = folder / "model.gguf"
    path.write_bytes(header + bytes(-len(header) % 32 + data))
    return path


def test_it_tells_what_the_package_tells(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc"])
    writer.add_array("numbers", [1.0, 2.0])
    writer.add_tensor("first", numpy.ones((3, 32), numpy.float32))
    codes = gguf.quantize(numpy.ones((2, 64), numpy.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("second", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.keys["general.architecture"] == "llama"
    assert header.keys["llama.block_count"] == 2
    assert header.keys["numbers"] is None
    for entry in reader.tensors:
        found = header.tensors[entry.name]
        assert found.shape == tuple(reversed(entry.shape.tolist()))
        assert (found.kind, found.start) == (entry.tensor_type, entry.data_offset)
        assert found.stop - found.start == entry.n_bytes


def test_a_file_of_a_big_endian_machine(tmp_path: Path) -> None:
    name = struct.pack(">Q", 1) + b"x"
    header = b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + name + struct.pack(">IQIQ", 1, 2, F32, 0)
    (tmp_path / "big.gguf").write_bytes(header + bytes(-len(header) % 32 + 8))
    assert read_gguf_header(tmp_path / "big.gguf").tensors == {"x": TensorEntry((2,), F32, 64, 72)}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"counts": (1 << 62, 0)}, "4611686018427387904 tensors"),
        ({"counts": (0, 1 << 62)}, "4611686018427387904 keys"),
        ({"keys": [key("k", 9, struct.pack("<IQ", 8, 1 << 60))]}, "strings"),
        ({"keys": [key("k", 9, struct.pack("<IQ", 4, 1 << 60))]}, "truncated"),
        ({"keys": [key("k", 9, struct.pack("<IQ", 9, 1))]}, "list of an unknown type"),
        ({"keys": [key("k", 99, b"")]}, "unknown type"),
        ({"keys": [key("k", 8, struct.pack("<Q", 1 << 63))]}, "truncated"),
        ({"keys": [struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0)]}, "utf-8"),
        ({"keys": [key("k", 0, b"1"), key("k", 0, b"1")]}, "twice"),
        ({"keys": [key("general.alignment", 4, struct.pack("<I", 0))]}, "power of two"),
        ({"keys": [key("general.alignment", 4, struct.pack("<I", 48))]}, "power of two"),
        ({"keys": [key("llama.block_count", 4, struct.pack("<I", 1 << 31))]}, "block_count"),
        ({"keys": [key("llama.embedding_length", 4, struct.pack("<I", 1 << 31))]}, "embedding_length"),
        ({"tensors": [tensor("t", (8,))], "data": 31}, "truncated"),
        ({"tensors": [tensor("t", (1 << 63, 1 << 63))], "data": 32}, "truncated"),
        ({"tensors": [tensor("t", (8,), 77)], "data": 32}, "unknown type"),
        ({"tensors": [tensor("t", (33,), Q8_0)], "data": 64}, "whole blocks"),
        ({"tensors": [tensor("t", (0, 1 << 63))], "data": 64}, "whole blocks"),
        ({"tensors": [tensor("t", (1, 1, 1, 1, 8))], "data": 32}, "5 dimensions"),
        ({"tensors": [tensor("t", (8,)), tensor("t", (8,), offset=32)], "data": 64}, "twice"),
        ({"tensors": [tensor("t", (8,)), tensor("u", (8,), offset=16)], "data": 64}, "lies on another"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, parts: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        read_gguf_header(file_of(tmp_path, **parts))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"GGUF\x03\0\0", b"GGML\x03\0\0\0", b"GGUF\x01\0\0\0" + bytes(20)]
)
def test_what_is_no_gguf(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(RequestError, match="no GGUF file"):
        read_gguf_header(tmp_path / "model.gguf")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        read_gguf_header(tmp_path / "model.gguf")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, [key("k", 8, text("value"))], [tensor("t", (8,))], data=32)
    whole = path.read_bytes()
    assert read_gguf_header(path).keys == {"k": "value"}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(RequestError):
            read_gguf_header(path)
