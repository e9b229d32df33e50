"""What is refused at the door, and by which name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmpress.methods.checks import check_finite, check_layer
from tests.methods.layers import layer

WEIGHT, _, STATISTICS = layer(4, 6)


def test_what_fits_and_is_finite_passes() -> None:
    check_layer(WEIGHT)
    check_layer(WEIGHT, STATISTICS, cross=torch.zeros(6, 6), row_weights=torch.ones(4))
    check_layer(WEIGHT, replace(STATISTICS, hessian=None, abs_mean=None))
    check_layer(torch.zeros(0, 6), STATISTICS)
    check_finite({"nothing": None})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("mean", "mean of the input"),
        ("second_moment", "second moment of the input"),
        ("abs_mean", "mean magnitude of the input"),
        ("hessian", "Hessian"),
    ],
)
def test_the_moment_that_is_not_finite_is_named(field: str, name: str, value: float) -> None:
    moment = getattr(STATISTICS, field).clone()
    moment.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"the {name} is not finite"):
        check_layer(WEIGHT, replace(STATISTICS, **{field: moment}))


def test_so_are_the_others() -> None:
    nan = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="the weight is not finite"):
        check_layer(WEIGHT * nan)
    with pytest.raises(ValueError, match="the cross matrix is not finite"):
        check_layer(WEIGHT, STATISTICS, cross=nan.expand(6, 6))
    with pytest.raises(ValueError, match="the vector of row weights is not finite"):
        check_layer(WEIGHT, row_weights=nan.expand(4))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="a weight is a matrix"):
        check_layer(WEIGHT[0])
    with pytest.raises(ValueError, match=r"statistics of 6 inputs do not fit a weight of \(4, 5\)"):
        check_layer(WEIGHT[:, :5], STATISTICS)
    with pytest.raises(ValueError, match=r"statistics of 6 inputs do not fit a weight of \(4, 7\)"):
        check_layer(torch.zeros(4, 7), STATISTICS)
    with pytest.raises(ValueError, match=r"Hessian of \(5, 5\) does not fit"):
        check_layer(WEIGHT, replace(STATISTICS, hessian=torch.eye(5)))
    with pytest.raises(ValueError, match=r"cross matrix of \(4, 4\) does not fit"):
        check_layer(WEIGHT, cross=torch.eye(4))
    for rows in (torch.ones(6), torch.zeros(4), -torch.ones(4)):
        with pytest.raises(ValueError, match="one for each of the 4 outputs"):
            check_layer(WEIGHT, row_weights=rows)
