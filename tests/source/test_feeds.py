"""What feeds a site changes with its channels: the block computes the same, or the same without neurons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmpress.families import BlockLayout, Feed, Site
from lmpress.forms import Dense
from lmpress.source import ModelSource, dense_block, dense_outer, open_source, set_form
from lmpress.source.feeds import Fed, feed_with
from lmpress.statistics import Channels
from lmpress.stream import BlockStream
from tests.tiny import TINY

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]


def output(source: ModelSource, block: nn.Module) -> Tensor:
    windows = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(source, dense_outer(source, CPU), windows)
    stream.block(0).advance(block)
    return stream.states[slice(None)].clone()


def scale_of(feed: Feed, width: int) -> Tensor:
    """Any scale that the feed can give: one for all channels that a row feeds."""
    groups, repeats = feed.heads
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(groups, 1, width // (groups * repeats), generator=generator) + 0.5
    return scale.expand(groups, repeats, -1).flatten()


def changed(block: nn.Module, site: Site, fed: Fed, readers: dict[str, Tensor]) -> None:
    for linear, (weight, bias) in fed.linears.items():
        set_form(block, linear, Dense(weight), bias)
    for linear in site.linears:
        set_form(block, linear, Dense(fed.settled(readers[linear])))


def weights(block: nn.Module, site: Site) -> dict[str, Tensor]:
    modules: dict[str, Any] = {linear: block.get_submodule(linear) for linear in site.linears}
    return {linear: module.weight.data for linear, module in modules.items()}


@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("family", list(TINY))
def test_scaled_channels_leave_the_block_as_it_is(
    family: str, name: str, rest: torch.dtype, tiny: Tiny
) -> None:
    """Gains are rounded to what they are stored in, and the readers make up for that."""
    source = open_source(tiny(family))
    layout = source.layout.block(0)
    (site,) = (site for site in layout.sites if site.name == name)
    if site.feed is None:
        return
    block = dense_block(source, 0, CPU)
    for key, parameter in block.named_parameters():
        if "norm" in key:  # what is stored
            parameter.data = parameter.data.to(rest).float()
    expected, before = output(source, block), weights(block, site)
    scale = scale_of(site.feed, next(iter(before.values())).shape[1])
    fed = feed_with(block, layout, site, Channels(scale=scale), rest)
    readers = {linear: weight / scale for linear, weight in before.items()}
    changed(block, site, fed, readers)
    assert fed.channels.scale is not None
    rounded = site.feed.norm is not None and rest != torch.float32
    assert torch.allclose(fed.channels.scale, scale, rtol=1e-5) == (not rounded)
    biased = rounded and site.feed.norm is not None and site.feed.norm.centred  # its bias is rounded for good
    tolerance = 2e-2 if biased else 1e-4
    torch.testing.assert_close(output(source, block), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", ["llama-bias", "phi3", "opt"])
def test_neurons_that_go_are_gone_from_all_that_makes_them(family: str, scaled: bool, tiny: Tiny) -> None:
    source = open_source(tiny(family))
    layout = source.layout.block(0)
    site = layout.site_of(layout.neurons.output)
    block = dense_block(source, 0, CPU)
    (reader,) = weights(block, site).values()
    kept = torch.randperm(reader.shape[1], generator=torch.Generator().manual_seed(1))[:40].sort().values
    silent = dense_block(source, 0, CPU)
    gone = torch.ones(reader.shape[1], dtype=torch.bool)
    gone[kept] = False
    weights(silent, site)[site.linears[0]][:, gone] = 0
    expected = output(source, silent)

    scale = torch.rand(40, generator=torch.Generator().manual_seed(2)) + 0.5 if scaled else None
    fed = feed_with(block, layout, site, Channels(kept, scale), torch.float32)
    left = reader[:, kept] if scale is None else reader[:, kept] / scale
    assert set(fed.linears) == set(layout.neurons.linears)
    for linear, (weight, _) in fed.linears.items():
        assert weight.shape[0] == 40 * layout.neurons.parts(linear)
        assert torch.equal(fed.outputs[linear].apply(dense_weight(source, linear).T).T, weight)
    changed(block, site, fed, {site.linears[0]: left})
    torch.testing.assert_close(output(source, block), expected, rtol=1e-4, atol=1e-4)


def dense_weight(source: ModelSource, linear: str) -> Tensor:
    module: Any = dense_block(source, 0, CPU).get_submodule(linear)
    weight: Tensor = module.weight.data
    return weight


def refused(family: str, tiny: Tiny, name: str, channels: Callable[[int], Channels], words: str) -> None:
    source = open_source(tiny(family))
    layout: BlockLayout = source.layout.block(0)
    (site,) = (site for site in layout.sites if site.name == name)
    block = dense_block(source, 0, CPU)
    width = next(iter(weights(block, site).values())).shape[1]
    with pytest.raises(ValueError, match=words):
        feed_with(block, layout, site, channels(width), torch.float32)


def test_what_cannot_be_is_refused(tiny: Tiny) -> None:
    def scaled(width: int) -> Channels:
        return Channels(scale=torch.linspace(1, 2, width))

    refused("llama", tiny, "o", scaled, "one row feeds are scaled alike")
    refused("opt-post-norm", tiny, "qkv", scaled, "nothing feeds")
    refused("llama", tiny, "qkv", lambda width: Channels(kept=torch.arange(width - 1)), "only neurons")


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_channels_may_be_told_on_another_device(family: str, name: str, tiny: Tiny) -> None:
    source = open_source(tiny(family))
    layout = source.layout.block(0)
    (site,) = (site for site in layout.sites if site.name == name)
    assert site.feed is not None
    block = dense_block(source, 0, CPU).to("meta")
    before = weights(block, site)
    scale = scale_of(site.feed, next(iter(before.values())).shape[1])
    fed = feed_with(block, layout, site, Channels(scale=scale), torch.bfloat16)
    held = [fed.settled(weight) for weight in before.values()]
    held += [tensor for pair in fed.linears.values() for tensor in pair if tensor is not None]
    assert all(tensor.is_meta for tensor in held)
