"""What became of the channels of an activation: some are gone, the others may be scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """x' = x[kept] * scale, for an activation x (n,) of the dense model and x' (n',) of the rewritten one.

    Attributes:
        kept: indices into x, (n',); None for all.
        scale: positive, (n',); None for ones.
    """

    kept: Tensor | None = None
    scale: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:  # (..., n) -> (..., n')
        """x' of x."""
        if self.kept is not None:
            x = x[..., self.kept.to(x.device)]
        return x if self.scale is None else x * self.scale.to(x)

    def gradients(self, squares: Tensor) -> Tensor:  # (n,) -> (n',)
        """Squared gradients by x' of those by x: what is scaled up moves the loss less."""
        if self.kept is not None:
            squares = squares[self.kept.to(squares.device)]
        return squares if self.scale is None else squares / self.scale.to(squares).square()

    def then(self, later: Channels) -> Channels:
        """These, and then what became of their result."""
        scale = self.scale
        if scale is not None and later.kept is not None:
            scale = scale[later.kept.to(scale.device)]
        if later.scale is not None:
            scale = later.scale if scale is None else scale * later.scale.to(scale)
        kept = self.kept
        if later.kept is not None:
            kept = later.kept if kept is None else kept[later.kept.to(kept.device)]
        return Channels(kept, scale)


def pooled(values: Tensor, groups: int, repeats: int) -> Tensor:
    """The largest of the values of channels that a row feeds: (groups * repeats * d,) -> (groups * d,)."""
    if repeats == 1:
        return values
    return torch.amax(values.view(groups, repeats, -1), dim=1).reshape(-1)
