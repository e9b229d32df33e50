"""2:4 weights for sparse tensor cores: who gets them, and when they are packed."""

import pytest
import torch
from torch import Tensor

from lmpress.evaluation import resident_bytes
from lmpress.forms import CompressedLinear, Dense, Form, LowRank, Quantized, Sparse, Sum
from lmpress.kernels import SemiStructured, suits


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Sparse:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    kept = torch.rand(rows, columns // 4, 4, generator=generator).topk(2, dim=2).indices
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(2, kept, True).view(rows, columns)
    return Sparse.from_dense(weight, mask, (2, 4))


class Packer:
    """Stands in for torch's, which wants a GPU: half the entries, and where they were."""

    def __init__(self) -> None:
        self.packed: list[Tensor] = []

    def __call__(self, weight: Tensor) -> Tensor:
        assert bool(((weight.view(weight.shape[0], -1, 4) != 0).sum(2) <= 2).all())
        self.packed.append(weight)
        return weight


def test_it_is_packed_once_and_gives_what_the_form_gives() -> None:
    form, packer = two_of_four(64, 128), Packer()
    linear = CompressedLinear(form, None, SemiStructured("cpu", packer))
    x = torch.randn(3, 5, 128).bfloat16()
    with torch.no_grad():
        first = linear(x)
        assert first.shape == (3, 5, 64)
        torch.testing.assert_close(first, x @ form.dense(torch.bfloat16).T)
        linear(x)
        assert len(packer.packed) == 1
        linear.weight = torch.nn.Parameter(
            linear.weight.clone(), requires_grad=False
        )  # a pattern comes first
        linear(x)
        linear(x.half())
        assert [weight.dtype for weight in packer.packed] == [torch.bfloat16, torch.float16]


def test_new_values_are_packed_anew() -> None:
    form, packer = two_of_four(64, 128), Packer()
    runner = SemiStructured("cpu", packer)
    x = torch.randn(2, 128).bfloat16()
    runner(form, x)
    other = Sparse(form.pattern, Dense(-form.values.dense(x.dtype)))
    torch.testing.assert_close(runner(other, x), -(x @ form.dense(x.dtype).T))
    assert len(packer.packed) == 2


def test_the_sparse_term_of_a_sum_is_packed_and_the_other_runs_as_ever() -> None:
    sparse, packer = two_of_four(64, 128), Packer()
    low = LowRank(Dense(torch.randn(64, 4).bfloat16()), Dense(torch.randn(4, 128).bfloat16()))
    x = torch.randn(2, 128).bfloat16()
    y = SemiStructured("cpu", packer)(Sum((sparse, low)), x)
    assert len(packer.packed) == 1
    torch.testing.assert_close(y, Sum((sparse, low)).forward(x))


@pytest.mark.parametrize(
    "form",
    [
        two_of_four(48, 128),
        two_of_four(64, 64),
        Dense(torch.randn(64, 128).bfloat16()),
        Sparse.from_dense(torch.randn(64, 128).bfloat16(), torch.rand(64, 128) > 0.5),
        Sparse(
            two_of_four(64, 128).pattern,
            Quantized.from_codes(torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1), None, 4),
        ),
    ],
    ids=["rows", "columns", "dense", "bitmap", "quantized"],
)
def test_what_cannot_be_packed_runs_as_ever(form: Form) -> None:
    packer, x = Packer(), torch.randn(2, form.shape[1]).bfloat16()
    y = SemiStructured("cpu", packer)(form, x)
    torch.testing.assert_close(y, form.forward(x), rtol=0.05, atol=0.2)
    assert not packer.packed


def test_float32_and_a_cpu_are_left_alone() -> None:
    form, packer = two_of_four(64, 128), Packer()
    SemiStructured("cpu", packer)(form, torch.randn(2, 128))
    SemiStructured("cuda", packer)(form, torch.randn(2, 128).bfloat16())
    assert not packer.packed
    assert not suits(form)
    assert not suits(Sum((form,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu() -> None:
    form = two_of_four(64, 128)
    form = form.with_tensors({name: tensor.cuda() for name, tensor in form.tensors().items()})
    if not suits(form):
        pytest.skip("no sparse tensor cores")
    linear = CompressedLinear(form, None, SemiStructured())
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ form.dense(torch.bfloat16).T, rtol=2e-2, atol=2e-2)
    assert resident_bytes(linear) > form.num_bytes
