"""The contract that every form is held to, over shapes, dtypes and nestings."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpress.forms import (
    Dense,
    Form,
    LowRank,
    Pivoted,
    Quantized,
    ScaledCodes,
    Sparse,
    Sum,
    form_from_description,
)
from lmpress.forms.base import dense_leaf_names
from tests.forms.strategies import Example, examples

PROFILE = settings(max_examples=60, deadline=None)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest entry: sums of terms that cancel have no smaller unit."""
    assert actual.shape == expected.shape
    unit = float(expected.abs().max()) if expected.numel() else 0.0
    assert float((actual.double() - expected.double()).abs().max()) <= tolerance * max(unit, 1e-30)


def magnitude(form: Form) -> Tensor:
    """A bound of |partial results| for every entry: a nested form may cancel far below its parts."""
    if isinstance(form, LowRank):
        return magnitude(form.left) @ magnitude(form.right)
    if isinstance(form, Sum):
        return torch.stack([magnitude(term) for term in form.terms]).sum(0)
    return form.dense(torch.float64).abs()


@PROFILE
@given(examples())
def test_dense_is_the_definition(example: Example) -> None:
    form, bound = example.form, magnitude(example.form) + 1e-30
    assert form.shape == tuple(example.expected.shape)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        dense = form.dense(dtype)
        assert dense.dtype == dtype
        assert bool(((dense.double() - example.expected).abs() <= tolerance * bound.max()).all())


@PROFILE
@given(examples(), st.sampled_from([(), (3,), (2, 3)]))
def test_forward_agrees_with_dense(example: Example, leading: tuple[int, ...]) -> None:
    x = example.input(*leading)
    bound = float((x.abs() @ magnitude(example.form).T).max())
    y = example.form.forward(x)
    assert y.shape == (*leading, example.form.shape[0])
    assert float((y - x @ example.expected.T).abs().max()) <= 1e-12 * bound + 1e-30
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        low = example.form.forward(x.to(dtype))
        assert low.dtype == dtype
        reference = x.to(dtype).double() @ example.expected.T
        assert float((low.double() - reference).abs().max()) <= tolerance * bound + 1e-30


@PROFILE
@given(examples())
def test_num_bytes_are_the_bytes_in_the_file(example: Example) -> None:
    blob = safetensors.torch.save(example.form.tensors())
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert max(ends) == len(blob) - 8 - length == example.form.num_bytes
    weights = example.form.shape[0] * example.form.shape[1]
    assert example.form.bits_per_weight == pytest.approx(8 * max(ends) / weights)


@PROFILE
@given(examples())
def test_description_rebuilds_the_form_bit_by_bit(example: Example) -> None:
    form = example.form
    text = json.dumps(form.describe())
    empty = form_from_description(json.loads(text))
    assert empty.shape == form.shape
    assert json.dumps(empty.describe()) == text
    assert empty.formula == form.formula
    for (name, blank), (stored_name, stored) in zip(
        empty.tensors().items(), form.tensors().items(), strict=True
    ):
        assert (name, blank.shape, blank.dtype) == (stored_name, stored.shape, stored.dtype)
        assert blank.is_meta
    loaded = empty.with_tensors(safetensors.torch.load(safetensors.torch.save(form.tensors())))
    assert loaded.num_bytes == form.num_bytes
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(loaded.dense(dtype), form.dense(dtype))
    x = example.input(4, dtype=torch.float32)
    assert torch.equal(loaded.forward(x), form.forward(x))


@PROFILE
@given(examples(), st.data())
def test_rows_are_those_of_dense(example: Example, data: st.DataObject) -> None:
    rows = example.form.shape[0]
    shape = data.draw(st.sampled_from([(), (1,), (5,), (2, 3), (0,)]))
    index = torch.randint(0, rows, shape, generator=example.generator)
    picked = example.form.rows(index)
    assert picked.shape == (*shape, example.form.shape[1])
    if picked.numel():
        bound = float(magnitude(example.form).max())
        assert float((picked.double() - example.expected[index]).abs().max()) <= 1e-5 * bound + 1e-30


@PROFILE
@given(examples())
def test_rewrite_reaches_every_leaf_and_nothing_else(example: Example) -> None:
    seen: list[Form] = []

    def double(leaf: Form) -> Form:
        seen.append(leaf)
        return Dense(2 * leaf.dense(torch.float64))

    same = example.form.rewrite(lambda leaf: leaf)
    assert torch.equal(same.dense(), example.form.dense())
    rewritten = example.form.rewrite(double)
    assert rewritten.shape == example.form.shape
    assert all(isinstance(leaf, Dense | Quantized) for leaf in seen)
    names = " ".join(rewritten.tensors())
    assert "codes" not in names
    assert "zero" not in names


