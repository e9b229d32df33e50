"""What becomes of an update after training: merged into the form, or one more term of it."""

from __future__ import annotations

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
    update = left.float() @ right.float()
    if isinstance(form, Dense):
        return Dense((form.dense() + update).to(form.weight.dtype))
    if isinstance(form, Quantized):
        return requantized(form.dense() + update, form)
    if isinstance(form, LowRank):
        return _refactored(form, form.dense() + update)
    if isinstance(form, Sum):
        return Sum((merged(form.terms[0], left, right), *form.terms[1:]))
    raise ValueError(f"an update cannot be merged into {form.formula}; keep it as a term")


def as_term(form: Form, left: Tensor, right: Tensor, dtype: torch.dtype) -> Form:
    """`Sum(form, LowRank(left, right))`: the update is kept, stored in `dtype`, and counted."""
    update = LowRank(Dense(left.to(dtype)), Dense(right.to(dtype)))
    terms = form.terms if isinstance(form, Sum) else (form,)
    return Sum((*terms, update))


def requantized(weight: Tensor, like: Quantized) -> Form:
    """`weight` rounded to the nearest on a new grid of the kind that `like` has."""
    options = RoundOptions(like.bits, like.granularity, like.symmetric, scale_dtype=like.scale.dtype)
    return round_to_nearest(weight, None, options).form


def _refactored(form: LowRank, target: Tensor) -> Form:
    """The best product of the same rank, with leaves as the old ones are."""
    u, s, vt = torch.linalg.svd(target.double(), full_matrices=False)
    root = s[: form.rank].sqrt()
    left, right = (u[:, : form.rank] * root).float(), (root[:, None] * vt[: form.rank]).float()
    return LowRank(_like(left, form.left), _like(right, form.right))


def _like(weight: Tensor, leaf: Form) -> Form:
    if isinstance(leaf, Quantized):
        return requantized(weight, leaf)
    if isinstance(leaf, Dense):
        return Dense(weight.to(leaf.weight.dtype))
    raise ValueError(f"an update cannot be merged into a factor {leaf.formula}; keep it as a term")
