"""One pass of the calibration text through a block that is rewritten on the way.

What a site sees depends on what the sites before it have become. Instead of running the block from its
entrance for every site, all batches of the text stop in front of a site, wait until its linears are
rewritten, and go on from there: each batch is a greenlet that is paused inside the block's own forward. Where
what the paused batches hold would not fit into memory, every site is reached from the entrance after all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from lmpress.families import Rows, Site
from lmpress.statistics import Channels, InputStatistics, StatisticsAccumulator, counts_of_rows
from lmpress.stream.stream import Stop, StreamBlock

SAMPLE_TOKENS = 512
"""Input rows kept of every site, to measure how far a rewritten linear strays."""

RESIDUALS = 4
"""Tensors of the width of the model that a paused batch holds, about, beside the input of the site."""


@dataclass(frozen=True)
class Gathered:
    """What one pass over the calibration text told about one site.

    Attributes:
        statistics: moments of the site's input.
        sample: input rows from all of the text that was looked at, (<= SAMPLE_TOKENS, n).
        cross: E[(x_fp - x) x^T] (n, n), x_fp being what the dense model has there; None where nobody asked.
        activation: mean magnitude of the outputs of a linear on the way, (rows,); None where nobody asked.
    """

    statistics: InputStatistics
    sample: Tensor
    cross: Tensor | None = None
    activation: Tensor | None = None


class Walk:
    """All batches of a stream on their way through `block`.

    Args:
        at: the text in front of the block.
        block: its linears may be replaced between two sites.
        memory: bytes that paused batches may hold; 0 to reach every site from the entrance, None for what
            the stream allows.
    """

    def __init__(self, at: StreamBlock, block: nn.Module, memory: int | None = None) -> None:
        self.at, self.stream, self._block = at, at.stream, block
        self._rows = list(self.stream.batches())
        self._runs: list[greenlet] | None = None
        if _held(at, block) <= (self.stream.in_flight if memory is None else memory):
            self._runs = [greenlet(self._through) for _ in self._rows]

    def gather(
        self,
        site: Site,
        hessian: bool,
        whole: bool = True,
        original: Walk | None = None,
        channels: Channels | None = None,
        signal: Rows | None = None,
    ) -> Gathered:
        """Go to `site`, and look at its input.

        Args:
            hessian: whether the Hessian is wanted.
            whole: look at all batches; else the first one will do.
            original: the dense model on its way through the same block, for the cross matrix
                C = E[(x_fp - x) x^T], x being the input of the site and x_fp that of the dense model.
            channels: what became of the channels of x_fp.
            signal: outputs on the way whose mean magnitude is wanted.
        """
        features = int(self._module(site.linears[0]).in_features)
        accumulator = StatisticsAccumulator(features, hessian, self.stream.device)
        sample: list[Tensor] = []
        share = max(1, SAMPLE_TOKENS // (len(self._rows) if whole else 1))
        weights = self.at.weights_of(site)
        cross = _Cross(channels or Channels(), weights)
        references = repeat(None) if original is None else original._reach(site)
        with self._listening(signal) as magnitudes:
            for x, dense in zip(self._reach(site), references, strict=False):
                accumulator.update(x, weights=weights)
                sample.append(_spread(x, share))
                if dense is not None:
                    cross.update(x, dense)
                if not whole:
                    break
        statistics = accumulator.result()
        return Gathered(
            statistics,
            torch.cat(sample)[:SAMPLE_TOKENS],
            None if cross.total is None else cross.total / max(1, statistics.count),
            None if magnitudes is None else magnitudes.result().abs_mean,
        )

    @contextmanager
    def _listening(self, signal: Rows | None) -> Iterator[StatisticsAccumulator | None]:
        """Gather the magnitudes of some outputs for as long as the context is open."""
        if signal is None:
            yield None
            return
        module = self._module(signal.linear)
        rows = signal.within(int(module.out_features))
        magnitudes = StatisticsAccumulator(rows.stop - rows.start, False, self.stream.device)
        handle = module.register_forward_hook(lambda _, args, output: magnitudes.update(output[..., rows]))
        try:
            yield magnitudes
        finally:
            handle.remove()

    def finish(self) -> None:
        """Go to the exit: the outputs of the block become the states of the stream."""
        for i, rows in enumerate(self._rows):
            if self._runs is None:
                output = self.at.run(self._block, rows)
            else:
                with self.stream.forwards():
                    output = self._runs[i].switch(rows)
            assert output is not None
            self.stream.states[rows] = output

    def close(self) -> None:
        """Let go of what waits."""
        if self._runs is None:
            return
        with self.stream.forwards():  # what a forward undoes on its way out is undone within this
            runs, self._runs = self._runs, []
            for run in filter(None, runs):  # started, and not at its end
                run.throw()

    def _reach(self, site: Site) -> Iterator[Tensor]:
        """The inputs of a site, batch by batch, as they arrive; what is not asked for stays behind."""
        linear = site.linears[0]
        for i, rows in enumerate(self._rows):
            yield self._replayed(linear, rows) if self._runs is None else self._paused(i, linear, rows)

    def _replayed(self, linear: str, rows: slice) -> Tensor:
        caught: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0].detach())
            raise Stop

        handle = self._module(linear).register_forward_pre_hook(hook)
        try:
            self.at.run(self._block, rows)
        finally:
            handle.remove()
        return caught[0]

    def _paused(self, i: int, linear: str, rows: slice) -> Tensor:
        assert self._runs is not None
        module, run = self._module(linear), self._runs[i]
        module.__dict__["forward"] = self._waiting(linear)
        try:
            with self.stream.forwards():
                arrived = run.switch(rows)
        finally:
            del module.__dict__["forward"]
        if run.dead:
            raise RuntimeError(f"the block ended before its {linear} was reached")
        assert isinstance(arrived, Tensor)
        return arrived

    def _through(self, rows: slice) -> Tensor:
        return self.at.call(self._block, rows, self.stream.states[rows].to(self.stream.device))

    def _waiting(self, linear: str) -> Callable[[Tensor], Tensor]:
        """A forward that shows its input, waits, and then does what the linear of that name does by then."""

        def forward(x: Tensor) -> Tensor:
            driver = getcurrent().parent
            assert driver is not None
            driver.switch(x.detach())
            y: Tensor = self._module(linear)(x)
            return y

        return forward

    def _module(self, linear: str) -> Any:
        return self._block.get_submodule(linear)


class _Cross:
    """The sum of w (x_fp - x) x^T over the tokens, w being how much each counts."""

    def __init__(self, channels: Channels, weights: Tensor | None) -> None:
        self.total: Tensor | None = None
        self._channels, self._weights = channels, weights

    def update(self, x: Tensor, dense: Tensor) -> None:
        """Add a batch of inputs x (..., n) and of the dense model's at the same tokens."""
        own, other = (t.reshape(-1, t.shape[-1]).float() for t in (x, dense))
        strayed = self._channels.apply(other) - own
        if self._weights is not None:
            strayed *= counts_of_rows(self._weights, own)[:, None]
        product = strayed.T @ own
        self.total = product if self.total is None else self.total + product


def _spread(x: Tensor, rows: int) -> Tensor:
    """So many rows of a batch (..., n), evenly apart; all if there are fewer. float32 (<= rows, n)."""
    flat = x.reshape(-1, x.shape[-1])
    picked = torch.linspace(0, len(flat) - 1, min(rows, len(flat)), device=x.device).round().long()
    return flat[picked].float()


def _held(at: StreamBlock, block: nn.Module) -> int:
    """About how many bytes all batches hold while they wait in front of the widest site."""
    stream, linears = at.stream, [cast(Any, block.get_submodule(linear)) for linear in at.layout.linears]
    widest = max(int(linear.in_features) for linear in linears)
    samples, tokens, width = stream.states.shape
    held = RESIDUALS * width + widest
    if getattr(stream.config, "_attn_implementation", "") == "eager":  # weights stay until the block ends
        held += int(stream.config.num_attention_heads) * tokens
    return 4 * samples * tokens * held
