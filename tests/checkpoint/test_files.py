"""Files are whole or not there; the damaged is refused in one line, what is let through libraries read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmpress.checkpoint import (
    copy_file,
    is_plain_name,
    json_text,
    read_header,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)
from lmpress.errors import RequestError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "'c' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
        (b"\xff", "decode"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_none(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(RequestError, match=words):
        read_json(tmp_path / "x.json")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for read in (read_json, read_header):
        with pytest.raises(RequestError, match="missing"):
            read(tmp_path / "nothing")
        with pytest.raises(RequestError, match="cannot read"):
            read(tmp_path)
        with pytest.raises(RequestError, match="cannot read"):
            read(tmp_path / ("x" * 300))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def rewrite(path: Path, header: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}


def test_a_healthy_header(file: Path) -> None:
    assert read_header(file) == {"a": A, "b": B}
    rewrite(file, {"a": A, "b": B, "__metadata__": {"format": "pt"}})
    assert set(read_tensors(file)) == set(read_header(file)) == {"a", "b"}


@pytest.mark.parametrize(
    "header",
    [
        {"a": A, "b": B | {"data_offsets": [20, 28]}},
        {"a": A, "b": B | {"data_offsets": [28, 24]}},
        {"a": A, "b": B | {"data_offsets": [24]}},
        {"a": A, "b": B | {"data_offsets": [24, "28"]}},
        {"a": A, "b": B | {"data_offsets": [float("nan"), float("inf")]}},
        {"a": A, "b": B | {"shape": [5]}},
        {"a": A, "b": B | {"shape": [-4]}},
        {"a": A, "b": B | {"shape": [1 << 62, 1 << 62]}},
        {"a": A, "b": B | {"shape": None}},
        {"a": A, "b": B | {"dtype": "F32"}},
        {"a": A, "b": B | {"dtype": "U7"}},
        {"a": A, "b": B, "__metadata__": {"format": 3}},
        {"a": A, "b": 3},
        [],
        {"b": B},
        {"a": A},
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b"\xff\xff",
    ],
)
def test_a_header_that_contradicts_itself(file: Path, header: Any) -> None:
    rewrite(file, header)
    with pytest.raises(RequestError, match=r"header|truncated"):
        read_header(file)


def test_names_that_lead_nowhere_else() -> None:
    assert is_plain_name("model-00001-of-00002.safetensors")
    for name in ("", ".", "..", "a/b", "/a", "../a", "a\0b", "\ud800", 3, None, ["a"]):
        assert not is_plain_name(name), name


def copied(path: Path) -> None:
    source = path.with_name("source")
    source.write_bytes(b"x")
    try:
        copy_file(source, path)
    finally:
        source.unlink()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bytes(path, b"x"),
        lambda path: write_json(path, {"x": 1}),
        lambda path: write_tensors(path, {"x": torch.zeros(3)}),
        copied,
    ],
    ids=["bytes", "json", "tensors", "copy"],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_nothing_is_left_of_a_write_that_failed(
    number: int, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"file") as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x.safetensors"
    with pytest.raises(OSError, match=r"x\.safetensors") as caught:
        write_tensors(path, {"x": torch.zeros(3)})  # safetensors tells it in words
    assert caught.value.errno == errno.ENOENT


def test_json_is_json() -> None:
    told = {"nan": float("nan"), "far": [float("inf"), 1.5], 3: ("é", None)}
    assert json.loads(json_text(told)) == {"nan": None, "far": [None, 1.5], "3": ["é", None]}
    assert "é" in json_text("é")
    assert json_text("é", encoding="ascii") == '"\\u00e9"'
    assert json.loads(json_text("not \udcff UTF-8")) == "not \udcff UTF-8"
