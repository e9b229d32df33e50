"""A source whose model is read as an equal one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmpress.errors import RequestError
from lmpress.recipes import Equality, Recipe
from lmpress.source.accounting import Stored
from lmpress.source.model import ModelSource


class EqualSource(ModelSource):
    """The model of another source with other weights for the same function; see `Equality`."""

    def __init__(self, inner: ModelSource, equality: Equality) -> None:
        self._inner, self._equality = inner, equality
        super().__init__(inner.name, equality.config(inner.config))

    @property
    def given(self) -> ModelSource:
        return self._inner.given

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        result = {}
        for name in names:  # one at a time: what one is made of is let go before the next
            read = self._inner.read(self._equality.reads(name))
            result[name] = self._equality.tensor(name, read)
        return result

    @property
    def tensors(self) -> dict[str, Stored]:
        return self._inner.tensors

    @property
    def bytes_16bit(self) -> int:
        return self._inner.bytes_16bit  # a head that is tied no more is no part of the model that was given

    def _beside(self) -> Iterable[bytes]:
        return (*self._inner._beside(), self._equality.told.encode())

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return self._inner.files

    @property
    def location(self) -> tuple[Path, str | None]:
        return self._inner.location

    def tokenizer(self) -> Any:
        return self._inner.tokenizer()

    def copy_tokenizer(self, directory: Path) -> None:
        self._inner.copy_tokenizer(directory)

    def check_tokenizer(self) -> None:
        self._inner.check_tokenizer()


def as_recipe_reads(source: ModelSource, recipe: Recipe) -> ModelSource:
    """The model as the steps of a recipe that turn it into an equal one let it be read.

    Raises:
        RequestError: the model has no such equal.
    """
    for index, step in enumerate(recipe.steps):
        try:
            equality = step.equality(source.config, source.layout, recipe.seed)
        except ValueError as error:
            place = f"recipe {recipe.name}: step {index + 1} ({step.kind})"
            raise RequestError(f"{place} cannot be applied to {source.name}: {error}") from None
        if equality is not None:
            source = EqualSource(source, equality)
    return source
