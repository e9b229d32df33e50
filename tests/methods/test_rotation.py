"""Hadamard matrices and random rotations: ones and minus ones, orthogonal, and another for every seed."""

from __future__ import annotations

import pytest
import torch

from lmpress.methods.rotation import hadamard, random_rotation

UNKNOWN = {52, 92, 100}
KNOWN = [1, 2, *(n for n in range(4, 101, 4) if n not in UNKNOWN), 128, 576, 640, 896, 1152]
PRODUCT = 1360
"""The least order that only a product of two others gives."""


@pytest.mark.parametrize("n", [*KNOWN, PRODUCT])
def test_rows_are_orthogonal_ones_and_minus_ones(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert matrix.shape == (n, n)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [n for n in range(1, 101) if n not in KNOWN])
def test_of_other_orders_there_is_none(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 30, 36, 52, 64, 92, 100, 576])
def test_a_rotation_is_orthogonal(n: int) -> None:
    matrix = random_rotation(n, seed=3)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [12, 64, 576])
def test_every_channel_is_spread_evenly(n: int) -> None:
    """A channel alone comes out as large everywhere, and half of its signs are turned, about."""
    matrix = random_rotation(n, seed=3)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5))
    known = hadamard(n)
    assert known is not None
    signs = matrix[:, 0] * known[:, 0]
    assert torch.equal(matrix * n**0.5 * signs.sign()[:, None], known)
    assert 0.2 < float((signs > 0).double().mean()) < 0.8


@pytest.mark.parametrize("n", [7, 52, 64, 576])
def test_a_seed_gives_one_rotation_and_another_seed_another(n: int) -> None:
    assert torch.equal(random_rotation(n, 1), random_rotation(n, 1))
    assert not torch.allclose(random_rotation(n, 1), random_rotation(n, 2))


def test_where_no_hadamard_matrix_is_known_directions_are_even() -> None:
    """Of the QR of a Gaussian matrix with the signs of R's diagonal: entries have no sign of their own."""
    traces = torch.stack([random_rotation(5, seed).diagonal() for seed in range(200)])
    assert float(traces.mean(0).abs().max()) < 0.15
    assert float(traces.square().mean()) == pytest.approx(1 / 5, abs=0.03)
