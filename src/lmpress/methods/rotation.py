"""Orthogonal matrices that spread outliers over all channels: random Hadamard matrices.

A model whose norms divide by the root mean square alone computes the same when its residual stream is turned,
x -> x Q, if what writes to it is turned with it and what reads it is turned back (SliceGPT, arXiv 2401.15024;
QuaRot, 2404.00456; R1 of SpinQuant, 2405.16406). With Q = diag(+-1) H / sqrt(n), H a Hadamard matrix, no
channel of the turned stream stands out, nor does a weight: every one is a mean of n with random signs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_rotation(n: int, seed: int) -> Tensor:
    """An orthogonal matrix (n, n), float64: a Hadamard matrix with random signs.

    Where no Hadamard matrix of this order is known here, a random orthogonal one.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(n)
    if matrix is None:
        turned, upper = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        return torch.as_tensor(turned * upper.diagonal().sign())
    signs = 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1.0
    return signs[:, None] * matrix / math.sqrt(n)


def hadamard(n: int) -> Tensor | None:
    """A matrix (n, n) of ones and minus ones with orthogonal rows, float64; None where none is known here.

    By Sylvester's and Paley's two constructions and products of these: all powers of two and, of the
    multiples of four up to 100, all but 52, 92 and 100.
    """
    if n in (1, 2):
        return torch.tensor([[1.0]]).double() if n == 1 else torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    if n % 4:
        return None
    half = hadamard(n // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), half)
    paley = _paley(n)
    return _product(n) if paley is None else paley


def _paley(n: int) -> Tensor | None:
    """From the squares modulo a prime: n = q + 1 with q = 3 (mod 4), or n = 2 (q + 1) with q = 1 (mod 4)."""
    q = n - 1
    if q % 4 == 3 and _is_prime(q):
        skew = torch.zeros(n, n, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, _residues(q)
        return skew + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        conference = torch.zeros(n // 2, n // 2, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1.0, 1.0, _residues(q)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
        on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(conference, off) + torch.kron(torch.eye(n // 2, dtype=torch.float64), on)
    return None


def _product(n: int) -> Tensor | None:
    """The Kronecker product of two smaller ones."""
    for a in range(4, math.isqrt(n) + 1, 4):
        if n % a == 0:
            left, right = hadamard(a), hadamard(n // a)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def _residues(q: int) -> Tensor:
    """(q, q): 1 where j - i is a square modulo q, -1 where it is none, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    kind = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return kind[(index[None, :] - index[:, None]) % q]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))
