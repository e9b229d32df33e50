"""2:4 sparse weights on the sparse tensor cores of a GPU, through torch's semi-structured tensors.

Where two of every four neighbours are kept, these cores skip the other two (arXiv 2104.08378). torch packs
such a weight for them, into 9 bits a weight, when it first runs and whenever it has changed; the stored form
stays beside it, so that a model moves, saves and trains as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lmpress.forms import Form, Sparse
from lmpress.kernels.dispatch import run

HALVES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64
"""Every backend of torch takes 16-bit weights whose sides are multiples of these."""

CAPABILITY = (8, 0)
"""Of the first GPU that has sparse tensor cores."""


def suits(form: Form) -> bool:
    """Whether `form` is 2:4 sparse in 16 bits, or a sum with such a term, on a device that runs it fast."""
    if len(form.addends) > 1:
        return any(suits(term) for term in form.addends)
    if not _packable(form, "cuda"):
        return False
    weight = form.values.tensors()["weight"]
    return _works(weight.device, weight.dtype)


class SemiStructured:
    """A runner for one module: `run`, but for a 2:4 sparse leaf with 16-bit values.

    Args:
        device: the type of the device whose activations it takes.
        pack: (out, in) with two of every four entries zero -> what `torch.nn.functional.linear` runs fast.
    """

    def __init__(
        self, device: str = "cuda", pack: Callable[[Tensor], Tensor] = torch.sparse.to_sparse_semi_structured
    ) -> None:
        self.device, self.pack = device, pack
        self._known: Any = None
        self._packed: Tensor | None = None

    def __call__(self, form: Form, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if len(form.addends) > 1:
            return form.run_by(self, x)
        if not _packable(form, self.device):
            return run(form, x)
        weight = form.values.tensors()["weight"]
        if x.dtype != weight.dtype or x.device != weight.device or not x.numel():
            self._known = self._packed = None
            return run(form, x)
        rows = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self._weight(form, weight.dtype))
        return rows.view(*x.shape[:-1], rows.shape[1])

    def _weight(self, form: Sparse, dtype: torch.dtype) -> Tensor:
        """The packed weight; packed anew where a tensor of the form was replaced, moved or written to."""
        known = [
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.device, tensor.dtype)
            for tensor in form.tensors().values()
        ]
        if self._packed is None or self._known != known:
            self._packed = None  # let go before another is made
            self._known, self._packed = known, self.pack(form.dense(dtype))
        return self._packed


def _packable(form: Form, device: str) -> TypeGuard[Sparse]:
    """Whether torch can pack a form that lies on a device of this type."""
    if not isinstance(form, Sparse) or form.values.plain is None or form.scale is not None:
        return False
    weight, (rows, columns) = form.values.plain, form.shape
    fits = bool(rows and columns) and rows % ROWS == 0 and columns % COLUMNS == 0
    return form.pattern.group == (2, 4) and fits and weight.device.type == device and weight.dtype in HALVES


@lru_cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this GPU, with this build of torch, packs and multiplies a small 2:4 weight."""
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    tile = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device, dtype=dtype).repeat(ROWS, COLUMNS // 4)
    x = torch.ones(ROWS, COLUMNS, device=device, dtype=dtype)
    try:
        y = torch.nn.functional.linear(x, torch.sparse.to_sparse_semi_structured(tile))
        return bool(torch.equal(y, torch.nn.functional.linear(x, tile)))
    except (RuntimeError, NotImplementedError):
        return False
