"""A model to compress, read tensor by tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmpress.errors import RequestError
from lmpress.families import Layout, layout_of, skeleton
from lmpress.source.accounting import Stored
from lmpress.source.fingerprint import fingerprint


class ModelSource(ABC):
    """A dense model on disk.

    Attributes:
        name: what the user called it.
        config: its transformers config, without a quantization of its own.
        layout: its family's answers.
    """

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.config = config
        self.layout: Layout = layout_of(config)

    @property
    def given(self) -> ModelSource:
        """The model as the user gave it, where this is another one that computes the same."""
        return self

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device. RequestError where the config asks for one that cannot be built."""
        try:
            return skeleton(self.config)
        except Exception as error:  # transformers raises whatever the config made it raise
            told = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            raise RequestError(f"{self.name}: no model can be built from its config ({told})") from None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors of the model, by their names in transformers; of tied ones the first."""
        seen: set[int] = set()
        kept = []
        for name, tensor in self.skeleton.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                kept.append(name)
        return tuple(kept)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the config asks for, of all `names`."""
        state = self.skeleton.state_dict(keep_vars=True)
        return {name: tuple(state[name].shape) for name in self.names}

    @property
    def bytes_16bit(self) -> int:
        """What the model takes in 16 bits: what ratios are relative to."""
        return 2 * sum(math.prod(shape) for shape in self.shapes.values())

    def block_names(self, index: int) -> tuple[str, ...]:
        """The tensors of block `index`."""
        start = self.layout.block_name(index) + "."
        return tuple(name for name in self.names if name.startswith(start))

    @cached_property
    def outer_names(self) -> tuple[str, ...]:
        """The tensors outside the blocks: embeddings, last norm, head."""
        return tuple(name for name in self.names if not name.startswith(self.layout.blocks + "."))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as stored, on the CPU, each in memory of its own.

        Raises:
            RequestError: a tensor that is not finite; it is named.
        """
        tensors = self._read(tuple(names))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "an infinity"
                raise RequestError(
                    f"{self.name}: the weight {name} holds {kind}; compress a healthy checkpoint"
                )
        return tensors

    @abstractmethod
    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]: ...

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Stored]:
        """Where each of `names` lies."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point type that most of the weights are stored in."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The weight files."""

    @property
    @abstractmethod
    def location(self) -> tuple[Path, str | None]:
        """The directory that transformers loads from, and the GGUF file's name in it where it is one."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer. RequestError where the model has none, or one with more tokens than it has rows."""

    @abstractmethod
    def copy_tokenizer(self, directory: Path) -> None:
        """Put the tokenizer's files into `directory`."""

    @abstractmethod
    def check_tokenizer(self) -> None:
        """RequestError where `copy_tokenizer` would refuse, asked for before all the work."""

    @abstractmethod
    def _beside(self) -> Iterable[bytes]:
        """What else, beside config and weights, decides what the model computes from a text."""

    @cached_property
    def fingerprint(self) -> str:
        """Of config, weights and tokenizer; the same wherever the model lies."""
        return fingerprint(self.config, self.tensors, self._beside())
