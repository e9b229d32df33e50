"""2:4 sparse weights on the sparse tensor cores of a GPU, through torch's semi-structured tensors.

Where two of every four neighbours are kept, these cores skip the other two (arXiv 2104.08378). torch packs
such a weight for them, into 9 bits a weight, at the first call; the stored form stays beside it, so that
a model moves, saves and trains as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from lmpress.forms import Dense, Form, NofM, Sparse, Sum
from lmpress.kernels.dispatch import run

HALVES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 128
"""Every backend of torch takes 16-bit weights whose sides are multiples of these."""

CAPABILITY = (8, 0)
"""Of the first GPU that has sparse tensor cores."""


def suits(form: Form) -> bool:
    """Whether `form` is 2:4 sparse, or a sum with such a term, on a device that runs it fast."""
    if isinstance(form, Sum):
        return any(suits(term) for term in form.terms)
    if not _packable(form, "cuda"):
        return False
    return torch.cuda.get_device_capability(form.pattern.packed.device) >= CAPABILITY


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
        self._source: Tensor | None = None
        self._packed: Tensor | None = None

    def __call__(self, form: Form, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if isinstance(form, Sum):
            y = self(form.terms[0], x)
            for term in form.terms[1:]:
                y = y + self(term, x)
            return y
        if x.dtype not in HALVES or x.device.type != self.device or not _packable(form, self.device):
            return run(form, x)
        return torch.nn.functional.linear(x, self._weight(form, x.dtype))

    def _weight(self, form: Sparse, dtype: torch.dtype) -> Tensor:
        """The packed weight; packed anew where the form has other tensors by now."""
        source = form.values.tensors()["weight"]
        if self._packed is None or self._source is not source or self._packed.dtype != dtype:
            self._source, self._packed = source, self.pack(form.dense(dtype))
        return self._packed


def _packable(form: Form, device: str) -> TypeGuard[Sparse]:
    """Whether torch can pack a form that lies on a device of this type."""
    if not (isinstance(form, Sparse) and isinstance(form.values, Dense) and form.scale is None):
        return False
    pattern = form.pattern
    kept = isinstance(pattern, NofM) and (pattern.n, pattern.m) == (2, 4)
    rows, columns = form.shape
    fits = bool(rows and columns) and rows % ROWS == 0 and columns % COLUMNS == 0
    return kept and fits and pattern.packed.device.type == device
