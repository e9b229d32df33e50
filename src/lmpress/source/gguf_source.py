"""A GGUF file; its tensors are dequantized one by one as they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from lmpress.checkpoint import read_json, write_bytes
from lmpress.source.accounting import Stored, account_for_rest, settle
from lmpress.source.gguf_config import gguf_config
from lmpress.source.gguf_file import GgufFile, numbers
from lmpress.source.model import ModelSource
from lmpress.source.tokenizer_files import read_tokenizer

BESIDE = re.compile(r"(v|mm|a)\.")
"""How the tensors begin that see and hear for a model; its text needs none of them."""

BLOCK = re.compile(r"blk\.(\d+)\.")


class GgufSource(ModelSource):
    """A GGUF file; its tensors are dequantized one by one as they are read.

    Raises:
        RequestError: the file is damaged or incomplete, or holds a model that is none of the supported ones
            or more than one of them.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self._file = GgufFile(path)
        super().__init__(name or str(path), gguf_config(self._file))
        names, stored = self._names_in_file(), self._file.stored()
        self._tensors = settle(path, self.shapes, stored, lambda name: names.get(name, ()))
        used = {tensor.name for tensor in self._tensors.values()}
        rest = [name for name in stored if name not in used and not self._file.asked(name)]
        account_for_rest(path, rest, self._belongs)

    def _names_in_file(self) -> dict[str, tuple[str, ...]]:
        mapping = get_gguf_hf_weights_map(self.skeleton, self._processor, model_type=self._file.architecture)
        return {name: (held,) for held, name in mapping.items()}

    @cached_property
    def _processor(self) -> Any:
        """What turns tensors as llama.cpp has them into those of transformers: Gemma's norms have one added,
        Llama's queries and keys are permuted."""
        kind = TENSOR_PROCESSORS.get(self._file.architecture, TensorProcessor)
        return kind(config=self.config.to_dict())

    def _belongs(self, name: str) -> bool:
        """All but what is beside the text, and blocks beyond those that the file counts."""
        block = BLOCK.match(name)
        if block:
            return int(block[1]) < self.layout.num_blocks
        return not BESIDE.match(name)

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        result = {}
        for name in names:
            tensor = self._file.tensors[self._tensors[name].name]
            weights = numbers(tensor)
            parsed = self._processor.process(weights=weights, name=tensor.name, parsed_parameters={})
            result[name] = torch.from_numpy(parsed.weights.copy())
        return result

    @property
    def tensors(self) -> dict[str, Stored]:
        return self._tensors

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def location(self) -> tuple[Path, str | None]:
        return self.path.parent, self.path.name

    def tokenizer(self) -> Any:
        return read_tokenizer(self.path.parent, self.path.name, self.name, self.config)

    def check_tokenizer(self) -> None:
        self.tokenizer()

    def copy_tokenizer(self, directory: Path) -> None:
        self.tokenizer().save_pretrained(directory)
        path = directory / "tokenizer.json"
        if path.is_file():  # the same content without its white space: 3.5 MB become 2
            compact = json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":"))
            write_bytes(path, compact.encode())

    def _beside(self) -> Iterable[bytes]:
        return (self._file.header(),)
