"""Whether two texts share passages, and the hash that tells two token tensors apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def ngram_overlap(a: Sequence[int] | Tensor, b: Sequence[int] | Tensor, n: int = 13) -> int:
    """The number of places in `b` at which `n` tokens begin that also stand somewhere in `a`.

    13-grams are what GPT-3 (arXiv 2005.14165, appendix C) calls contamination. Exact: n-grams are named
    by doubling (Karp, Miller and Rosenberg, 1972), a name of 2k tokens being the pair of names of its halves,
    so there is no hash that could collide.

    Args:
        a, b: tokens (..., length); n-grams run along the last dimension and never cross rows.
        n: at least 1.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one token, not {n}")
    first, second = (torch.as_tensor(ids, dtype=torch.int64).cpu() for ids in (a, b))
    if min(first.shape[-1], second.shape[-1]) < n or not (first.numel() and second.numel()):
        return 0
    first, second, names = _renamed(first, second)
    length = 1
    while length < n:
        step = min(length, n - length)  # the halves may overlap: 13 is 8 and 8, five apart
        first, second = (names * ids[..., :-step] + ids[..., step:] for ids in (first, second))
        first, second, names = _renamed(first, second)
        length += step
    return int(torch.isin(second, first).sum())


def fingerprint(ids: Tensor) -> str:
    """sha256 of the shape and of the int64 bytes (little-endian) of a tensor of tokens."""
    whole = ids.detach().to("cpu", torch.int64).contiguous()
    digest = hashlib.sha256(repr(tuple(whole.shape)).encode())
    digest.update(whole.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _renamed(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, int]:
    """The same equalities with names 0, 1, ... instead of values, and how many names there are."""
    values, names = torch.unique(torch.cat([first.flatten(), second.flatten()]), return_inverse=True)
    cut = first.numel()
    return names[:cut].view(first.shape), names[cut:].view(second.shape), values.numel()
