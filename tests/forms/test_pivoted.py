"""`Pivoted` against the product of its parts, and the contract of every form."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmpress.forms import CompressedLinear, Dense, Form, Pivoted, Quantized, form_from_description


def example(rows: int = 11, columns: int = 7, rank: int = 4) -> tuple[Pivoted, torch.Tensor]:
    """A form, and the matrix that it should be, row by row."""
    generator = torch.Generator().manual_seed(rows)
    basis = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(rows - rank, rank, generator=generator, dtype=torch.float64)
    pivots = torch.zeros(rows, dtype=torch.bool)
    pivots[torch.randperm(rows, generator=generator)[:rank]] = True
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    p = c = 0
    for i in range(rows):
        if pivots[i]:
            expected[i], p = basis[p], p + 1
        else:
            expected[i], c = (coefficients[c][:, None] * basis).sum(0), c + 1
    return Pivoted.from_parts(Dense(basis), Dense(coefficients), pivots), expected


@pytest.mark.parametrize("rank", [0, 1, 4, 11])
def test_contract(rank: int, tmp_path: Path) -> None:
    form, expected = example(rank=rank, columns=12)
    assert form.shape == (11, 12)
    torch.testing.assert_close(form.dense(torch.float64), expected, rtol=1e-13, atol=1e-13)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(form.forward(x), x @ expected.T, rtol=1e-12, atol=1e-12)
    file = tmp_path / "f.safetensors"
    save_file(form.tensors(), file)
    assert form.num_bytes == file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") - 8
    empty = form_from_description(form.describe())
    assert {k: (v.shape, v.dtype) for k, v in empty.tensors().items()} == {
        k: (v.shape, v.dtype) for k, v in form.tensors().items()
    }
    loaded = empty.with_tensors(load_file(file))
    assert torch.equal(loaded.dense(torch.float64), form.dense(torch.float64))
    index = torch.tensor([3, 0])
    torch.testing.assert_close(form.rows(index), expected[index].float())
    assert CompressedLinear(form).weight.dtype == torch.uint8  # never mistaken for a plain weight


def test_parameters_are_r_m_plus_n_minus_r_squared() -> None:
    form, _ = example(32, 24, 8)
    index = form.tensors()["index"]
    assert index.numel() * 8 == 32
    assert form.num_bytes - index.numel() == 8 * (8 * (32 + 24) - 8 * 8)


def test_rewrite_quantizes_both_parts() -> None:
    form, _ = example()

    def rewriter(leaf: Form) -> Form:
        scale = torch.full((leaf.shape[0], 1), 0.1)
        return Quantized.from_codes((leaf.dense() / scale).round().clamp(-128, 127).int(), scale, None, 8)

    rewritten = form.rewrite(rewriter)
    assert isinstance(rewritten, Pivoted)
    assert rewritten.formula == "Pivoted(int8, int8; r=4)"
    basis = rewritten.basis.dense()
    assert torch.equal(rewritten.dense()[form.pivots()], basis)
    torch.testing.assert_close(rewritten.dense()[~form.pivots()], rewritten.coefficients.dense() @ basis)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="coefficients"):
        Pivoted(Dense(torch.zeros(3, 5)), Dense(torch.zeros(4, 2)), torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="index"):
        Pivoted(Dense(torch.zeros(3, 5)), Dense(torch.zeros(4, 3)), torch.zeros(1, 2, dtype=torch.uint8))
