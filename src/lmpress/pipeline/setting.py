"""What all passes of a run share: the model, the plan, the options, and how blocks and text are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.plan import Plan
from lmpress.source import ModelSource, dense_block, dense_outer
from lmpress.stream import IN_FLIGHT, BlockStream
from lmpress.stream.text import CalibrationText, products_in

BATCH = 4096
"""Tokens that run together, about."""


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, but for what decides its result.

    Attributes:
        calibration: a corpus name, a file, several joined by commas, or `self`.
        device: where the mathematics happens.
        memory: bytes that the run may use for hidden states, None for no limit.
        resume: go on where an interrupted run stopped.
        force: overwrite an earlier checkpoint.
        lenders: checkpoints of the same model that may lend the text that `self` would write again.
        surveys: where surveys that several recipes can share are kept; None to keep none.
    """

    calibration: str = "self"
    device: str = "cpu"
    memory: int | None = None
    resume: bool = False
    force: bool = False
    lenders: tuple[Path, ...] = ()
    surveys: Path | None = None


@dataclass(frozen=True)
class Setting:
    """One model, one recipe, and how the run goes.

    Attributes:
        work: the directory of what is not finished.
    """

    source: ModelSource
    plan: Plan
    options: RunOptions
    work: Path

    @cached_property
    def device(self) -> torch.device:
        """Where the mathematics happens."""
        return torch.device(self.options.device)

    @cached_property
    def precision(self) -> torch.dtype:
        """What products inside the blocks are computed in."""
        return products_in(self.plan.recipe.calibration.precision, self.device)

    def dense_block(self, index: int) -> nn.Module:
        """Block `index` of the dense model, in float32."""
        return dense_block(self.source, index, self.device)

    def dense_outer(self) -> Any:
        """The dense model with what stands outside its blocks."""
        return dense_outer(self.source, self.device)

    def _in_flight(self) -> int:
        """Bytes that the batches of one stream may hold while they wait inside a block."""
        memory = IN_FLIGHT if self.options.memory is None else self.options.memory // 4
        if self.device.type != "cpu":
            memory = min(memory, IN_FLIGHT)  # the limit is the host's, and batches wait on the device
        return memory // (2 if self.plan.needs_original else 1)

    def stream(
        self, text: CalibrationText, outer: Any, weights: Mapping[str, Tensor] | None = None
    ) -> BlockStream:
        """The text in front of the first block.

        Args:
            outer: a model whose modules outside the blocks are real.
            weights: how much each position counts, by full name of the site.
        """
        return BlockStream(
            self.source,
            outer,
            text.windows,
            batch=max(1, BATCH // text.windows.shape[1]),
            budget=None if self.options.memory is None else self.options.memory // 4,
            directory=self.work,
            device=self.device,
            in_flight=self._in_flight(),
            precision=self.precision,
            weights=weights,
        )