def every(form: Form) -> list[Form]:
    """The form, and all that it is made of."""
    return [form, *(inner for part in form.parts() for inner in every(part.form))]


@PROFILE
@given(examples())
def test_parts_make_the_whole_again(example: Example) -> None:
    for form in every(example.form):
        parts = {part.name: part.form for part in form.parts()}
        assert len(parts) == len(form.parts())
        same = form.with_parts(parts)
        assert json.dumps(same.describe()) == json.dumps(form.describe())
        assert all(torch.equal(same.tensors()[name], tensor) for name, tensor in form.tensors().items())
        if not parts:
            assert same is form


@PROFILE
@given(examples())
def test_parts_tell_how_they_reach_the_outputs(example: Example) -> None:
    """Another matrix D in the place of a part changes the whole by `through @ D @ after`, at its rows."""
    for form in every(example.form):
        parts = {part.name: part.form for part in form.parts()}
        for part in form.parts():
            change = torch.randn(part.form.shape, dtype=torch.float64, generator=example.generator)
            new = Dense(part.form.dense(torch.float64) + change)
            whole = form.with_parts(parts | {part.name: new}).dense(torch.float64)
            moved = change if part.after is None else change @ parts[part.after].dense(torch.float64)
            if part.through is not None:
                moved = part.through().double() @ moved
            expected = torch.zeros(form.shape, dtype=torch.float64)
            expected[slice(None) if part.rows is None else part.rows] = moved
            unit = float(magnitude(form).max()) + float(moved.abs().max())
            difference = whole - form.dense(torch.float64) - expected
            assert float(difference.abs().max()) <= 1e-5 * unit + 1e-12


@PROFILE
@given(examples())
def test_a_form_runs_by_whatever_runs_its_parts(example: Example) -> None:
    x, ran = example.input(3), []

    def run(form: Form, x: Tensor) -> Tensor:
        ran.append(form)
        return x @ form.dense(torch.float64).T

    y = example.form.run_by(run, x)
    bound = float((x.abs() @ magnitude(example.form).T).max())
    assert float((y - x @ example.expected.T).abs().max()) <= 1e-10 * bound + 1e-30
    assert [id(form) for form in ran] == [id(part.form) for part in example.form.parts()]


def exact(leaf: Form, weight: Tensor) -> Form:
    """A leaf that holds any matrix."""
    return Dense(weight.double())


@PROFILE
@given(examples(depth=1))
def test_an_update_is_merged_as_well_as_the_structure_allows(example: Example) -> None:
    form, (rows, columns) = example.form, example.form.shape
    update = torch.randn(rows, columns, generator=example.generator)
    if isinstance(form, Pivoted):
        with pytest.raises(ValueError, match="keep it as a term"):
            form.merged(update, exact)
        return
    merged, wanted = form.merged(update, exact), form.dense(torch.float64) + update.double()
    assert merged.shape == form.shape
    error = float((merged.dense(torch.float64) - wanted).square().sum()) ** 0.5
    least = 0.0
    if isinstance(form, LowRank):  # Eckart-Young
        assert isinstance(merged, LowRank)
        assert merged.rank == min(form.rank, rows, columns)
        least = float(torch.linalg.svdvals(wanted)[form.rank :].square().sum()) ** 0.5
    assert (
        error
        <= least + 1e-4 * (float(magnitude(form).max()) + float(update.abs().max())) * (rows * columns) ** 0.5
    )


def test_the_first_term_of_a_sum_takes_the_update() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, update = (torch.randn(6, 9, generator=generator) for _ in range(3))
    form = Sum((Dense(first), Dense(second)))
    merged = form.merged(update, exact)
    assert isinstance(merged, Sum)
    assert merged.terms[1] is form.terms[1]
    torch.testing.assert_close(merged.terms[0].dense(), first + update)


@PROFILE
@given(examples())
def test_gradients_agree_with_autograd_on_dense(example: Example) -> None:
    floats = {
        name: tensor.double().requires_grad_()
        for name, tensor in example.form.tensors().items()
        if tensor.is_floating_point()
    }
    form = example.form.with_tensors(example.form.tensors() | floats)
    x = example.input(2, 3).requires_grad_()
    direction = torch.randn(2, 3, form.shape[0], dtype=torch.float64, generator=example.generator)
    y = form.forward(x)
    wanted = [x, *floats.values()]
    fast = torch.autograd.grad((y * direction).sum(), wanted)
    plain = torch.autograd.grad((x @ form.dense(torch.float64).T * direction).sum(), wanted)
    bound = float((x.abs().max() * direction.abs().sum() * (1 + magnitude(form).max())).detach())
    for a, b in zip(fast, plain, strict=True):
        assert float((a - b).abs().sum()) <= 1e-11 * max(bound, float(b.abs().sum()))
    assert any(bool((g != 0).any()) for g in fast) or not bool(example.expected.any())


