"""What became of the channels of a site, done to what feeds it: a norm, rows of linears, whole neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.families import BlockLayout, Feed, Norm, Rows, Site
from lmpress.source.blocks import bias_of, current_form
from lmpress.statistics import Channels


@dataclass(frozen=True)
class Fed:
    """The other side of a site's channels.

    Attributes:
        channels: what really became of them: a gain is rounded to what it is stored in.
        linears: new weights and biases by linear.
        outputs: what became of the outputs of each of these.
        wanted: what had been asked for.
    """

    channels: Channels
    wanted: Channels
    linears: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    outputs: Mapping[str, Channels] = field(default_factory=dict)

    def settled(self, weight: Tensor) -> Tensor:
        """A reader (out, n') that was made for what had been asked for, for what became of it."""
        if self.wanted.scale is None or self.channels.scale is None:
            return weight
        return weight * (self.wanted.scale.to(self.channels.scale) / self.channels.scale).to(weight)


def feed_with(
    block: nn.Module, layout: BlockLayout, site: Site, channels: Channels, rest: torch.dtype
) -> Fed:
    """Let what feeds `site` give the channels that are wanted. A norm is changed in place.

    Args:
        rest: what the gains of norms are stored in.

    Raises:
        ValueError: nothing feeds the site that could be scaled, or channels go that are no neurons.
    """
    outputs: dict[str, Channels] = {}
    if channels.kept is not None:
        if layout.neurons.output not in site.linears:
            raise ValueError(f"only neurons can be taken out, and {site.name} reads none")
        for linear in layout.neurons.linears:
            outputs[linear] = Channels(_rows(block, layout, linear, channels.kept))
    real = channels
    if channels.scale is not None:
        real, scaled = _scaled(block, site.feed or Feed(), channels, rest, outputs)
        for linear, one in scaled.items():
            outputs[linear] = outputs.get(linear, Channels()).then(one)
    linears = {linear: _applied(block.get_submodule(linear), one) for linear, one in outputs.items()}
    return Fed(real, channels, linears, outputs)


def _rows(block: nn.Module, layout: BlockLayout, linear: str, kept: Tensor) -> Tensor:
    """The rows of `linear` that belong to the neurons `kept`, in the order of its parts."""
    module: Any = block.get_submodule(linear)
    starts = [
        rows.within(module.out_features).start for rows in layout.neurons.inputs if rows.linear == linear
    ]
    return torch.cat([kept + start for start in sorted(starts)])


def _scaled(
    block: nn.Module, feed: Feed, channels: Channels, rest: torch.dtype, outputs: Mapping[str, Channels]
) -> tuple[Channels, dict[str, Channels]]:
    """What really became of the channels, and of the outputs of the linear that feeds them."""
    assert channels.scale is not None
    if feed.norm is not None:
        return Channels(channels.kept, _scale_norm(block, feed.norm, channels.scale, rest)), {}
    if feed.rows is None:
        raise ValueError("nothing feeds this site that could be scaled instead")
    groups, repeats = feed.heads
    scale = channels.scale.view(groups, repeats, -1)
    if not bool((scale == scale[:, :1]).all()):
        raise ValueError("channels that one row feeds are scaled alike")
    module: Any = block.get_submodule(feed.rows.linear)
    kept = outputs.get(feed.rows.linear, Channels()).kept
    count = module.out_features if kept is None else len(kept)
    return channels, {feed.rows.linear: _placed(feed.rows, count, scale[:, 0].reshape(-1))}


def _placed(rows: Rows, count: int, scale: Tensor) -> Channels:
    """The scale of some rows among the `count` of their linear."""
    whole = torch.ones(count, device=scale.device)
    whole[rows.within(count)] = scale
    return Channels(scale=whole)


def _scale_norm(block: nn.Module, norm: Norm, scale: Tensor, rest: torch.dtype) -> Tensor:
    """Scale the gain (and bias) of a norm; the scale that it then has, once rounded."""
    module: Any = block.get_submodule(norm.name)
    gain = norm.offset + module.weight.data.float()
    stored = (gain * scale.to(gain) - norm.offset).to(rest).float()
    real = torch.where(gain == 0, scale.to(gain), (norm.offset + stored) / gain)
    real = torch.where(real > 0, real, scale.to(gain))
    module.weight.data = stored.to(module.weight.dtype)
    if getattr(module, "bias", None) is not None:
        module.bias.data = (module.bias.data.float() * real).to(rest).to(module.bias.dtype)
    return real


def _applied(module: nn.Module, channels: Channels) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a linear whose outputs are what `channels` tells."""
    weight, bias = current_form(module).dense(), bias_of(module)
    return channels.apply(weight.T).T.contiguous(), None if bias is None else channels.apply(bias)
