"""What methods ask of their inputs: shapes that fit one another, and numbers that are finite.

A NaN that slips in comes out as a matrix without a factorization, or as a quietly broken weight, far from
where it began: every method refuses it at the door, by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmpress.statistics import InputStatistics


def check_finite(tensors: Mapping[str, Tensor | None]) -> None:
    """ValueError that names the first of the tensors with a NaN or an infinity; None counts as finite."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} is not finite: it holds NaN or infinity")


def check_statistics(statistics: InputStatistics) -> None:
    """ValueError where a moment is not finite."""
    check_finite(
        {
            "mean of the input": statistics.mean,
            "second moment of the input": statistics.second_moment,
            "mean magnitude of the input": statistics.abs_mean,
            "Hessian": statistics.hessian,
        }
    )


def check_layer(
    weight: Tensor,
    statistics: InputStatistics | None = None,
    *,
    cross: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    """ValueError unless all that is said about one weight fits it and is finite.

    Args:
        weight: (out, in).
        statistics: of its input.
        cross: C (in, in) for asymmetric calibration.
        row_weights: what an error of each output counts, (out,), positive.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight is a matrix, not of shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    check_finite({"weight": weight, "cross matrix": cross, "vector of row weights": row_weights})
    if statistics is not None:
        if statistics.features != columns:
            told = f"statistics of {statistics.features} inputs do not fit a weight of {(rows, columns)}"
            raise ValueError(told)
        if statistics.hessian is not None and statistics.hessian.shape != (columns, columns):
            told = (
                f"a Hessian of {tuple(statistics.hessian.shape)} does not fit a weight of {(rows, columns)}"
            )
            raise ValueError(told)
        check_statistics(statistics)
    if cross is not None and cross.shape != (columns, columns):
        raise ValueError(f"a cross matrix of {tuple(cross.shape)} does not fit a weight of {(rows, columns)}")
    if row_weights is not None and (row_weights.shape != (rows,) or not bool((row_weights > 0).all())):
        raise ValueError(f"row weights are positive, one for each of the {rows} outputs")
