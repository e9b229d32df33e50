"""Which weights stay: masks from scores, and the form that stores what stays.

A pattern is `unstructured` or `n:m`, where n of every m neighbours in a row are *kept* (2:8 keeps a quarter).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmpress.forms import Bitmap, Form, NofM, Pattern, Quantized, Sparse
from lmpress.forms.pattern import MAX_GROUP
from lmpress.forms.sparse import values_shape


@dataclass(frozen=True)
class Grid:
    """A fixed uniform grid of a matrix (out, in): `scale * (code - zero)`.

    Attributes:
        scale: (1, 1) | (out, 1) | (out, groups), as stored.
        zero: integers of scale's shape, or None for a symmetric grid.
        bits: 2 to 8.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """`unstructured` -> None; `2:4` -> (2, 4): n kept of every m. ValueError for anything else."""
    if pattern == "unstructured":
        return None
    kept, colon, group = pattern.partition(":")
    digits = kept.isascii() and kept.isdigit() and group.isascii() and group.isdigit()
    if colon and digits and 1 <= int(kept) <= int(group) <= MAX_GROUP:
        return int(kept), int(group)
    raise ValueError(f"a pattern is 'unstructured' or 'n:m' (n kept of m <= {MAX_GROUP}), not {pattern!r}")


def density_of(pattern: str, sparsity: float) -> float:
    """The share that is kept: n / m of an n:m pattern, else 1 - sparsity."""
    group = parse_pattern(pattern)
    if group:
        return group[0] / group[1]
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity lies in 0..1, not at {sparsity}")
    return 1 - sparsity


def keep_largest(scores: Tensor, density: float, group: tuple[int, int] | None, per_row: bool) -> Tensor:
    """The mask of the largest scores.

    Args:
        scores: (out, in).
        density: the share to keep, rounded to a whole number of entries; n:m patterns have their own.
        group: (n, m), or None for unstructured.
        per_row: compare within each row; else over the whole matrix.

    Returns:
        bool (out, in): exactly n of every m, or exactly round(density * in) a row, or round(density * out *
        in).

    Raises:
        ValueError: if m does not divide the columns.
    """
    rows, columns = scores.shape
    if group:
        n, m = group
        if columns % m:
            raise ValueError(f"{n}:{m} sparsity needs a multiple of {m} columns, not {columns}")
        cells, kept = scores.reshape(rows, columns // m, m), n
    elif per_row:
        cells, kept = scores[:, None], round(density * columns)
    else:
        cells, kept = scores.reshape(1, 1, -1), round(density * rows * columns)
    mask = torch.zeros_like(cells, dtype=torch.bool)
    mask.scatter_(2, cells.topk(kept, dim=2, sorted=False).indices, True)
    return mask.view(rows, columns)


def with_priority(scores: Tensor, protected: Tensor | None) -> Tensor:
    """Scores (out, in) of which the protected ones (bool) are above all others; both kinds in their order."""
    if protected is None or not scores.numel():
        return scores
    return torch.where(protected, scores + 2 * scores.amax(), scores)


def sparse_form(values: Tensor, mask: Tensor, group: tuple[int, int] | None, dtype: torch.dtype) -> Sparse:
    """`Sparse(pattern, Dense)`: the entries of `values` (out, in) at `mask`, in `dtype`."""
    return Sparse.from_dense(values.to(dtype), mask, group)


def sparse_quantized_form(codes: Tensor, mask: Tensor, group: tuple[int, int] | None, grid: Grid) -> Sparse:
    """`Sparse(pattern, Quantized)`: the codes of the survivors alone, on the grid of the whole matrix.

    Where rows keep different numbers of entries, the scales move from the values to the `Sparse` form.

    Args:
        codes: integers (out, in), signed around zero if the grid is symmetric.
        mask: bool (out, in).

    Raises:
        ValueError: for an asymmetric grid by row or group where rows keep different numbers of entries.
    """
    pattern: Pattern = NofM.from_mask(mask, *group) if group else Bitmap.from_mask(mask)
    values = codes[mask].view(values_shape(mask))
    groups = grid.scale.shape[1]
    plain = grid.scale.numel() == 1 or (
        values.shape[0] == mask.shape[0] and (groups == 1 or group is not None)
    )
    if plain and values.shape[1] % groups == 0:
        return Sparse(pattern, Quantized.from_codes(values, grid.scale, grid.zero, grid.bits))
    check_grid_fits(grid.zero is None, grid.scale.numel() == 1, group)
    one = torch.ones(1, 1, dtype=grid.scale.dtype, device=codes.device)
    return Sparse(pattern, Quantized.from_codes(values, one, None, grid.bits), grid.scale)


def check_grid_fits(symmetric: bool, per_tensor: bool, group: tuple[int, int] | None) -> None:
    """ValueError where the survivors of a pattern cannot be stored on such a grid."""
    if not (symmetric or per_tensor or group):
        raise ValueError(
            "unstructured survivors take a symmetric grid, or one zero point for the whole tensor"
        )


def dense_quantized_form(codes: Tensor, mask: Tensor, grid: Grid) -> Quantized:
    """`Quantized` over the whole matrix, with what is pruned on the code of zero."""
    if grid.zero is None:
        return Quantized.from_codes(codes * mask, grid.scale, None, grid.bits)
    rows, columns = codes.shape
    fill = grid.zero.repeat_interleave(columns // grid.zero.shape[1], 1).expand(rows, columns)
    return Quantized.from_codes(torch.where(mask, codes, fill.to(codes)), grid.scale, grid.zero, grid.bits)


def survivors(form: Form) -> tuple[Tensor, Tensor]:
    """The matrix (out, in) in float32 and its mask: the pattern of a `Sparse` form, else what is not zero."""
    return form.dense(), form.mask
