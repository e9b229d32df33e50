"""Which runner a form gets: one table, and plain `form.forward` for whatever is not in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.forms import CompressedLinear, Form
from lmpress.kernels import floating, integer

Leaf = Callable[[Any, Tensor], Tensor]
"""How a leaf runs on a matrix of activations: (leaf, x of shape (m, in)) -> (m, out)."""

TABLE: dict[tuple[str, str, torch.dtype], Leaf] = {
    # (device, storage of the weight, dtype of the activations): runner
    ("cpu", "dense", torch.float32): floating.run_dense,
    ("cpu", "dense", torch.bfloat16): floating.run_dense,
    ("cpu", "dense", torch.float16): floating.run_dense,
    # one scale a row, or one in all
    ("cpu", "row scales", torch.float32): integer.run,
    ("cpu", "row scales", torch.bfloat16): integer.run_bfloat16,
    ("cpu", "row scales", torch.float16): integer.run_wide,
    # a scale a group of columns
    ("cpu", "group scales", torch.float32): floating.run_quantized,
    ("cpu", "group scales", torch.bfloat16): floating.run_bfloat16_groups,
    ("cpu", "group scales", torch.float16): floating.run_wide,
    # whole codes between a scale a row and a scale a column
    ("cpu", "scaled codes", torch.float32): integer.run_scaled,
    ("cpu", "scaled codes", torch.bfloat16): integer.run_bfloat16_scaled,
    ("cpu", "scaled codes", torch.float16): integer.run_wide_scaled,
}


def run(form: Form, x: Tensor) -> Tensor:
    """`x @ form.dense().T` on the device of x, in the dtype of x, fast.

    No dense copy of a weight outlives the call, or is whole at any time if it is large. An entropy-coded leaf
    is decoded, to whole codes, for this call alone.

    Args:
        form: any form.
        x: activations (..., in). Where gradients are wanted for them, or for the form's tensors, and under
            autocast, it is `form.forward(x)`.

    Returns:
        (..., out).
    """
    device = x.device.type
    leaf = TABLE.get((device, form.storage, x.dtype))
    if leaf is None:
        return form.run_by(run, x)
    if x.numel() == 0 or 0 in form.shape or _plain_only(form, x, device):
        return form.forward(x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = leaf(form, rows)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _plain_only(form: Form, x: Tensor, device: str) -> bool:
    """Whether autograd or autocast has to see each operation."""
    if torch.is_autocast_enabled(device):
        return True
    return torch.is_grad_enabled() and (
        x.requires_grad or any(tensor.requires_grad for tensor in form.tensors().values())
    )


def attach(model: nn.Module) -> nn.Module:
    """Let every `CompressedLinear` of `model` run its form by `run`; returns the model."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.runner = run
    return model
