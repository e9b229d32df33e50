"""Steps that turn the residual stream."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmpress.families import Layout, Norm
from lmpress.methods.rotation import random_rotation
from lmpress.recipes.equality import Equality
from lmpress.recipes.steps.base import Step


class Rotate(Step):
    """A random Hadamard rotation of the residual stream, folded into the weights (QuaRot, arXiv 2404.00456).

    The dense model computes the same as before. Its weights have no outlying channels any more, which is what
    grids with one scale for many weights suffer from. Gains of norms go into the linears behind them; a head
    that was tied to the embedding becomes a weight of its own, for the gain of the last norm goes into it.
    """

    kind: ClassVar[str] = "rotate"
    scope: ClassVar[Literal["modules", "sites", "model"]] = "model"
    once: ClassVar[str | None] = "the residual stream is turned once in a recipe"
    targets: Literal["linears"] = "linears"

    def overlaps(self, other: Step) -> bool:
        return True

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        return "rotate turns the dense model: it comes first" if earlier else None

    def equality(self, config: Any, layout: Layout, seed: int) -> Equality | None:
        return Rotation(layout, int(config.hidden_size), seed)


@dataclass(frozen=True)
class Turn:
    """What is done to one tensor.

    Attributes:
        source: the tensor that it is made of.
        gain: the norm whose gain its columns take.
        columns, rows: whether it reads, or writes, the residual stream.
    """

    source: str
    gain: tuple[str, Norm] | None = None
    columns: bool = False
    rows: bool = False


class Rotation(Equality):
    """The model with its residual stream x as x Q.

    Raises:
        ValueError: norms that subtract a mean, or stand between a linear and the residual stream, or a block
            that reads it without a norm: they do not turn along.
    """

    def __init__(self, layout: Layout, width: int, seed: int) -> None:
        self.layout, self.width, self.seed = layout, width, seed
        self._norms: dict[str, Norm] = {}
        self._turns = self._planned()

    @cached_property
    def matrix(self) -> Tensor:
        """Q (width, width), float32."""
        return random_rotation(self.width, self.seed).float()

    @property
    def told(self) -> str:
        return f"rotate {self.width} {self.seed}"

    def config(self, config: Any) -> Any:
        if not self.layout.tied:
            return config
        untied = copy.deepcopy(config)
        untied.tie_word_embeddings = False
        return untied

    def _planned(self) -> dict[str, Turn]:
        layout, last = self.layout, self.layout.last_norm
        if last is None:
            raise ValueError("what stands between its last block and its head is more than a norm")
        table, head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        turns = {table: Turn(table, columns=True)}
        turns[head] = Turn(table if layout.tied else head, self._gain("", last), columns=True)
        for i in range(layout.num_blocks):
            turns |= self._of_block(i)
        return turns

    def _of_block(self, index: int) -> dict[str, Turn]:
        block, start = self.layout.block(index), self.layout.block_name(index) + "."
        if block.norms_behind:
            raise ValueError(f"{block.norms_behind[0].name} stands between a linear and the residual stream")
        turns: dict[str, Turn] = {}
        inside = {linear for site in block.sites if site.feed and site.feed.rows for linear in site.linears}
        for site in block.sites:
            if site.feed is not None and site.feed.norm is not None:
                gain = self._gain(start, site.feed.norm)
                for linear in site.linears:
                    name = f"{start}{linear}.weight"
                    turns[name] = Turn(name, gain, columns=True)
            elif not inside.issuperset(site.linears):
                raise ValueError(f"{start}{site.linears[0]} reads the residual stream without a norm")
        for linear in block.writers:
            name, bias = f"{start}{linear}.weight", f"{start}{linear}.bias"
            turns[name] = Turn(name, rows=True)
            turns[bias] = Turn(bias, rows=True)
        return turns

    def _gain(self, start: str, norm: Norm) -> tuple[str, Norm]:
        if norm.centred:
            raise ValueError(f"{start}{norm.name} subtracts the mean")
        name = f"{start}{norm.name}.weight"
        self._norms[name] = norm
        return name, norm

    def reads(self, name: str) -> tuple[str, ...]:
        turn = self._turns.get(name)
        if turn is None:
            return (name,)
        return (turn.source,) if turn.gain is None else (turn.source, turn.gain[0])

    def tensor(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if name in self._norms:
            return torch.full_like(tensors[name], 1.0 - self._norms[name].offset)
        turn = self._turns.get(name)
        if turn is None:
            return tensors[name]
        weight = tensors[turn.source].float()
        if turn.gain is not None:
            gain, norm = turn.gain
            weight = weight * (norm.offset + tensors[gain].float())
        if turn.columns:
            weight = weight @ self.matrix
        return self.matrix.T @ weight if turn.rows else weight
