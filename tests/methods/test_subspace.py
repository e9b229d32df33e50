"""Low-rank projections against the SVD of the whitened residual, in float64."""

import pytest
import torch
from torch import Tensor

from lmpress.methods.subspace import Subspace, balanced, project_exactly
from tests.methods.layers import layer


def whitened_tail(residual: Tensor, hessian: Tensor, rank: int) -> float:
    """Eckart-Young: the least ||(E - L) X||^2 is the sum of the squared singular values after the first r."""
    values = torch.linalg.svdvals(residual.double() @ torch.linalg.cholesky(hessian.double()))
    return float(values[rank:].square().sum())


def loss(difference: Tensor, hessian: Tensor) -> float:
    return float((difference.double() @ hessian.double() * difference.double()).sum())


@pytest.mark.parametrize("shape", [(10, 24), (24, 10), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_exact_projection_is_eckart_young_in_the_whitened_norm(shape: tuple[int, int], rank: int) -> None:
    weight, _, statistics = layer(*shape)
    hessian = statistics.require_hessian()
    left, right, used = project_exactly(weight, hessian, rank)
    assert left.dtype == torch.float64
    assert used == 0
    expected = whitened_tail(weight, hessian, rank)
    assert loss(weight - left @ right, hessian) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(10, 24), (24, 10)])
def test_without_a_metric_it_is_the_svd(shape: tuple[int, int]) -> None:
    weight, _, _ = layer(*shape)
    left, right, _ = project_exactly(weight, None, 3)
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(left @ right, U[:, :3] * S[:3] @ Vt[:3], rtol=1e-7, atol=1e-7)


def test_iteration_comes_close_to_the_exact_projection() -> None:
    weight, _, statistics = layer(40, 60)
    hessian = statistics.require_hessian()
    subspace = Subspace(40, 60, 6, seed=0, device=torch.device("cpu"))
    losses = []
    for _ in range(6):
        left, right = subspace.project(weight, hessian, 1)
        losses.append(loss(weight - left @ right, hessian))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1.001 * whitened_tail(weight, hessian, 6)
    assert left.shape == (40, 6)
    torch.testing.assert_close(left.T @ weight, right, rtol=1e-4, atol=1e-4)


def test_balancing_keeps_the_product() -> None:
    left, right, _ = project_exactly(torch.randn(12, 9, dtype=torch.float64), None, 5)
    a, b = balanced(left, right)
    torch.testing.assert_close(a @ b, left @ right)
    assert float(a.square().mean() / b.square().mean()) == pytest.approx(1)
    zero, nothing = balanced(left, torch.zeros_like(right))
    assert not (zero @ nothing).any()


def test_balancing_leaves_components_of_no_size_alone() -> None:
    left, right, _ = project_exactly(torch.randn(12, 9, dtype=torch.float64), None, 5)
    right[3] = 0
    right[4] *= 1e-40
    a, b = balanced(left, right)
    assert bool(torch.isfinite(a).all() & torch.isfinite(b).all())
    torch.testing.assert_close(a @ b, left @ right)


def test_a_metric_with_eigenvalues_that_rounding_made_negative() -> None:
    weight, _, _ = layer(24, 10)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(1))).Q.double()
    known = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, -1e-9, -1e-8, -1e-7], dtype=torch.float64)
    left, right, _ = project_exactly(weight, turn * known @ turn.T, 4)
    assert bool(torch.isfinite(left).all())
    rest = (weight.double() - left @ right) @ turn[:, :4]
    assert float(rest.norm()) < 1e-6 * float(weight.norm())  # all that the metric sees


def test_components_share_their_size_by_its_fourth_root() -> None:
    left, right, _ = project_exactly(torch.randn(12, 9, dtype=torch.float64), None, 5)
    a, _ = balanced(left, right)
    sizes = a.norm(dim=0) / a.norm(dim=0)[0]
    torch.testing.assert_close(sizes, (right.norm(dim=1) / right.norm(dim=1)[0]).pow(0.25))
