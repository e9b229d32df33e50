"""`Sparse` against the masked dense matrix, and the contract of every form."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmpress.forms import (
    Bitmap,
    CompressedLinear,
    Dense,
    Form,
    LowRank,
    NofM,
    Quantized,
    Sparse,
    Sum,
    form_from_description,
)
from tests.forms.test_pattern import n_of_m_mask

GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(6, 16, generator=GENERATOR)
RAGGED = torch.rand(6, 16, generator=GENERATOR) < 0.45
HALF = n_of_m_mask(6, 16, 2, 4)


def codes(rows: int, columns: int, bits: int = 4) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=GENERATOR)


def quantized_flat() -> Sparse:
    """Rows of different lengths with a scale for every row and half row."""
    values = Quantized.from_codes(codes(1, int(RAGGED.sum())), torch.ones(1, 1), None, 4)
    return Sparse(Bitmap.from_mask(RAGGED), values, torch.rand(6, 2, generator=GENERATOR) + 0.1)


def quantized_groups(zero: bool) -> Sparse:
    scale = torch.rand(6, 2, generator=GENERATOR) + 0.1
    if not zero:
        return Sparse(NofM.from_mask(HALF, 2, 4), Quantized.from_codes(codes(6, 8), scale, None, 4))
    zeros = torch.randint(0, 16, (6, 2), generator=GENERATOR)
    return Sparse(NofM.from_mask(HALF, 2, 4), Quantized.from_codes(codes(6, 8) + 8, scale, zeros, 4))


FORMS: dict[str, Sparse] = {
    "ragged": Sparse.from_dense(WEIGHT, RAGGED),
    "half": Sparse.from_dense(WEIGHT.half(), HALF, (2, 4)),
    "ragged int4": quantized_flat(),
    "2:4 int4": quantized_groups(zero=False),
    "2:4 uint4": quantized_groups(zero=True),
    "empty": Sparse.from_dense(WEIGHT, torch.zeros_like(RAGGED)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_contract(form: Sparse, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.forward(x), x @ form.dense().T)
    tensors = form.tensors()
    save_file(tensors, tmp_path / "f.safetensors")
    header = int.from_bytes((tmp_path / "f.safetensors").read_bytes()[:8], "little") + 8
    assert form.num_bytes == (tmp_path / "f.safetensors").stat().st_size - header
    empty = form_from_description(form.describe())
    assert {k: (v.shape, v.dtype) for k, v in empty.tensors().items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }
    assert empty.shape == form.shape
    loaded = empty.with_tensors(load_file(tmp_path / "f.safetensors"))
    assert torch.equal(loaded.dense(), form.dense())
    index = torch.tensor([[4, 0], [0, 5]])
    assert torch.equal(form.rows(index), form.dense()[index])
    layer = CompressedLinear(form)
    torch.testing.assert_close(layer(x), x @ form.dense().T)
    assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize("mask", [RAGGED, HALF])
def test_dense_is_the_masked_weight(mask: torch.Tensor) -> None:
    form = Sparse.from_dense(WEIGHT, mask)
    assert torch.equal(form.dense(), WEIGHT * mask)
    assert form.density == pytest.approx(float(mask.float().mean()))


def test_layout_of_the_values() -> None:
    assert Sparse.from_dense(WEIGHT, RAGGED).values.shape == (1, int(RAGGED.sum()))
    assert Sparse.from_dense(WEIGHT, HALF).values.shape == (6, 8)


def test_scales_by_row_and_group() -> None:
    form = quantized_flat()
    expected = torch.zeros(6, 16)
    assert form.scale is not None
    flat = iter(form.values.dense()[0].tolist())
    for i in range(6):
        for j in range(16):
            if RAGGED[i, j]:
                expected[i, j] = next(flat) * form.scale[i, j // 8]
    assert torch.equal(form.dense(), expected)


def test_bytes_are_the_true_cost() -> None:
    mask = n_of_m_mask(4, 64, 2, 4)  # 16 groups a row: 48 bits
    assert Sparse.from_dense(torch.randn(4, 64).half(), mask, (2, 4)).bits_per_weight == 8 + 0.75
    assert Sparse.from_dense(torch.randn(4, 64).half(), mask).bits_per_weight == 8 + 1
    assert Sparse.from_dense(WEIGHT.half(), RAGGED).num_bytes == 2 * int(RAGGED.sum()) + 6 * 2


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_filled_is_the_same_matrix_without_a_pattern(form: Sparse) -> None:
    filled = form.filled()
    assert isinstance(filled, Quantized if isinstance(form.values, Quantized) else Dense)
    torch.testing.assert_close(filled.dense(), form.dense(), rtol=1e-6, atol=1e-6)
    assert torch.equal(filled.dense() == 0, form.dense() == 0)


def test_filled_where_groups_of_kept_entries_are_no_groups_of_columns() -> None:
    values = Quantized.from_codes(codes(6, 8), torch.rand(6, 2, generator=GENERATOR), None, 4)
    form = Sparse(Bitmap.from_mask(HALF), values)
    assert isinstance(form.filled(), Dense)
    assert torch.equal(form.filled().dense(), form.dense())


def test_filled_where_values_and_matrix_have_scales_of_their_own() -> None:
    mask = n_of_m_mask(1, 16, 2, 4)
    values = Quantized.from_codes(codes(1, 8), torch.tensor([[0.5, 2.0]]), None, 4)
    form = Sparse(NofM.from_mask(mask, 2, 4), values, torch.tensor([[1.0, 3.0, 0.25, 2.0]]))
    assert torch.equal(form.filled().dense(), form.dense())


def test_rewrite_reaches_the_values() -> None:
    def halve(leaf: Form) -> Form:
        return Dense(leaf.dense() / 2)

    assert torch.equal(FORMS["ragged"].rewrite(halve).dense(), WEIGHT * RAGGED / 2)


def test_gradient_reaches_the_kept_values_and_the_scales() -> None:
    form = quantized_flat()
    assert form.scale is not None
    scale = form.scale.clone().requires_grad_()
    x = torch.randn(3, 16)
    form.with_tensors(form.tensors() | {"scale": scale}).forward(x).sum().backward()
    unscaled = form.with_tensors(form.tensors() | {"scale": torch.ones_like(scale)}).dense()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (unscaled * x.sum(0)).view(6, 2, 8).sum(2))
    values = torch.randn(1, int(RAGGED.sum()), requires_grad=True)
    Sparse(Bitmap.from_mask(RAGGED), Dense(values)).forward(x).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0], x.sum(0).expand(6, 16)[RAGGED])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="kept entries"):
        Sparse(Bitmap.from_mask(RAGGED), Dense(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="scales of shape"):
        Sparse(Bitmap.from_mask(HALF), Dense(torch.zeros(6, 8)), torch.ones(6, 3))


NESTED: dict[str, Form] = {
    "product": LowRank(FORMS["2:4 int4"], Dense(torch.randn(16, 3, generator=GENERATOR))),
    "sum": Sum((FORMS["ragged int4"], Dense(WEIGHT.half()), FORMS["half"])),
}


@pytest.mark.parametrize("form", [*FORMS.values(), *NESTED.values()], ids=[*FORMS, *NESTED])
def test_the_stored_form_comes_back_from_the_resident_one(form: Form) -> None:
    resident = form.resident()
    assert "Sparse" not in resident.formula
    torch.testing.assert_close(resident.dense(), form.dense())
    again = form.without_values().stored(resident)
    assert again.describe() == form.describe()
    for name, tensor in form.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


def test_kept_zeros_come_back() -> None:
    form = Sparse.from_dense(WEIGHT * (WEIGHT > 0), RAGGED)
    again = form.without_values().stored(form.resident())
    assert again.values.shape == form.values.shape
    assert torch.equal(again.pattern.mask(), RAGGED)


def test_what_could_not_be_read_off_again_stays_sparse() -> None:
    kept = 2 * (int(RAGGED.sum()) // 2)
    mask = torch.zeros(96, dtype=torch.bool).index_fill(0, RAGGED.flatten().nonzero()[:kept, 0], True)
    scale = torch.rand(1, 2, generator=GENERATOR)
    values = Quantized.from_codes(codes(1, kept), scale, None, 4)  # groups of survivors, not of columns
    form = Sparse(Bitmap.from_mask(mask.view(6, 16)), values)
    assert form.resident() is form
    assert Dense(WEIGHT).resident().formula == "fp32"


def test_a_module_runs_the_resident_form_and_remembers_the_stored_one() -> None:
    form = FORMS["half"]
    module = CompressedLinear(form)
    module.hold_resident()
    x = torch.randn(3, 16, generator=GENERATOR)
    torch.testing.assert_close(module.float()(x), x @ form.dense().T)
    assert [tuple(t.shape) for t in module.form_tensors().values()] == [(6, 16)]
    assert sum(t.numel() for t in module.kept_beside()) == form.tensors()["pattern"].numel()
    stored = module.stored_form.tensors()
    assert torch.equal(stored["pattern"], form.tensors()["pattern"])
    assert torch.equal(stored["values_weight"].half(), form.tensors()["values_weight"])
    module.hold(Dense(WEIGHT))  # another form altogether
    assert module.stored_form is module.form
    assert module.kept_beside() == []
