"""Rotary frequencies that old checkpoints hold beside the weights, though every model computes its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmpress.errors import RequestError

FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""How the stored ones are called."""

EXACT = 1e-4
"""The largest relative difference of what was computed in float32, in one way or another."""


def check_frequencies(where: object, name: str, held: Tensor, model: Any) -> None:
    """Hold stored frequencies against those of a model, and against these before they were scaled.

    Args:
        where: the model as the user named it, for messages.
        name: of the tensor.
        held: what it holds, (head_dim / 2,).
        model: without its weights.

    Raises:
        RequestError: they are others, so that the config tells of another model.
    """
    tolerance = max(EXACT, 2 * torch.finfo(held.dtype).eps) if held.is_floating_point() else 0
    for own in _frequencies(model):
        if held.shape == own.shape and torch.allclose(
            held.double(), own.to(held.dtype).double(), rtol=tolerance, atol=1e-9
        ):
            return
    raise RequestError(
        f"{where}: {name} holds other rotary frequencies than those of config.json, and only one of them can"
        " count: mend rope_theta there, or remove the tensor"
    )


def _frequencies(model: Any) -> Iterator[Tensor]:
    """All that a model turns by, and the same unscaled: theta^(-i / n) of n frequencies."""
    for module in model.modules():
        own = [t for key, t in module.named_buffers(recurse=False) if key.endswith("inv_freq")]
        yield from own
        for theta in _bases(getattr(getattr(module, "config", None), "rope_parameters", None)):
            yield from (theta ** -(torch.arange(len(t), dtype=torch.float64) / len(t)) for t in own)


def _bases(parameters: Any) -> Iterator[float]:
    """The thetas of all types of layers."""
    for key, value in parameters.items() if isinstance(parameters, dict) else ():
        if key == "rope_theta" and value:
            yield float(value)
        yield from _bases(value)
