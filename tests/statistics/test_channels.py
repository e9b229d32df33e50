"""What became of channels, against what is done to them one after the other."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from lmpress.statistics import Channels, pooled

GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(3, 4, 10, generator=GENERATOR)


def some(size: int, kept: bool, scaled: bool) -> Channels:
    chosen = torch.randperm(size, generator=GENERATOR)[: size - 3].sort().values if kept else None
    width = size - 3 if kept else size
    return Channels(chosen, torch.rand(width, generator=GENERATOR) + 0.5 if scaled else None)


def width(channels: Channels, size: int) -> int:
    return size if channels.kept is None else len(channels.kept)


EVERY = list(itertools.product([False, True], repeat=4))


def by_hand(x: Tensor, channels: Channels) -> Tensor:
    rows = list(range(x.shape[-1])) if channels.kept is None else channels.kept.tolist()
    columns = []
    for place, row in enumerate(rows):
        factor = 1.0 if channels.scale is None else float(channels.scale[place])
        columns.append(x[..., row] * factor)
    return torch.stack(columns, -1)


@pytest.mark.parametrize(("kept", "scaled", "kept_later", "scaled_later"), EVERY)
def test_one_after_the_other(kept: bool, scaled: bool, kept_later: bool, scaled_later: bool) -> None:
    first = some(10, kept, scaled)
    later = some(width(first, 10), kept_later, scaled_later)
    expected = by_hand(by_hand(X, first), later)
    torch.testing.assert_close(first.apply(X), by_hand(X, first))
    torch.testing.assert_close(first.then(later).apply(X), expected)


@pytest.mark.parametrize(("kept", "scaled"), list(itertools.product([False, True], repeat=2)))
def test_squared_gradients_are_those_by_the_new_channels(kept: bool, scaled: bool) -> None:
    """The loss is the same function of the activation; what was taken out is a constant."""
    channels, direction = some(10, kept, scaled), torch.randn(10, generator=GENERATOR)
    x = X[0, 0].clone().requires_grad_()
    (old,) = torch.autograd.grad((x * direction).sum().sin(), x)
    new = channels.apply(X[0, 0]).clone().requires_grad_()
    back = new if channels.scale is None else new / channels.scale
    whole = X[0, 0].clone()
    whole = back if channels.kept is None else whole.index_copy(0, channels.kept, back)
    (gradient,) = torch.autograd.grad((whole * direction).sum().sin(), new)
    torch.testing.assert_close(channels.gradients(old.square()), gradient.square())


def test_rows_that_feed_several_heads() -> None:
    """Row (g, d) feeds the channels (g * repeats + r, d)."""
    groups, repeats, size = 2, 3, 4
    values = torch.rand(groups * repeats * size, generator=GENERATOR)
    largest = pooled(values, groups, repeats)
    for g, d in itertools.product(range(groups), range(size)):
        channels = [(g * repeats + r) * size + d for r in range(repeats)]
        assert largest[g * size + d] == max(values[channel] for channel in channels)
    assert pooled(values, groups, 1) is values


def test_they_are_a_value() -> None:
    channels = some(10, kept=True, scaled=True)
    for name in ("kept", "scale"):
        with pytest.raises(FrozenInstanceError):
            setattr(channels, name, None)
