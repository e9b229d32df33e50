"""Damping: what it adds, and that it mends what cannot be factored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmpress.methods.damping import (
    damped,
    damped_cholesky,
    damping_terms,
    eigenvectors,
    growing,
    shifted_cholesky,
    singular_values,
    singular_vectors,
)
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


def test_a_matrix_is_factored_as_it_is_where_it_can_be() -> None:
    matrix = statistics_of(inputs(6, 50, 0)).require_hessian()
    factor, used = shifted_cholesky(matrix, 0.25)
    assert used == 0
    assert factor.dtype == matrix.dtype
    torch.testing.assert_close(factor @ factor.T, matrix + 0.25 * torch.eye(6))


def test_a_shift_that_is_too_small_grows_from_where_it_was() -> None:
    matrix = torch.tensor([[2.0, 2.1], [2.1, 2.0]])  # its lowest eigenvalue is -0.1
    factor, used = shifted_cholesky(matrix, 0.02)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(factor @ factor.T, matrix + (0.02 + 0.2) * torch.eye(2))
    assert shifted_cholesky(matrix, 0.02, 0.3)[1] == 0.3
    with pytest.raises(ValueError, match="cannot be factored with any damping"):
        shifted_cholesky(torch.full((2, 2), torch.nan), 1.0)


def test_eigenvectors_of_the_symmetric_part_from_the_largest_on() -> None:
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors, used = eigenvectors(matrix)
    symmetric = (matrix + matrix.T) / 2
    torch.testing.assert_close(values, torch.linalg.eigvalsh(symmetric).flip(0))
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, symmetric)
    assert used == 0


Factor = Callable[..., Any]


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """Let a function of torch.linalg not converge, so many times."""
    whole: Factor = getattr(torch.linalg, name)
    left = [times]

    def fails(*args: Any, **how: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.linalg.LinAlgError("did not converge")
        return whole(*args, **how)

    monkeypatch.setattr(torch.linalg, name, fails)


def test_an_iteration_that_does_not_converge_is_damped_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = statistics_of(inputs(6, 50, 0)).require_hessian()
    exact, vectors, _ = eigenvectors(hessian)
    failing(monkeypatch, "eigh", 3)
    values, found, used = eigenvectors(hessian)
    assert used == pytest.approx(1e-4)
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        (found.T @ vectors).abs(), torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0
    )
    failing(monkeypatch, "eigh", 99)
    with pytest.raises(ValueError, match="no eigenvectors with any damping"):
        eigenvectors(hessian)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (4, 1)])
def test_singular_vectors_without_the_iteration_of_lapack(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(singular_values(matrix), exact)
    for attempts in (0, 99):
        failing(monkeypatch, "svd", attempts)
        failing(monkeypatch, "svdvals", attempts)
        left, values, right, used = singular_vectors(matrix)
        assert used == 0
        torch.testing.assert_close(values, exact)
        torch.testing.assert_close(left * values @ right, matrix)
        identity = torch.eye(min(shape), dtype=torch.float64)
        torch.testing.assert_close(left.T @ left, identity)
        torch.testing.assert_close(right @ right.T, identity)
        torch.testing.assert_close(singular_values(matrix), exact)


def test_a_matrix_without_rank_still_has_orthonormal_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "svd", 99)
    left, values, right, _ = singular_vectors(torch.zeros(4, 6, dtype=torch.float64))
    assert not values.any()
    torch.testing.assert_close(left.T @ left, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(4, dtype=torch.float64))


def test_how_damping_grows() -> None:
    assert list(growing(0.0)) == pytest.approx([0.0, *(10.0**power for power in range(-6, 3))])
    assert list(growing(0.02)) == pytest.approx([0.02, 0.2, 2.0, 20.0])
    assert list(growing(100.0)) == [100.0]
    assert list(growing(100.1)) == []
