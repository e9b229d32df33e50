"""The block stream: calibration text through the model, one block of weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmpress.families import BlockLayout, Layout, Site
from lmpress.source import ModelSource
from lmpress.stream.activations import Activations

IN_FLIGHT = 2 << 30
"""Bytes that paused batches may hold where no limit was given."""


class Stop(Exception):  # noqa: N818
    """Raised where the rest of a forward is not needed."""


@dataclass
class Call:
    """How the model calls a block: no window is padded, so that depends on the size of the batch alone."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class BlockStream:
    """Hidden states of the calibration windows at the entrance of the next block.

    Args:
        source: the model.
        outer: a model whose modules outside the blocks are real (embeddings may be compressed).
        windows: token ids, (samples, seq_len); every one is text, none is padding.
        batch: windows that run together.
        budget: bytes of hidden states that may stay in memory.
        directory: where larger ones are spooled.
        in_flight: bytes that batches may hold which wait inside a block.
        precision: what products inside the blocks are computed in; hidden states are in float32.
        weights: how much each position of a window counts, (seq_len,) by full name of the site; all alike
            at the sites that it lacks.
    """

    def __init__(
        self,
        source: ModelSource,
        outer: Any,
        windows: Tensor,
        batch: int = 8,
        budget: int | None = None,
        directory: Path | None = None,
        device: torch.device | str = "cpu",
        in_flight: int = IN_FLIGHT,
        precision: torch.dtype = torch.float32,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layout = source.layout
        self.config = source.config
        self.windows = windows
        self.batch = batch
        self.device = torch.device(device)
        self.budget, self.directory, self.in_flight = budget, directory or Path(), in_flight
        self.precision = precision
        self.weights = weights or {}
        self.calls: dict[tuple[int, int], Call] = {}  # by block and windows
        self._enter(outer)

    def block(self, index: int) -> StreamBlock:
        """The stream in front of block `index`: blocks of one model may be called differently."""
        return StreamBlock(self, index)

    def energy(self) -> float:
        """Mean squared norm of a token's hidden state."""
        total, count = 0.0, 0
        for rows in self.batches():
            states = self.states[rows]
            total += float(states.double().square().sum())
            count += states.shape[:-1].numel()
        return total / max(1, count)

    def room(self, width: int) -> Activations:
        """Room for numbers of that width at every token, in memory or, past the budget, on disk."""
        samples, tokens = self.windows.shape
        return Activations((samples, tokens, width), self.budget, self.directory)

    def _enter(self, outer: Any) -> None:
        """Run what stands before the blocks, and learn how the model calls them."""
        self.states = self.room(outer.config.hidden_size)
        with replaced_blocks(outer, self.layout, self._caught):
            for rows in self.batches():
                self._rows = rows
                try:
                    with torch.no_grad():
                        outer.base_model(input_ids=self.windows[rows].to(self.device), use_cache=False)
                except Stop:
                    pass

    def _caught(self, index: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if index == 0:
            self.states[self._rows] = states
        self.calls.setdefault((index, self._rows.stop - self._rows.start), Call(args, kwargs))
        if index == self.layout.num_blocks - 1:
            raise Stop
        return states

    @contextmanager
    def forwards(self, gradients: bool = False) -> Iterator[None]:
        """What blocks run within: autograd or none, and the precision of the products."""
        lower = self.precision != torch.float32
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast(self.device.type, dtype=self.precision, enabled=lower),
        ):
            yield

    def batches(self) -> Iterator[slice]:
        """The windows that run together."""
        samples = self.windows.shape[0]
        for start in range(0, samples, self.batch):
            yield slice(start, min(start + self.batch, samples))


@dataclass(frozen=True)
class StreamBlock:
    """A stream in front of one block of its model.

    Attributes:
        stream: the text.
        index: of the block.
    """

    stream: BlockStream
    index: int

    @property
    def layout(self) -> BlockLayout:
        """Of the block."""
        return self.stream.layout.block(self.index)

    def weights_of(self, site: Site) -> Tensor | None:
        """How much each position counts at a site, (seq_len,); None where all count alike."""
        return self.stream.weights.get(f"{self.stream.layout.block_name(self.index)}.{site.name}")

    def call(self, block: nn.Module, rows: slice, states: Tensor) -> Tensor:
        """What `block` makes of the hidden `states` of some windows, called as the model would call it."""
        call = self.stream.calls[self.index, rows.stop - rows.start]
        output = block(states, *call.args, **call.kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def run(self, block: nn.Module, rows: slice) -> Tensor | None:
        """What some windows are behind `block`; None where a hook stopped them on the way."""
        try:
            with self.stream.forwards():
                return self.call(block, rows, self.stream.states[rows].to(self.stream.device))
        except Stop:
            return None

    def advance(self, block: nn.Module) -> None:
        """Run the text through the finished `block`: its outputs become the inputs of the next one."""
        for rows in self.stream.batches():
            output = self.run(block, rows)
            assert output is not None
            self.stream.states[rows] = output


Stand = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""What stands in for all blocks: (index, hidden states, further arguments) -> hidden states."""


@contextmanager
def replaced_blocks(outer: Any, layout: Layout, stand: Stand) -> Iterator[None]:
    """The model with `stand` in the place of its blocks, for as long as the context is open."""
    parent, _, name = layout.blocks.rpartition(".")
    original = outer.get_submodule(layout.blocks)
    substitutes = nn.ModuleList(_Substitute(block, i, stand) for i, block in enumerate(original))
    setattr(outer.get_submodule(parent), name, substitutes)
    try:
        yield
    finally:
        setattr(outer.get_submodule(parent), name, original)


class _Substitute(nn.Module):
    """Stands in for a block: tells how it is called, and gives what it is told to."""

    def __init__(self, block: nn.Module, index: int, stand: Stand) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not as a child: it has no weights here
        self._index = index
        self._stand = stand

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._stand(self._index, states, args, kwargs)
