"""Random forms for property tests, each with the matrix that it has to stand for, worked out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Pivoted, Quantized, Sparse, Sum

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Example:
    """A form, its matrix (float64) by the definition, and a generator for whatever else a test draws."""

    form: Form
    expected: Tensor
    generator: torch.Generator

    def input(self, *leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random activations (*leading, in)."""
        return torch.randn(*leading, self.form.shape[1], generator=self.generator).to(dtype)


def dense(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Form, Tensor]:
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return Dense(weight), weight.double()


def quantized(
    rows: int,
    columns: int,
    bits: int,
    symmetric: bool,
    groups: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Form, Tensor]:
    """`groups` scales a row, or one for the whole matrix where it is 0."""
    shape = (1, 1) if groups == 0 else (rows, groups)
    scale = (torch.rand(shape, generator=generator) + 0.01).to(dtype)
    low = -(2 ** (bits - 1)) if symmetric else 0
    codes = torch.randint(low, low + 2**bits, (rows, columns), generator=generator)
    zero = None if symmetric else torch.randint(0, 2**bits, shape, generator=generator)
    expected = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            cell = (0, 0) if groups == 0 else (i, j * groups // columns)
            offset = 0 if zero is None else int(zero[cell])
            expected[i, j] = float(scale[cell]) * (int(codes[i, j]) - offset)
    return Quantized.from_codes(codes, scale, zero, bits), expected


@st.composite
def leaves(draw: st.DrawFn, rows: int, columns: int, generator: torch.Generator) -> tuple[Form, Tensor]:
    dtype = draw(st.sampled_from(FLOATS))
    if draw(st.booleans()):
        return dense(rows, columns, dtype, generator)
    divisors = [0, *(g for g in range(1, columns + 1) if columns % g == 0)]
    bits, groups = draw(st.integers(2, 8)), draw(st.sampled_from(divisors))
    return quantized(rows, columns, bits, draw(st.booleans()), groups, dtype, generator)


@st.composite
def trees(
    draw: st.DrawFn, rows: int, columns: int, depth: int, generator: torch.Generator
) -> tuple[Form, Tensor]:
    kinds = ["leaf"] if depth == 0 else ["leaf", "low_rank", "sum", "sparse", "pivoted"]
    kind = draw(st.sampled_from(kinds))
    if kind == "low_rank":
        rank = draw(st.integers(1, 5))
        left, a = draw(trees(rows, rank, depth - 1, generator))
        right, b = draw(trees(rank, columns, depth - 1, generator))
        return LowRank(left, right), a @ b
    if kind == "sum":
        terms = [draw(trees(rows, columns, depth - 1, generator)) for _ in range(draw(st.integers(1, 3)))]
        total = torch.zeros(rows, columns, dtype=torch.float64)
        for _, matrix in terms:
            total += matrix
        return Sum(tuple(form for form, _ in terms)), total
    if kind == "sparse":
        weight = torch.randn(rows, columns, generator=generator)
        mask = torch.rand(rows, columns, generator=generator) < 0.5
        form = Sparse.from_dense(weight, mask)
        if draw(st.booleans()):
            return form, (weight * mask).double()
        scale = torch.rand(rows, 1, generator=generator) + 0.5
        return Sparse(form.pattern, form.values, scale), (weight * mask).double() * scale
    if kind == "pivoted" and rows > 1:
        rank = draw(st.integers(1, rows - 1))
        order = torch.randperm(rows, generator=generator)
        pivots = order[:rank].sort().values
        others = order[rank:].sort().values
        basis, b = draw(leaves(rank, columns, generator))
        mix, c = draw(leaves(rows - rank, rank, generator))
        matrix = torch.empty(rows, columns, dtype=torch.float64)
        matrix[pivots], matrix[others] = b, c @ b
        return Pivoted.from_parts(basis, mix, torch.isin(torch.arange(rows), pivots)), matrix
    return draw(leaves(rows, columns, generator))


@st.composite
def examples(draw: st.DrawFn, depth: int = 2) -> Example:
    """Any form of up to 9 x 20 entries, nested up to `depth` deep."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    return Example(*draw(trees(rows, columns, depth, generator)), generator)
