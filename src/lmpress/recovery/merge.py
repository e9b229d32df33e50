"""What becomes of an update after training: merged into the form, or one more term of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Quantized, Sum
from lmpress.methods.rtn import RoundOptions, round_to_nearest


def merged(form: Form, left: Tensor, right: Tensor) -> Form:
    """`form + left @ right` in the structure of `form`, with no byte more.

    A dense leaf takes the sum; a quantized one is rounded anew on a grid of the same kind; a product is
    factored again to the rank that it has (Eckart-Young), and its leaves are rounded as they were; of a
    sum, the first term takes the update.

    Args:
        left: (out, r).
        right: (r, in).
    """
    return form.merged(left.float() @ right.float(), refit)


def refit(leaf: Form, weight: Tensor) -> Form:
    """A leaf for another matrix. ValueError where its kind holds no other one."""
    if type(leaf) not in REFIT:
        raise ValueError(f"an update cannot be merged into {leaf.formula}; keep it as a term")
    return REFIT[type(leaf)](weight, leaf)


def as_term(form: Form, left: Tensor, right: Tensor, dtype: torch.dtype) -> Form:
    """`Sum(form, LowRank(left, right))`: the update is kept, stored in `dtype`, and counted."""
    update = LowRank(Dense(left.to(dtype)), Dense(right.to(dtype)))
    return Sum((*form.addends, update))


def requantized(weight: Tensor, like: Quantized) -> Form:
    """`weight` rounded to the nearest on a new grid of the kind that `like` has."""
    options = RoundOptions(like.bits, like.granularity, like.symmetric, scale_dtype=like.scale.dtype)
    return round_to_nearest(weight, None, options).form


def _cast(weight: Tensor, like: Dense) -> Form:
    return Dense(weight.to(like.weight.dtype))


REFIT: dict[type[Form], Callable[[Tensor, Any], Form]] = {Dense: _cast, Quantized: requantized}
"""How a leaf of each kind takes another matrix."""
