"""The factor of the inverse Hessian and error feedback, against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmpress.methods.hessian import damped_inverse_factor, feed_back, layer_loss, relative_loss


def hessian_of(n: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + torch.eye(n)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing
    return x.T @ x / tokens


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_is_that_of_the_inverse(per_channel: bool, dtype: torch.dtype) -> None:
    hessian = hessian_of(40, 100)
    factor = damped_inverse_factor(hessian.to(dtype), 0.03, per_channel=per_channel)
    diagonal = hessian.diagonal()
    added = 0.03 * (diagonal if per_channel else diagonal.mean().expand(40))
    expected = torch.linalg.inv(hessian + torch.diag(added))
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factor.energy.double(), diagonal, rtol=1e-5, atol=0)
    torch.testing.assert_close(factor.added.double(), added, rtol=1e-5, atol=0)
    assert factor.damping == 0.03
    assert not factor.fallback


def test_conditional_variance_identity() -> None:
    """U_jj^2 is the first entry of the inverse of H restricted to the columns from j on."""
    hessian = hessian_of(12, 50)
    upper = damped_inverse_factor(hessian, 0.0).upper
    for j in range(12):
        expected = torch.linalg.inv(hessian[j:, j:])[0, 0]
        torch.testing.assert_close(upper[j, j].square(), expected, rtol=1e-9, atol=0)


def test_damping_grows_until_it_works_and_is_told() -> None:
    singular = hessian_of(30, 5)  # rank 5
    factor = damped_inverse_factor(singular.float(), 0.0)
    assert 0 < factor.damping <= 1e-3
    assert torch.isfinite(factor.upper).all()
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
    indefinite[0, 1] = indefinite[1, 0] = 3.0
    assert damped_inverse_factor(indefinite, 0.01).damping == pytest.approx(10.0)


def test_the_last_resort_is_the_diagonal() -> None:
    hopeless = torch.diag(torch.tensor([1.0, 4.0]))
    hopeless[0, 1] = hopeless[1, 0] = 1e3
    factor = damped_inverse_factor(hopeless, 0.01)
    assert factor.fallback
    assert "fallback" in factor.report()
    torch.testing.assert_close(factor.upper, torch.diag(torch.tensor([1.0, 0.5])))


def test_dead_inputs_are_average_and_uncoupled() -> None:
    hessian = hessian_of(8, 60)
    hessian[3] = 0
    hessian[:, 3] = 0
    factor = damped_inverse_factor(hessian, 0.0)
    assert factor.dead.tolist() == [j == 3 for j in range(8)]
    assert factor.report()["dead_inputs"] == 1
    live = hessian.diagonal()[~factor.dead].mean()
    torch.testing.assert_close(factor.upper[3, 3], live.rsqrt())
    assert not factor.upper[3, 4:].any()
    nothing = damped_inverse_factor(torch.zeros(4, 4))
    torch.testing.assert_close(nothing.upper, torch.eye(4) / 1.01**0.5)


def test_bad_hessians_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        damped_inverse_factor(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="finite"):
        damped_inverse_factor(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="damping"):
        damped_inverse_factor(torch.eye(3), -1.0)


def exact_obs(weight: Tensor, hessian: Tensor, snapped: Tensor) -> Tensor:
    """Columns set to the nearest whole number one by one; the rest re-solved by least squares each time."""
    result = weight.clone()
    n = weight.shape[1]
    for j in range(n):
        result[:, j] = result[:, j].round()
        if j + 1 < n:  # min over the rest of tr(D H D^T): D_R = -D_F H_FR H_RR^-1
            fixed = result[:, : j + 1] - weight[:, : j + 1]
            rest = torch.linalg.solve(hessian[j + 1 :, j + 1 :], hessian[j + 1 :, : j + 1] @ fixed.T).T
            result[:, j + 1 :] = weight[:, j + 1 :] - rest
    return result


@pytest.mark.parametrize(("leaf", "align"), [(1, 1), (4, 1), (32, 1), (3, 5), (64, 10)])
def test_feed_back_is_exact_obs(leaf: int, align: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 20, generator=generator, dtype=torch.float64) * 3
    hessian = hessian_of(20, 70)
    columns = weight.T.contiguous()
    upper = damped_inverse_factor(hessian, 0.0).upper
    seen: list[int] = []

    def snap(j: int, column: Tensor) -> Tensor:
        seen.append(j)
        return column.round()

    errors = feed_back(columns, upper, snap, leaf=leaf, align=align)
    expected = exact_obs(weight, hessian, columns.T)
    torch.testing.assert_close(columns.T, expected, rtol=0, atol=1e-9)
    assert seen == list(range(20))
    loss = layer_loss(weight - columns.T, hessian)
    assert float(errors.square().sum()) == pytest.approx(loss, rel=1e-9)


def test_an_aligned_run_is_up_to_date_when_it_starts() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 24, generator=generator, dtype=torch.float64)
    hessian = hessian_of(24, 70)
    upper = damped_inverse_factor(hessian, 0.0).upper
    for align in (4, 6, 8):
        columns = weight.T.contiguous()

        def snap(j: int, column: Tensor, columns: Tensor = columns, align: int = align) -> Tensor:
            if j % align == 0:
                fixed = columns[:j].T - weight[:, :j]
                rest = torch.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ fixed.T).T
                wanted = weight[:, j : j + align] - rest[:, :align]
                torch.testing.assert_close(columns[j : j + align].T, wanted, rtol=0, atol=1e-9)
            return column.round()

        feed_back(columns, upper, snap, leaf=2, align=align)


def test_relative_loss_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 7, generator=generator)
    weight, other = torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator)
    expected = (x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()
    assert relative_loss(weight, other, x.T @ x / 50) == pytest.approx(float(expected), rel=1e-4)
    assert relative_loss(torch.zeros(4, 7), other, x.T @ x) == 0.0


def test_damping_grows_by_its_factor_until_it_works() -> None:
    indefinite = torch.tensor([[1.0, 1.2], [1.2, 1.0]], dtype=torch.float64)  # takes more than 20 %
    for start, growth, used in ((0.03, 3.0, 0.27), (0.0, 10.0, 1.0), (0.25, 2.0, 0.25)):
        factor = damped_inverse_factor(indefinite, start, growth=growth)
        assert factor.damping == pytest.approx(used)
        assert not factor.fallback
        damped = indefinite + used * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))
        torch.testing.assert_close(factor.added, torch.full((2,), used, dtype=torch.float64))
    for growth in (1.0, 0.5):
        with pytest.raises(ValueError, match="grows by a factor above 1"):
            damped_inverse_factor(indefinite, 0.1, growth=growth)


def test_the_largest_damping_is_still_tried() -> None:
    far = torch.tensor([[1.0, 10.5], [10.5, 1.0]], dtype=torch.float64)  # takes more than 9.5
    assert damped_inverse_factor(far, 1.0).damping == 10.0
    assert not damped_inverse_factor(far, 1.0).fallback
    farther = torch.tensor([[1.0, 11.5], [11.5, 1.0]], dtype=torch.float64)
    assert damped_inverse_factor(farther, 1.0).fallback


def test_damping_by_channel_is_of_each_diagonal_entry() -> None:
    hessian = torch.diag(torch.tensor([1.0, 4.0, 100.0], dtype=torch.float64))
    factor = damped_inverse_factor(hessian, 0.5, per_channel=True)
    torch.testing.assert_close(factor.added, torch.tensor([0.5, 2.0, 50.0], dtype=torch.float64))
    torch.testing.assert_close(factor.energy, hessian.diagonal())
    mean = damped_inverse_factor(hessian, 0.5)
    torch.testing.assert_close(mean.added, torch.full((3,), 17.5, dtype=torch.float64))
    assert mean.report() == {"damping": 0.5}