def test_gradient_of_the_scale_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [0, 5, 6, 7]])
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]], requires_grad=True)
    zero = torch.tensor([[1, 0], [2, 3]])
    form = Quantized.from_codes(codes, scale.detach(), zero, 3)
    form = form.with_tensors(form.tensors() | {"scale": scale})
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    form.forward(x).sum().backward()
    # d y_i / d scale_ig = sum over the group of (code - zero) x
    assert scale.grad is not None
    assert scale.grad.tolist() == [[0 * 1 + 1 * 10, 300 + 4000], [-2 + 30, 300 + 4000]]


@PROFILE
@given(examples())
def test_a_form_is_a_value_with_a_short_name(example: Example) -> None:
    for form in every(example.form):
        rows, columns = form.shape
        assert repr(form) == f"{form.formula}[{rows}x{columns}]"
        for field in dataclasses.fields(form):  # type: ignore[arg-type]
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(form, field.name, getattr(form, field.name))


@PROFILE
@given(examples())
def test_kept_entries_are_those_that_are_not_zero(example: Example) -> None:
    form = example.form
    assert form.mask.dtype == torch.bool
    if not isinstance(form, Sparse):
        assert torch.equal(form.mask, form.dense() != 0)
        assert form.density == pytest.approx(float((form.dense() != 0).double().mean()))


def test_of_no_entries_none_are_kept() -> None:
    assert Dense(torch.zeros(0, 4)).density == 0.0
    assert Dense(torch.ones(3, 4)).density == 1.0


def test_bits_of_a_value() -> None:
    codes = torch.zeros(4, 2, dtype=torch.int8)
    assert Quantized.from_codes(codes, torch.ones(4, 1), None, 3).nominal_bits == 3.0
    assert Dense(torch.ones(2, 3)).nominal_bits == 16.0


def test_codes_scales_and_indices_are_no_weights() -> None:
    codes = Quantized.from_codes(torch.zeros(4, 2, dtype=torch.int8), torch.ones(4, 1), None, 4)
    assert dense_leaf_names(codes) == set()
    assert dense_leaf_names(Dense(torch.ones(2, 3))) == {"weight"}
    mixed = LowRank(codes, Dense(torch.ones(2, 3)))
    assert dense_leaf_names(mixed) == {"right_weight"}
    sparse = Sparse.from_dense(torch.ones(4, 3), torch.eye(4, 3) > 0)
    assert dense_leaf_names(Sum((sparse, mixed))) == {
        name for name, tensor in Sum((sparse, mixed)).tensors().items() if tensor.is_floating_point()
    } - {"term1_left_scale"}


def nested(depth: int) -> list[object]:
    return [nested(depth - 1)] if depth else []


