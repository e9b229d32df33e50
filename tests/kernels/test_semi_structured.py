"""2:4 weights for sparse tensor cores: who gets them, and when they are packed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lmpress
from lmpress.checkpoint import use_sparse_cores
from lmpress.evaluation import resident_bytes
from lmpress.forms import CompressedLinear, Dense, Form, LowRank, Quantized, Sparse, Sum
from lmpress.kernels import SemiStructured, suits


def two_of_four(rows: int, columns: int, seed: int = 0) -> Sparse:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
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
        for given in (x, x, x.transpose(0, 1), x[0, 0], x[:0]):
            torch.testing.assert_close(linear(given), given @ form.dense(torch.bfloat16).T)
    assert len(packer.packed) == 1


@pytest.mark.parametrize("how", ["in place", "data", "another tensor", "pattern"])
def test_what_has_changed_is_packed_anew(how: str) -> None:
    form, other, packer = two_of_four(64, 128), two_of_four(64, 128, seed=1), Packer()
    linear = CompressedLinear(form, None, SemiStructured("cpu", packer))
    x = torch.randn(2, 128).bfloat16()
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    values = next(name for name in state if name != "weight")  # a pattern comes first
    new = CompressedLinear(other).state_dict()
    with torch.no_grad():
        linear(x)
        if how == "in place":
            linear.load_state_dict(new)
        elif how == "data":
            linear.get_parameter(values).data = new[values]
        elif how == "another tensor":
            linear.register_parameter(values, torch.nn.Parameter(new[values], requires_grad=False))
        else:
            linear.get_parameter("weight").copy_(new["weight"])
        torch.testing.assert_close(linear(x), x @ linear.form.dense(torch.bfloat16).T)
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
        two_of_four(64, 96),
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
    wide = Sparse(form.pattern, Dense(form.values.dense()))
    SemiStructured("cpu", packer)(wide, torch.randn(2, 128))
    assert not packer.packed


def test_a_loaded_model_runs_on_them_and_saves_the_same_files(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = {"calibration": {"samples": 4, "seq_len": 32}, "steps": [{"sparsify": {"pattern": "2:4"}}]}
    lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
    model = lmpress.load(tmp_path / "out", dtype=torch.bfloat16)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
    model.save_pretrained(tmp_path / "dense")
    packer = Packer()
    use_sparse_cores(model, lambda form: "2:4" in form.formula, lambda: SemiStructured("cpu", packer), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)
    fitting = [m for m in model.modules() if isinstance(m, CompressedLinear) and m.in_features == 64]
    assert len(packer.packed) == len(fitting) == 12  # 6 of 7 in each of two blocks
    model.save_pretrained(tmp_path / "sparse")
    for path in (tmp_path / "dense").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "sparse" / path.name).read_bytes()
    assert resident_bytes(model) > sum(weight.nbytes for weight in packer.packed)
    model.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu() -> None:
    form = two_of_four(64, 128)
    form = form.with_tensors({name: tensor.cuda() for name, tensor in form.tensors().items()})
    assert suits(Sum((form,))) == suits(form)
    if not suits(form):
        pytest.skip("no sparse tensor cores")
    linear = CompressedLinear(form, None, SemiStructured())
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ form.dense(torch.bfloat16).T, rtol=2e-2, atol=2e-2)
    assert resident_bytes(linear) > form.num_bytes
