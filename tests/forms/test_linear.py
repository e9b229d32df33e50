"""`CompressedLinear` and `CompressedEmbedding`: parameters, loading, moving, gradients, runners."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lmpress.forms import (
    CompressedEmbedding,
    CompressedLinear,
    Dense,
    Form,
    LowRank,
    Quantized,
    Sparse,
    Sum,
)
from tests.forms.strategies import Example, examples

GENERATOR = torch.Generator().manual_seed(7)


def grid(bits: int = 4) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 16), generator=generator).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Quantized.from_codes(codes, torch.rand(6, 2, generator=generator) + 0.5, None, bits)


@settings(max_examples=30, deadline=None)
@given(examples())
def test_the_first_tensor_is_weight_and_loading_rebinds(example: Example) -> None:
    form = example.form
    module = CompressedLinear(form, torch.zeros(form.shape[0]))
    names = list(form.tensors())
    assert [*module.form_tensors()] == ["weight", *names[1:]]
    state = module.state_dict()
    assert next(iter(state)) == "weight"
    assert state["weight"].shape == form.tensors()[names[0]].shape
    assert not any(p.requires_grad for p in module.form_tensors().values())

    blank = form.with_tensors({name: torch.zeros_like(t) for name, t in form.tensors().items()})
    x = example.input(3, dtype=torch.float32)
    with torch.no_grad():
        for assign in (False, True):
            other = CompressedLinear(copy.deepcopy(blank), torch.ones(form.shape[0]))
            other.form.describe()  # binds to the blank parameters first
            other.load_state_dict(state, assign=assign)
            assert torch.equal(other(x), module(x))
            assert torch.equal(other.form.dense(), form.dense())


def test_a_form_from_a_description_is_loaded_into() -> None:
    form = grid()
    with torch.device("meta"):
        module = CompressedLinear(type(form).from_description(form.describe()))
    module.load_state_dict(CompressedLinear(form).state_dict(), assign=True)
    assert torch.equal(module.form.dense(), form.dense())


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_dense_file_does_not_load_into_packed_shapes(bits: int) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        CompressedLinear(grid(bits)).load_state_dict(
            {"weight": torch.zeros(6, 16), "scale": torch.ones(6, 2)}
        )


def test_a_replaced_parameter_rebinds() -> None:
    module = CompressedLinear(grid())
    before = module.form.dense()
    module.scale = nn.Parameter(2 * module.scale.data, requires_grad=False)
    assert torch.equal(module.form.dense(), 2 * before)
    module.scale.data.mul_(2)
    assert torch.equal(module.form.dense(), 4 * before)


def test_the_form_is_bound_once() -> None:
    module = CompressedLinear(grid())
    assert module.form is module.form


def test_no_thread_sees_the_form_of_another_threads_half_done_binding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = CompressedLinear(grid())
    doubled = 2 * module.form.dense()
    module.scale = 2 * module.scale
    binding, go_on, bind = threading.Event(), threading.Event(), Quantized.with_tensors

    def slowly(form: Quantized, tensors: Mapping[str, Tensor]) -> Quantized:
        if not binding.is_set():  # the other thread, which comes first
            binding.set()
            assert go_on.wait(30)
        return bind(form, tensors)

    monkeypatch.setattr(Quantized, "with_tensors", slowly)
    with ThreadPoolExecutor(1) as other:
        late = other.submit(lambda: module.form)
        assert binding.wait(30)
        mine = module.form
        go_on.set()
        assert torch.equal(mine.dense(), doubled)
        assert torch.equal(late.result().dense(), doubled)


def test_many_threads_run_a_module_whose_scale_changes() -> None:
    module, x = CompressedLinear(grid()), torch.ones(1, 16)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        for factor in range(1, 30):
            module.scale = torch.full_like(module.scale, float(factor))
            expected = factor * grid().codes().float().sum(1)
            for y in pool.map(module, [x] * 8):
                torch.testing.assert_close(y[0], expected)


def test_the_output_of_a_frozen_module_may_be_written_into() -> None:
    module = CompressedLinear(grid(), runner=lambda form, x: (x @ form.dense().T).view(x.shape[0], -1))
    x = torch.randn(2, 3, 16, generator=GENERATOR, requires_grad=True)
    y = module(x)
    y += 1  # as AdaLoRA does
    y.sum().backward()
    torch.testing.assert_close(x.grad, grid().dense().sum(0).expand(2, 3, 16))


def test_weights_off_the_pattern_are_stored_with_all_the_rest() -> None:
    weight = torch.randn(6, 16, generator=GENERATOR)
    sparse = Sparse.from_dense(weight, weight.abs() > 0.5)
    module = CompressedLinear(Sum((sparse, LowRank(Dense(weight[:, :2]), Dense(weight[:2])))))
    module.hold_resident()
    on_pattern = module.form.dense()
    assert module.stored_form.formula.startswith("Sparse")
    module.form.tensors()["term0_weight"][weight.abs() > 0.5] *= 2
    assert module.stored_form.formula.startswith("Sparse")
    module.form.tensors()["term0_weight"] += 1
    assert not torch.equal(module.form.dense(), on_pattern)
    assert torch.equal(module.stored_form.dense(), module.form.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype_casts_weights_and_leaves_grids(dtype: torch.dtype) -> None:
    left = torch.randn(4, 6, generator=GENERATOR)
    module = CompressedLinear(LowRank(Dense(left), grid()), torch.ones(4))
    before = module.form.dense()  # bound before it moves
    x = torch.randn(3, 16, generator=GENERATOR)
    module.to(dtype)
    assert module.weight.dtype == module.bias.dtype == module(x.to(dtype)).dtype == dtype
    after = module.form.tensors()
    for name, tensor in grid().tensors().items():  # another type of scale would be another grid
        assert after[f"right_{name}"].dtype == tensor.dtype
        assert torch.equal(after[f"right_{name}"], tensor)
    torch.testing.assert_close(module.form.dense(), left.to(dtype).float() @ grid().dense())
    torch.testing.assert_close(module.form.dense(), before, rtol=0.05, atol=0.2)


def test_a_copy_is_independent() -> None:
    module = CompressedLinear(grid())
    before = module.form.dense().clone()
    twin = copy.deepcopy(module)
    twin.scale.data.mul_(3)
    assert torch.equal(module.form.dense(), before)
    torch.testing.assert_close(twin.form.dense(), 3 * before)


def test_hold_swaps_the_tensors() -> None:
    module = CompressedLinear(grid(), torch.ones(6))
    left, right = torch.randn(4, 2, generator=GENERATOR), torch.randn(2, 16, generator=GENERATOR)
    module.hold(LowRank(Dense(left), Dense(right)))
    assert set(module.state_dict()) == {"weight", "right_weight", "bias"}
    assert (module.out_features, module.in_features) == (4, 16)
    torch.testing.assert_close(module.form.dense(), left @ right)


def test_it_is_an_nn_linear_with_a_bias() -> None:
    weight, bias = torch.randn(6, 16, generator=GENERATOR), torch.randn(6, generator=GENERATOR)
    x = torch.randn(2, 3, 16, generator=GENERATOR)
    module = CompressedLinear(Dense(weight), bias)
    assert isinstance(module, nn.Linear)
    torch.testing.assert_close(module(x), torch.nn.functional.linear(x, weight, bias))
    module.reset_parameters()
    assert torch.equal(module.weight, weight)


def test_the_runner_serves_whatever_trains_no_tensor_of_the_form() -> None:
    calls: list[str] = []

    def runner(form: Form, x: Tensor) -> Tensor:
        calls.append("runner")
        return (x.detach() @ form.dense().T).detach()  # as a kernel: without a graph

    module = CompressedLinear(grid(), runner=runner)
    x = torch.randn(2, 3, 16, generator=GENERATOR)
    reference = module(x)
    with torch.no_grad():
        assert torch.equal(module(x.requires_grad_()), reference)
    y = module(x)
    torch.testing.assert_close(y, reference)
    assert calls == ["runner"] * 3
    direction = torch.randn(2, 3, 6, generator=GENERATOR)
    (y * direction).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, direction @ grid().dense())
    module.scale.requires_grad_()
    torch.testing.assert_close(module(x), reference)
    assert calls == ["runner"] * 3


def test_a_trained_scale_gets_its_gradient_through_the_module() -> None:
    module = CompressedLinear(grid(), runner=lambda form, x: x @ form.dense().detach().T)
    module.scale.requires_grad_()
    x = torch.randn(5, 16, generator=GENERATOR)
    module(x).sum().backward()
    scale = module.scale.detach().clone().requires_grad_()
    codes = grid().codes().float()
    (x @ (codes * scale.repeat_interleave(8, dim=1)).T).sum().backward()
    assert module.scale.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(module.scale.grad, scale.grad)


@settings(max_examples=30, deadline=None)
@given(examples(depth=1))
def test_embedding_looks_rows_up(example: Example) -> None:
    module = CompressedEmbedding(example.form)
    rows = example.form.shape[0]
    index = torch.randint(0, rows, (2, 4), generator=example.generator)
    torch.testing.assert_close(module(index), example.form.dense()[index])
    assert (module.num_embeddings, module.embedding_dim) == example.form.shape
    assert next(iter(module.state_dict())) == "weight"


def test_embedding_follows_the_dtype_and_scales_as_gemma_does() -> None:
    table = torch.randn(5, 16, generator=GENERATOR)
    module = CompressedEmbedding(Dense(table), scale=16**0.5 + 0.001).to(torch.bfloat16)
    index = torch.tensor([[0, 4]])
    out = module(index)
    assert out.dtype == module.dtype == torch.bfloat16
    rounded = torch.tensor(16**0.5 + 0.001, dtype=torch.bfloat16)
    assert torch.equal(out, table.bfloat16()[index] * rounded)
