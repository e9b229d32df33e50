"""A GGUF file, opened with suspicion: what it holds, and which of it has been asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, Keys, ReaderTensor, dequantize

from lmpress.checkpoint import read_gguf_header
from lmpress.errors import RequestError
from lmpress.source.accounting import Stored

MAGIC = b"GGUF"
MISSING = object()


def is_gguf(path: Path) -> bool:
    """Whether a file is meant to be a GGUF file: by its name, or by how it begins."""
    with open(path, "rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(len(MAGIC)) == MAGIC


class GgufFile:
    """Metadata and tensors of a GGUF file; it remembers what was asked for, so that the rest can be told.

    Attributes:
        path: the file.
        architecture: what llama.cpp calls the kind of model, such as "llama"; keys begin with it.
        tensors: by their names in the file.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            RequestError: it is no GGUF file, truncated, a part of a model, or something else than a model.
        """
        self.path = path
        _check_start(path)
        read_gguf_header(path)  # before anything else reads it, and believes its counts
        self._reader = _opened(path)
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
        self._asked: set[str] = set()
        self.architecture = str(self.get("general.architecture", ""))
        self._check_kind()

    def _check_kind(self) -> None:
        kind = self.get("general.type", "model")
        if kind != "model" or self.architecture == "clip":
            raise RequestError(
                f"{self.path} holds no model by itself (its type is {kind!r}); name the model's file, and"
                " merge an adapter into it first"
            )
        parts = int(self.get("split.count", 0))
        if parts > 1:
            raise RequestError(
                f"{self.path} is one of {parts} parts of a model: join them with `llama-gguf-split --merge`"
            )
        if not self.architecture:
            raise RequestError(f"{self.path} does not say what it holds: it has no general.architecture")

    def get(self, key: str, default: Any = MISSING) -> Any:
        """The value of a key, or `default`. RequestError where there is neither."""
        self._asked.add(key)
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is MISSING:
            raise RequestError(f"{self.path} lacks the key {key}: convert the model again")
        return default

    def own(self, key: str, default: Any = MISSING) -> Any:
        """The value of a key of the architecture; of an array whose entries are all equal, the entry.

        Raises:
            RequestError: there is neither value nor default, or the layers differ.
        """
        key = f"{self.architecture}.{key}"
        value = self.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) == 1:
            return value[0]
        raise RequestError(
            f"{self.path}: {key} differs from layer to layer ({value}), which lmpress does not read"
        )

    def require(self, key: str, value: Any) -> None:
        """RequestError where the file has a key of the architecture with another value than `value`."""
        held = self.own(key, value)
        if held != value:
            raise RequestError(
                f"{self.path}: {self.architecture}.{key} is {held}, and lmpress reads only models in which it"
                f" is {value}"
            )

    def array(self, name: str) -> numpy.ndarray[Any, Any] | None:
        """A tensor that is no weight, in float32; None where it is missing."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        self._asked.add(name)
        return numbers(tensor)

    def asked(self, name: str) -> bool:
        """Whether a key or a tensor was asked for."""
        return name in self._asked

    def unread(self) -> dict[str, Any]:
        """The keys of the architecture that nobody asked for, without its name, and their values."""
        start = self.architecture + "."
        keys = [key for key in self._reader.fields if key.startswith(start) and key not in self._asked]
        return {key.removeprefix(start): self._reader.fields[key].contents() for key in keys}

    def header(self) -> bytes:
        """The bytes before the weights: all metadata, with the tokenizer."""
        with open(self.path, "rb") as file:
            return file.read(self._reader.data_offset)

    def stored(self) -> dict[str, Stored]:
        """What the header tells of each tensor."""
        return {name: self._told(tensor) for name, tensor in self.tensors.items()}

    def _told(self, tensor: ReaderTensor) -> Stored:
        return Stored(
            name=tensor.name,
            path=self.path,
            kind=tensor.tensor_type.name,
            dense=_is_read(tensor.tensor_type),
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            start=int(tensor.data_offset),
            length=int(tensor.n_bytes),
        )


def computing_keys() -> set[str]:
    """The keys that llama.cpp reads for some architecture: `attention.scale`, `logit_scale` and the like."""
    start = "{arch}."
    return {key.removeprefix(start) for key in _constants(Keys) if key.startswith(start)}


def _constants(group: type) -> Iterator[str]:
    for value in vars(group).values():
        if isinstance(value, type):
            yield from _constants(value)
        elif isinstance(value, str):
            yield value


def numbers(tensor: ReaderTensor) -> numpy.ndarray[Any, Any]:
    """The weights of a tensor in float32, of the type that `Stored.dense` tells of."""
    if tensor.tensor_type == GGMLQuantizationType.F64:  # which gguf reads and does not convert
        return numpy.asarray(tensor.data, dtype=numpy.float32)
    return numpy.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)


@lru_cache
def _is_read(kind: GGMLQuantizationType) -> bool:
    """Whether `numbers` are made of a type."""
    if kind == GGMLQuantizationType.F64:
        return True
    _, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(numpy.zeros((1, size), dtype=numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _opened(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except Exception as error:  # whatever numpy says of bytes that are not there
        if GGMLQuantizationType.__name__ in str(error):
            raise RequestError(f"{path} holds weights of a type that gguf does not know ({error})") from None
        size = path.stat().st_size
        raise RequestError(
            f"{path} is truncated or damaged: it has {size} bytes, and its header tells of others;"
            " fetch it again"
        ) from None


def _check_start(path: Path) -> None:
    """RequestError where the first eight bytes, magic and version, are not those of a GGUF file."""
    with open(path, "rb") as file:
        start = file.read(8)
    if not start:
        raise RequestError(f"{path} is an empty file: fetch it again")
    if start[:4] != MAGIC[: len(start)]:
        raise RequestError(f"{path} is no GGUF file: it begins with {start[:4]!r}, not with {MAGIC!r}")
    if len(start) < 8:
        raise RequestError(f"{path} is truncated: it has {len(start)} bytes; fetch it again")
    version = int.from_bytes(start[4:], "little")
    if not version & 0xFFFF:
        raise RequestError(f"{path} is a big-endian file; convert the model for little-endian machines")
    if version not in (2, 3):
        raise RequestError(f"{path} is of version {version} of GGUF; lmpress reads 2 and 3: convert it again")
