"""`module.weight` of a form that is no plain matrix: it tells of itself, and computes nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmpress.forms import CompressedEmbedding, CompressedLinear, Dense, Form, LowRank, Quantized, Sum
from lmpress.forms.packed import PackedWeight


def grid(bits: int = 4) -> Quantized:
    codes = torch.randint(-4, 4, (6, 16), generator=torch.Generator().manual_seed(0))
    return Quantized.from_codes(codes, torch.ones(6, 2), None, bits)


def factors() -> LowRank:
    return LowRank(Dense(torch.ones(6, 6)), Dense(torch.ones(6, 16)))


FORMS: dict[str, Callable[[], Form]] = {
    "int4": grid,
    "int8": lambda: grid(8),
    "factors": factors,
    "sum": lambda: Sum((Dense(torch.ones(6, 16)), factors())),
}


def write(w: Any) -> None:
    w += 1


COMPUTING: dict[str, Callable[[Any], Any]] = {
    "add in place, as a merge does": lambda w: w.data.add_(1),
    "+=": write,
    "+= on data": lambda w: write(w.data),
    "copied first, as a safe merge does": lambda w: w.data.clone(),
    "another type": lambda w: w.to(torch.float64),
    "float": lambda w: w.bfloat16(),
    "no other type": lambda w: w.to(w.dtype) * 2,
    "detached": lambda w: w.detach().sum(),
    "an operand of another": lambda w: torch.ones(6, 16) + w,
    "a keyword": lambda w: nn.functional.linear(torch.ones(2, 16), weight=w),
    "rows": lambda w: w[:2],
    "transposed": lambda w: w.T,
    "unpacked sizes": lambda w: w.size(),
    "a matrix copied in": lambda w: w.copy_(torch.zeros(6, 1)),
    "replaced data": lambda w: setattr(w, "data", torch.zeros(3, 3)),
    "norm": torch.linalg.norm,
}


@pytest.mark.parametrize("how", list(COMPUTING))
@pytest.mark.parametrize("kind", list(FORMS))
def test_what_computes_says_to_dequantize_first_and_changes_nothing(kind: str, how: str) -> None:
    module = CompressedLinear(FORMS[kind]())
    before = module.form.dense().clone()
    with pytest.raises(ValueError, match=r"call model\.dequantize\(\) first"):
        COMPUTING[how](module.weight)
    assert torch.equal(module.form.dense(), before)


@pytest.mark.parametrize("kind", list(FORMS))
def test_it_tells_of_the_parameter_behind_it(kind: str) -> None:
    module = CompressedLinear(FORMS[kind]())
    weight, parameter = module.weight, dict(module.named_parameters())["weight"]
    assert isinstance(weight, nn.Parameter)
    assert weight is module.weight
    assert weight.shape == parameter.shape
    assert weight.dtype == parameter.dtype
    assert weight.device == parameter.device
    assert weight.data_ptr() == parameter.data_ptr()
    assert weight.to("cpu") is weight.to(weight.dtype) is weight.data is weight.detach() is weight
    assert weight.to("meta").is_meta
    assert torch.empty_like(weight, device="meta").shape == parameter.shape
    assert repr(weight) == repr(parameter)
    parameter.mark = True
    assert weight.mark


@pytest.mark.parametrize("kind", list(FORMS))
def test_it_is_taken_for_a_matrix_and_not_for_a_convolution(kind: str) -> None:
    assert (
        CompressedLinear(FORMS[kind]()).weight.ndim == CompressedLinear(FORMS[kind]()).weight.data.ndim == 2
    )


def test_a_dense_form_is_its_matrix() -> None:
    module = CompressedLinear(Dense(torch.ones(6, 16)))
    assert module.weight is dict(module.named_parameters())["weight"]
    module.weight.data += 1
    assert torch.equal(module.form.dense(), torch.full((6, 16), 2.0))


def test_a_view_that_was_registered_past_the_module_is_found_out() -> None:
    module, x = CompressedLinear(grid()), torch.ones(2, 16)
    before = module(x)
    for look in (lambda: module(x), module.state_dict, lambda: module.weight):
        module._parameters["weight"] = module.weight.to("cpu")  # as accelerate does
        look()
        assert not isinstance(module._parameters["weight"], PackedWeight)
    assert torch.equal(module(x), before)


def test_what_is_set_is_the_parameter_and_not_its_view() -> None:
    module, other = CompressedLinear(grid()), CompressedLinear(grid())
    other.weight = module.weight
    assert dict(other.named_parameters())["weight"] is dict(module.named_parameters())["weight"]
    assert other.weight is module.weight


@pytest.mark.parametrize("load", [lambda w, new: w.copy_(new), lambda w, new: setattr(w, "data", new)])
def test_who_loads_it_whole_may_write(load: Callable[[Any, Tensor], Any]) -> None:
    module = CompressedLinear(grid())
    load(module.weight, torch.zeros_like(module.form.tensors()["codes"]))
    assert not dict(module.named_parameters())["weight"].any()
    assert not module.form.tensors()["codes"].any()


def test_the_codes_train_never_and_the_factors_may() -> None:
    codes, factored = CompressedLinear(grid()), CompressedLinear(factors())
    for train in (
        lambda: codes.requires_grad_(True),
        lambda: codes.weight.requires_grad_(True),
        lambda: setattr(codes.weight, "requires_grad", True),
        lambda: [setattr(p, "requires_grad", True) for p in codes.parameters()],
    ):
        with pytest.raises(ValueError, match=r"cannot be trained: call model\.dequantize"):
            train()
    codes.requires_grad_(False)
    codes.weight.requires_grad = False
    factored.weight.requires_grad = True
    factored(torch.ones(2, 16)).sum().backward()
    assert factored.weight.grad is not None


@pytest.mark.parametrize("kind", list(FORMS))
def test_a_module_whose_weight_was_looked_at_is_copied_and_pickled(kind: str) -> None:
    module = CompressedLinear(FORMS[kind]())
    assert module.weight.ndim
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert twin.weight is not module.weight
        assert torch.equal(twin.form.dense(), module.form.dense())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    module.load_state_dict(torch.load(file, weights_only=True))


def test_tied_modules_have_one_weight() -> None:
    table = CompressedEmbedding(grid())
    head = CompressedLinear(table.form)
    head.share(table)
    assert head.weight is table.weight


def test_moving_leaves_nothing_of_the_old_weight_behind() -> None:
    module = CompressedLinear(grid())
    old: Tensor = module.weight
    module.to("meta")
    assert module.weight.is_meta
    assert module.weight is not old or old.is_meta
