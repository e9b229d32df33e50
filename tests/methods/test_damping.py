"""Damping: what it adds, and that it mends what cannot be factored."""

from __future__ import annotations

import pytest
import torch

from lmpress.methods.damping import damped, damped_cholesky, damping_terms
from tests.methods.data import inputs, statistics_of


def test_terms_by_the_formula() -> None:
    hessian = torch.diag(torch.tensor([4.0, 0.0, 8.0]))
    expected = torch.tensor([0.04 + 4e-8, 4e-8, 0.08 + 4e-8], dtype=torch.float64)
    torch.testing.assert_close(damping_terms(hessian, 0.01), expected)
    before = hessian.clone()
    torch.testing.assert_close(damped(hessian, 0.01), hessian.double() + torch.diag(expected))
    assert torch.equal(hessian, before)


def test_a_definite_matrix_takes_the_damping_as_given() -> None:
    hessian = statistics_of(inputs(6, 50, 0)).require_hessian()
    factor, used = damped_cholesky(hessian, 0.01)
    assert used == 0.01
    torch.testing.assert_close(factor @ factor.T, damped(hessian, 0.01))
    assert torch.equal(factor, factor.tril())


def test_damping_grows_until_it_works_and_tells() -> None:
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # indefinite: takes more than 5 %
    factor, used = damped_cholesky(hessian, 0.0)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(factor @ factor.T, damped(hessian, used))


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_singular_matrices_are_factored(rank: int) -> None:
    x = inputs(5, 5, 1)[:rank]
    hessian = x.T @ x
    factor, used = damped_cholesky(hessian, 1e-2)
    assert used == 1e-2
    assert bool(torch.isfinite(torch.cholesky_inverse(factor)).all())


@pytest.mark.parametrize("bad", [torch.full((2, 2), torch.nan), torch.tensor([[1.0, 1e9], [1e9, 1.0]])])
def test_what_no_damping_mends_is_an_error(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be factored with any damping"):
        damped_cholesky(bad, 1e-2)
