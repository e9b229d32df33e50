"""Steps that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lmpress.recipes.outline import Outline, factors
from lmpress.recipes.steps.base import Positive, Step


class Recover(Step):
    """LoRA on the compressed model (arXiv 2106.09685), then merged into the weights or kept as a term.

    Attributes:
        targets: the linears of the blocks that get an adapter; all others stay as they are.
        steps: optimizer steps.
        learning_rate: of AdamW.
        batch_size, seq_len: of a step, in windows and tokens.
        rank, alpha: of the adapters; their scale is alpha / rank.
        keep: `merge` adds them into the weights (requantized where these are quantized); `term` stores them.
        held_out: share of the text that is only watched; the best state by it is kept.
    """

    kind: ClassVar[str] = "recover"
    trains: ClassVar[bool] = True
    steps: Positive = 200
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-5
    batch_size: Positive = 1
    seq_len: Annotated[int, Field(ge=8)] = 128
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 32.0
    keep: Literal["merge", "term"] = "merge"
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.1

    @property
    def blocks_only(self) -> bool:
        return True

    def after(self, outline: Outline) -> Outline:
        if self.keep == "merge":
            return outline
        more = factors(outline.shape, self.rank)
        return replace(
            outline, leaves=(*outline.leaves, *more), exact=False
        )  # none where training was in vain

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        other = next((s.kind for s in earlier if not s.takes_updates), None)
        if self.keep == "term" or other is None:
            return None
        return f"an update cannot be merged into what {other} makes; let recover have keep: term"
