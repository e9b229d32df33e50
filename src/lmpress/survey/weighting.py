"""How much each position of a calibration window counts in the moments of the inputs.

To second order, an error e of a weight costs the model `sum_t sum_r g_tr^2 (e_r x_t)^2 / 2` over tokens t and
outputs r, g being the gradient of the loss by the outputs (GuidedQuant, arXiv 2505.07004). Solvers take the
squared gradients for the same at all tokens, and minimize `sum_t (e_r x_t)^2`. They are not: heads that have
nothing to attend to attend to the first token of a text (attention sinks, arXiv 2309.17453), so that up to
0.96 of the squared gradient of a v_proj stands at one position in 512, whatever the text. So the moments are
weighted by `w_t = E[sum_r g_tr^2]`, taken by position, of mean 1. A few windows tell it; positions are pooled
in runs that double in length, and the linears of a site, which share their moments, have the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.families import BlockLayout
from lmpress.progress import track
from lmpress.stream import BlockStream
from lmpress.survey.sensitivity import entrance_gradient, entrances, squared_gradients

WINDOWS, TOKENS = 8, 4096
"""Positions are weighed by so many windows at least, and so many tokens."""


def weighting_samples(samples: int, seq_len: int) -> int:
    """How many of the calibration windows are looked at."""
    return min(samples, max(WINDOWS, -(-TOKENS // seq_len)))


def position_weights(
    stream: BlockStream, outer: Any, load: Callable[[int], nn.Module], directory: Path, seed: int
) -> dict[str, Tensor]:
    """Weights of mean 1 by full name of the site ("model.layers.3.qkv"), float32 (seq_len,).

    Args:
        stream: in front of the first block of the dense model; behind the last one afterwards.
        outer: the model, everything outside its blocks real.
        load: gives the real dense block of an index.
        directory: where hidden states are spooled.
    """
    layout = stream.layout
    weights: dict[str, Tensor] = {}
    with entrances(stream, load, directory, "Weighing positions, forwards") as entered:
        gradients = entrance_gradient(outer, stream, seed)
        for i in track(range(layout.num_blocks - 1, -1, -1), "Weighing positions, backwards"):
            squares: dict[str, Tensor] = {}
            squared_gradients(stream.block(i), load(i), entered[i], gradients, positions=squares)
            weights |= site_weights(layout.block(i), layout.block_name(i), squares)
    return weights


def site_weights(layout: BlockLayout, block: str, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights at the sites of a block, by the squared gradients of its linears by position."""
    return {
        f"{block}.{site.name}": torch.stack([pooled(squares[linear]) for linear in site.linears]).mean(0)
        for site in layout.sites
    }


def pooled(squares: Tensor) -> Tensor:
    """Squared gradients by position (seq_len,) as weights of mean 1, float32.

    Runs of 1, 1, 2, 4, 8, ... positions have one weight each. Without any gradient all count alike.
    """
    result = torch.empty_like(squares)
    start, length = 0, 1
    while start < len(squares):
        result[start : start + length] = squares[start : start + length].mean()
        start, length = start + length, max(1, start + length)
    mean = result.mean()
    if not bool(mean > 0):
        return torch.ones(len(squares))
    return (result / mean).float().cpu()
