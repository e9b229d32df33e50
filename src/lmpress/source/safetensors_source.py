"""A Hugging Face directory with safetensors weights, in one file or in shards."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmpress.checkpoint import INDEX, SINGLE, indexed_paths, read_header, read_index, shard_paths
from lmpress.errors import RequestError
from lmpress.progress import note
from lmpress.source.accounting import Stored, account_for_rest, settle, some
from lmpress.source.companions import copy_companions
from lmpress.source.config_json import read_config
from lmpress.source.model import ModelSource
from lmpress.source.rotary import FREQUENCIES, check_frequencies
from lmpress.source.tokenizer_files import DECIDING, read_tokenizer

DENSE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The types of a safetensors file that weights are read from."""

ADAPTED = "base_model.model."
"""What an adapter's training puts before the names of the model that it adapts."""

ROWS = 1 << 12
"""How many rows of two tables are compared at a time."""


class SafetensorsSource(ModelSource):
    """A Hugging Face directory with safetensors weights, in one file or in shards.

    Raises:
        RequestError: the directory holds no dense causal language model, or one that is damaged, incomplete,
            or more than its config tells of.
    """

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        super().__init__(name or str(directory), read_config(directory))
        self._shards = shard_paths(directory)
        single = directory / SINGLE
        if single in self._shards and (directory / INDEX).is_file() and indexed_paths(directory) != [single]:
            raise RequestError(
                f"{directory} holds {SINGLE} and the shards of {INDEX}, two models: remove the one not meant"
            )
        stored = _stored(self._shards)
        self._tensors = settle(self.name, self.shapes, stored, self._aliases)
        self._account_for_rest(stored)
        self._account_for_files(stored)

    def _aliases(self, name: str) -> Iterator[str]:
        """Checkpoints of a base model lack its prefix; of tied ones either name may be there."""
        prefix = self.skeleton.base_model_prefix + "."
        for known in (name, *self._twins.get(name, ())):
            yield from (known, known.removeprefix(prefix), prefix + known)

    @cached_property
    def _twins(self) -> dict[str, list[str]]:
        """The further names of tensors that are tied, by their first."""
        first: dict[int, str] = {}
        twins: dict[str, list[str]] = {}
        for name, tensor in self.skeleton.state_dict(keep_vars=True).items():
            if first.setdefault(id(tensor), name) != name:
                twins.setdefault(first[id(tensor)], []).append(name)
        return twins

    def _account_for_rest(self, stored: dict[str, Stored]) -> None:
        used = {tensor.name for tensor in self._tensors.values()}
        ignored = [re.compile(p) for p in self.skeleton._keys_to_ignore_on_load_unexpected or ()]
        copies = {alias: name for name in self._twins for alias in self._aliases(name)}
        rest = []
        for name, tensor in stored.items():
            if FREQUENCIES.search(name):
                with _open(tensor.path) as file:
                    check_frequencies(self.name, name, file.get_tensor(name), self.skeleton)
                continue
            if name in used or any(pattern.search(name) for pattern in ignored):
                continue
            if name in copies:
                self._check_copy(copies[name], tensor)
            else:
                rest.append(name)
        account_for_rest(self.name, rest, self._belongs)

    def _account_for_files(self, stored: dict[str, Stored]) -> None:
        """Refuse an index that tells of more than its files hold; tell of files that are not read."""
        if self.directory / SINGLE not in self._shards:
            lost = [name for name in read_index(self.directory) if name not in stored]
            if lost:
                raise RequestError(
                    f"{self.directory / INDEX} names {some(lost)}, and no file of it holds that; fetch the"
                    " model again"
                )
        beside = sorted({path.name for path in self.directory.glob("*.safetensors")})
        unread = [name for name in beside if self.directory / name not in self._shards]
        if unread:
            note(
                f"{self.name} holds weights that are no part of the model, which are not used: {some(unread)}"
            )

    def _check_copy(self, name: str, copy: Stored) -> None:
        """RequestError where a tied tensor is stored twice, and differently."""
        original = self._tensors[name]
        if not _equal(original, copy):
            raise RequestError(
                f"{self.name}: {copy.name} differs from {original.name}, and tie_word_embeddings is true"
                " in config.json, so that only one can count; set it to false if both are meant"
            )

    @cached_property
    def _modules(self) -> set[str]:
        """The modules that compute; not those that only hold the blocks."""
        holders = {"", *_ancestors(self.layout.blocks), self.layout.blocks}
        return {path for path, _ in self.skeleton.named_modules()} - holders

    def _belongs(self, name: str) -> bool:
        """Whether the skeleton has the module that a tensor is named after, or one around it."""
        bare = name.removeprefix(ADAPTED)
        prefix = self.skeleton.base_model_prefix + "."
        return any(path in self._modules for known in (bare, prefix + bare) for path in _ancestors(known))

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._tensors[name].path, []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with _open(path) as file:  # closed again, so that its pages are let go
                for name in wanted:
                    tensors[name] = file.get_tensor(self._tensors[name].name).clone()
        return tensors

    @property
    def tensors(self) -> dict[str, Stored]:
        return self._tensors

    @cached_property
    def dtype(self) -> torch.dtype:
        bytes_of: Counter[str] = Counter()
        for tensor in self._tensors.values():
            bytes_of[tensor.kind] += tensor.length
        return DENSE[bytes_of.most_common(1)[0][0]]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._shards)

    @property
    def location(self) -> tuple[Path, str | None]:
        return self.directory, None

    def tokenizer(self) -> Any:
        return read_tokenizer(self.directory, None, self.name, self.config)

    def check_tokenizer(self) -> None:
        """Files are copied, whatever they hold."""

    def copy_tokenizer(self, directory: Path) -> None:
        copy_companions(self.directory, directory)

    def _beside(self) -> Iterable[bytes]:
        return ((self.directory / n).read_bytes() for n in DECIDING if (self.directory / n).is_file())


def _open(path: Path) -> Any:
    """A safetensors file. RequestError where its header is not one that the library takes."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise RequestError(f"{path} is damaged ({error}): fetch it again") from None


def _stored(shards: list[Path]) -> dict[str, Stored]:
    """All tensors of the shards. RequestError where a header contradicts itself, or two hold one name."""
    stored: dict[str, Stored] = {}
    for path in shards:
        header = read_header(path)
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in header.items():
            if name in stored:
                raise RequestError(f"{path} and {stored[name].path.name} both hold {name}; fetch them again")
            stored[name] = _told(path, name, start, entry)
    return stored


def _told(path: Path, name: str, start: int, entry: dict[str, Any]) -> Stored:
    kind, shape, (low, high) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if kind in DENSE and math.prod(shape) * DENSE[kind].itemsize != high - low:
        raise RequestError(
            f"{path} is damaged: {name} of shape {shape} cannot take {high - low} bytes; fetch it again"
        )
    return Stored(name, path, kind, kind in DENSE, shape, start + low, high - low)


def _ancestors(path: str) -> list[str]:
    """The modules around a path: "a.b.c" -> ["a", "a.b"]."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _equal(one: Stored, other: Stored) -> bool:
    if one.shape != other.shape or one.kind != other.kind:
        return False
    with _open(one.path) as first, _open(other.path) as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        return all(
            torch.equal(a[row : row + ROWS], b[row : row + ROWS]) for row in range(0, one.shape[0], ROWS)
        )
