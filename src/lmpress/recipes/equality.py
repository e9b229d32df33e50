"""A dense model turned into one that computes the same, tensor by tensor as it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Equality(ABC):
    """Other weights for the same function."""

    @property
    @abstractmethod
    def told(self) -> str:
        """All that decides it, in a few words."""

    @abstractmethod
    def config(self, config: Any) -> Any:
        """The config of the equal model; `config` itself where nothing changes, else a copy."""

    @abstractmethod
    def reads(self, name: str) -> tuple[str, ...]:
        """The tensors of the model that a tensor of the equal one is made of."""

    @abstractmethod
    def tensor(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the equal model, from what `reads` names."""