DENSE = {"form": "dense", "shape": [1, 1], "dtype": "float32"}
INT8 = {
    "form": "quantized",
    "shape": [1, 1],
    "bits": 8,
    "symmetric": True,
    "scale_shape": [1, 1],
    "scale_dtype": "float32",
}
BITMAP = {"kind": "bitmap", "kept": 1}
EMPTY_SCALE = {"scale_shape": [1, 0], "scale_dtype": "float32"}


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"form": "quantum", "shape": [1, 1]}, "unknown form 'quantum'"),
        ({"shape": [1, 1]}, "unknown form None"),
        ({"form": "dense", "shape": [1, 1]}, "lacks 'dtype'"),
        ({"form": "dense", "shape": [1, -1], "dtype": "float32"}, "two whole numbers"),
        ({"form": "dense", "shape": [1, 2, 3], "dtype": "float32"}, "two whole numbers"),
        ({"form": "dense", "shape": "ab", "dtype": "float32"}, "two whole numbers"),
        ({"form": "dense", "shape": [1, 1], "dtype": ["float32"]}, "no floating-point type"),
        ({"form": ["dense"]}, "unknown form"),
        ({"form": "sum", "shape": [1, 1], "terms": 3}, "is broken"),
        ({"form": "sum", "shape": [1, 1], "terms": [3]}, "is an object"),
        ({"form": "dense", "shape": [1, 1], "dtype": "int8"}, "no floating-point type"),
        ({"form": "sum", "shape": [1, 1], "terms": []}, "at least one term"),
        (DENSE | {"shape": [True, 1]}, "two whole numbers"),
        (DENSE | {"shape": [1.0, 1]}, "two whole numbers"),
        (DENSE | {"shape": [1 << 31, 1]}, "two whole numbers"),
        (DENSE | {"shape": [1 << 30, 1 << 30]}, "no matrix has"),
        ({"form": "sum", "shape": [1, 2], "terms": [DENSE]}, "described as one of"),
        ({"form": "sum", "shape": [1, 1], "terms": [DENSE], "x": nested(40)}, "levels"),
        (INT8 | {"bits": "8"}, "bits is a whole number"),
        (INT8 | {"bits": float("inf")}, "bits is a whole number"),
        (INT8 | {"symmetric": "no"}, "true or false"),
        (INT8 | {"scale_shape": [1, 1, 1]}, "scale_shape is two"),
        ({"form": "sparse", "shape": [1, 1], "pattern": BITMAP | {"kept": -1}, "values": DENSE}, "kept"),
        (
            {"form": "sparse", "shape": [1, 1], "pattern": BITMAP, "values": DENSE, **EMPTY_SCALE},
            "do not fit",
        ),
    ],
)
def test_a_broken_description_is_refused(description: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        form_from_description(description)


@pytest.mark.parametrize(
    "changed", [{"bits": 9}, {"bits": 1}, {"scale_shape": [1, 2]}, {"scale_shape": [3, 3]}]
)
def test_a_broken_grid_is_refused(changed: dict[str, object]) -> None:
    description = Quantized.from_codes(
        torch.zeros(3, 4, dtype=torch.int8), torch.ones(3, 2), None, 4
    ).describe()
    form_from_description(description)
    with pytest.raises(ValueError, match=r"bits|scales"):
        form_from_description(description | changed)


def test_tensors_from_a_file_are_those_that_the_form_describes() -> None:
    form = Dense(torch.ones(2, 3))
    assert torch.equal(form.loaded({"weight": torch.zeros(2, 3)}).dense(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="missing"):
        form.loaded({})
    with pytest.raises(ValueError, match=r"float32 \(3, 2\) instead of float32 \(2, 3\)"):
        form.loaded({"weight": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="int64"):
        form.loaded({"weight": torch.ones(2, 3, dtype=torch.int64)})


def test_a_pattern_that_keeps_other_entries_is_damaged() -> None:
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    weight = torch.ones(2, 4)
    for form in (Sparse.from_dense(weight, mask), Sum((Sparse.from_dense(weight, mask),))):
        form.check()
        first, packed = next(iter(form.tensors().items()))
        with pytest.raises(ValueError, match="keeps 5 entries instead of 4"):
            form.loaded(form.tensors() | {first: packed | torch.tensor([[0b1000], [0]], dtype=torch.uint8)})
    pairs = Sparse.from_dense(weight, mask, (2, 4))
    with pytest.raises(ValueError, match="no 2 of 4 entries"):
        pairs.loaded(pairs.tensors() | {"pattern": torch.full((2, 3), 1, dtype=torch.uint8)})


def test_an_index_of_other_pivots_is_damaged() -> None:
    form = Pivoted.from_parts(
        Dense(torch.ones(1, 3)), Dense(torch.ones(2, 1)), torch.tensor([True, False, False])
    )
    damaged = form.tensors() | {"index": torch.tensor([[0b11]], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="names 2 pivot rows instead of 1"):
        LowRank(Dense(torch.ones(2, 3)), form).loaded(
            {"left_weight": torch.ones(2, 3)} | {f"right_{name}": tensor for name, tensor in damaged.items()}
        )


@pytest.mark.parametrize(
    ("name", "at", "value"), [("starts", 0, 1), ("starts", 1, 99), ("overflow", 0, -1), ("overflow", 0, 8)]
)
def test_places_of_excess_that_are_damaged(name: str, at: int, value: int) -> None:
    codes = torch.zeros(16, 8, dtype=torch.int32)
    codes[3, 2], codes[9, 7] = 300, -300
    form = ScaledCodes(codes, torch.ones(1, 1), torch.ones(1, 1)).compact()
    form.check()
    tensors = {key: tensor.clone() for key, tensor in form.tensors().items()}
    tensors[name][at] = value
    with pytest.raises(ValueError, match="damaged"):
        form.loaded(tensors)
