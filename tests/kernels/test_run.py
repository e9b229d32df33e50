"""`run` against the matrix that a form stands for, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lmpress.forms import (
    CompressedEmbedding,
    CompressedLinear,
    Dense,
    EntropyCoded,
    Form,
    LowRank,
    Quantized,
    ScaledCodes,
    Sum,
)
from lmpress.kernels import TABLE, attach, floating, integer, run, scratch

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-13}
FLOATS = list(TOLERANCE)
SHAPES = {"odd": (5, 17, 17), "even": (24, 64, 16), "groups of one": (3, 9, 1)}  # (out, in, group)


def quantized(
    shape: tuple[int, int],
    bits: int = 8,
    symmetric: bool = True,
    granularity: str = "channel",
    group: int = 16,
    seed: int = 0,
) -> Quantized:
    """Random codes on a random grid."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    grid = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, columns // group)}[granularity]
    scale = torch.rand(grid, generator=generator) + 0.1
    low = -(1 << bits - 1) if symmetric else 0
    codes = torch.randint(low, low + (1 << bits), shape, generator=generator)
    zero = None if symmetric else torch.randint(0, 1 << bits, grid, generator=generator)
    return Quantized.from_codes(codes, scale, zero, bits)


KINDS = ["bytes", "overflow", "one scale", "int16", "int32"]


def scaled_codes(shape: tuple[int, int], kind: str = "overflow", seed: int = 0) -> ScaledCodes:
    """Random codes between two random scales; of `overflow` one in 99 is beyond a byte."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    largest = {"int16": 3000, "int32": 10**6}.get(kind, 127)
    codes = torch.randint(-largest, largest + 1, shape, generator=generator)
    if kind in ("overflow", "one scale"):
        codes[torch.arange(rows * columns).view(shape) % 99 == 7] *= 40
    grids = [(1, 1), (1, 1)] if kind == "one scale" else [(rows, 1), (1, columns)]
    row_scale, column_scale = ((torch.rand(grid, generator=generator) + 0.1).half() for grid in grids)
    row_scale = row_scale.float() * (127 / largest)
    dtype = torch.int16 if kind == "int16" else torch.int32
    return ScaledCodes(codes.to(dtype), row_scale, column_scale).compact()


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(form: Form, x: Tensor, y: Tensor) -> float:
    """Relative error of y against the exact product; 0 where both are empty."""
    expected = x.double() @ form.dense(torch.float64).T
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.fixture(params=["integers", "floats"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways that a float32 product of small matrices can take; by itself it takes the second."""
    if request.param == "integers":
        if not integer.has_exact_int8():
            pytest.skip("this CPU has no fast and exact int8 products")
        monkeypatch.setattr(integer, "SMALL", -1)
    if request.param == "floats":
        monkeypatch.setattr(integer, "has_exact_int8", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product(way: str, bits: int, symmetric: bool, granularity: str, shape: str) -> None:
    rows, columns, group = SHAPES[shape]
    form = quantized((rows, columns), bits, symmetric, granularity, group)
    for dtype in FLOATS:
        for batch in ((columns,), (0, columns), (1, columns), (3, columns), (65, columns), (2, 1, columns)):
            x = activations(*batch, dtype=dtype)
            assert error(form, x, run(form, x)) < TOLERANCE[dtype], (dtype, batch)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_the_size_of_a_real_layer(bits: int, symmetric: bool, granularity: str, tokens: int) -> None:
    form = quantized((600, 576), bits, symmetric, granularity, 64)
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(tokens, 576, dtype=dtype)
        assert error(form, x, run(form, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 17), (24, 64), (40, 96), (1, 200), (0, 16), (16, 0)])
def test_scaled_codes(way: str, kind: str, shape: tuple[int, int]) -> None:
    form = scaled_codes(shape, kind)
    if shape[0] * shape[1] > 100:
        assert form.codes.dtype == getattr(torch, kind, torch.int8)
        assert (form.overflow is None) == (kind not in ("overflow", "one scale"))
    for dtype in FLOATS:
        for batch in ((), (0,), (1,), (3,), (65,), (2, 1)):
            x = activations(*batch, shape[1], dtype=dtype)
            assert error(form, x, run(form, x)) < TOLERANCE[dtype], (dtype, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_scaled_codes_of_a_real_layer(kind: str, tokens: int) -> None:
    form = scaled_codes((600, 576), kind)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = activations(tokens, 576, dtype=dtype)
        assert error(form, x, run(form, x)) < TOLERANCE[dtype]
    if kind == "overflow" and integer.has_exact_int8():
        x = activations(tokens, 576)
        assert error(form, x, run(form, x)) < 2e-7


@pytest.mark.parametrize("tokens", [1, 65])
def test_entropy_coded_is_its_resident_form(tokens: int) -> None:
    resident = scaled_codes((40, 64))
    scales = resident.row_scale, resident.column_scale
    form = EntropyCoded.from_codes(resident.whole_codes(torch.int64), *scales, chunk_size=300)
    x = activations(tokens, 64)
    both = Sum((LowRank(Dense(torch.eye(40)), form), Dense(torch.ones(40, 64))))
    assert torch.equal(run(form, x), run(resident, x))
    assert error(both, x, run(both, x)) < 2e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_dense(dtype: torch.dtype, stored: torch.dtype) -> None:
    form = Dense(activations(7, 33, dtype=stored))
    x = activations(5, 33, dtype=dtype)
    assert error(form, x, run(form, x)) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 65])
def test_nested(way: str, tokens: int) -> None:
    product = LowRank(quantized((20, 16), 4, False), quantized((16, 64), 8, True, "group", seed=2))
    inner = LowRank(Dense(activations(20, 4, seed=3)), Sum((quantized((4, 64), 3), quantized((4, 64), 8))))
    form = Sum((product, quantized((20, 64), 8, seed=4), inner))
    x = activations(tokens, 64)
    assert error(form, x, run(form, x)) < 2e-6


class Negated(Dense):
    """A form that the table does not know, though its parent is in it."""

    @property
    def storage(self) -> str:
        return "negated"

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return -self.weight.to(dtype)


def test_an_unknown_form_runs_plainly() -> None:
    form = Sum((Negated(activations(6, 9)), Dense(activations(6, 9, seed=2))))
    x = activations(4, 9)
    assert error(form, x, run(form, x)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_costs_the_others_little(way: str, tokens: int, bits: int) -> None:
    """An activation of 3000 among ones of 1, on a column of zeros: what is left is 1e-5 of its own size."""
    columns = 64
    codes = torch.randint(-8, 8, (40, columns), generator=torch.Generator().manual_seed(0))
    codes[:, 7] = 0
    form = Quantized.from_codes(codes, torch.ones(40, 1), None, bits)
    x = activations(tokens, columns)
    x[:, 7] = 3000.0
    assert error(form, x, run(form, x)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_of_any_magnitude(way: str, tokens: int) -> None:
    form = quantized((40, 64), 8)
    for size in (0.0, 1e-25, 1e-6, 1e30):
        x = activations(tokens, 64) * size
        assert error(form, x, run(form, x)) < 1e-6, size
    mixed = activations(4, 64) * torch.tensor([[1e-20], [0.0], [1e10], [1.0]])
    y = run(form, mixed)
    for i in range(4):
        assert error(form, mixed[i], y[i]) < 1e-6


def test_what_is_no_number_stays_in_its_row(way: str) -> None:
    x = activations(3, 64)
    x[1, 5] = math.nan
    y = run(quantized((40, 64)), x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("limit", [1, 200, 4096])
def test_parts_and_old_content_of_buffers(
    monkeypatch: pytest.MonkeyPatch, way: str, granularity: str, bits: int, symmetric: bool, limit: int
) -> None:
    """Rows longer than the buffers, or only some of them; and buffers full of what was there before."""
    parts_and_old_content(monkeypatch, quantized((33, 64), bits, symmetric, granularity), limit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 200, 4096])
def test_parts_of_scaled_codes(monkeypatch: pytest.MonkeyPatch, way: str, kind: str, limit: int) -> None:
    parts_and_old_content(monkeypatch, scaled_codes((33, 64), kind), limit)


def parts_and_old_content(monkeypatch: pytest.MonkeyPatch, form: Form, limit: int) -> None:
    x, buffers = activations(9, 64), scratch._Buffers()
    monkeypatch.setattr(scratch, "_buffers", buffers)
    monkeypatch.setattr(scratch, "LIMIT", limit)
    for batch in (x, x[:1], x.bfloat16(), x[:1].bfloat16()):
        first = run(form, batch)
        assert error(form, batch, first) < TOLERANCE[batch.dtype]
        for buffer in buffers.bytes.values():
            buffer.fill_(0xFF)  # not a number, in every floating-point type
        assert torch.equal(run(form, batch), first)
    assert all(buffer.numel() == limit for buffer in buffers.bytes.values())


def test_results_are_nobody_elses_memory(way: str) -> None:
    form, x = quantized((40, 64)), activations(3, 64)
    for batch in (x, x[:1]):
        first = run(form, batch)
        kept = first.clone()
        run(form, -2 * batch)
        assert torch.equal(first, kept)


def test_two_threads_at_once(way: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    forms = [
        quantized((200 + 10 * i, 64), (4, 8)[i % 2], True, ("channel", "group")[i // 4]) for i in range(8)
    ]
    x = activations(20, 64)
    with torch.no_grad():
        expected = [run(form, x) for form in forms]

        def repeated(i: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(run(forms[i], x), expected[i]) for _ in range(30))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(repeated, range(8)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_mode_after_any_mode(way: str, mode: Callable[[], torch.no_grad]) -> None:
    """A buffer made in one mode is written to in another."""
    form, x = quantized((40, 64), 4, True, "group"), activations(3, 64)
    with mode():
        first = run(form, x)
    for other in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with other():
            assert torch.equal(run(form, x), first)
            assert not run(form, x).requires_grad


def test_gradients_where_they_are_wanted() -> None:
    form = quantized((40, 64), 8)
    x = activations(3, 64).requires_grad_()
    run(form, x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, form.dense().sum(0).expand(3, -1))
    whole = scaled_codes((40, 64))
    x = activations(3, 64).requires_grad_()
    run(whole, x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, whole.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-2)
    form.scale.requires_grad_()
    run(LowRank(Dense(torch.eye(40)), form), x.detach()).sum().backward()  # type: ignore[no-untyped-call]
    assert form.scale.grad is not None


def test_autocast_is_heeded() -> None:
    form, x = Dense(activations(40, 64)), activations(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(form, x).dtype == torch.bfloat16
        assert torch.equal(run(quantized((40, 64)), x), quantized((40, 64)).forward(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_cuda(granularity: str) -> None:
    form = quantized((40, 64), 4, False, granularity)
    moved = form.with_tensors({name: tensor.cuda() for name, tensor in form.tensors().items()})
    x = activations(3, 64)
    assert error(form, x, run(moved, x.cuda()).cpu()) < 1e-5


def test_strided_activations(way: str) -> None:
    wide = activations(6, 128)
    form = quantized((40, 64))
    for x in (wide[:, ::2], wide[:1, 64:], wide[::2, ::2], wide.T[:64].T, wide[0, ::2]):
        assert error(form, x, run(form, x)) < 1e-6


def test_integers_are_nearer_than_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    if not integer.has_exact_int8():
        pytest.skip("this CPU has no fast and exact int8 products")
    form, x = quantized((600, 1536)), activations(4, 1536)
    exact = error(form, x, run(form, x))
    assert exact < 1.5e-7
    assert exact < error(form, x, floating.run_quantized(form, x))


def test_digits_are_the_activations() -> None:
    x = activations(5, 40)
    for batch in (x, x[:1]):
        digits, unit = integer.split(batch)
        planes = digits.view(4, -1, 40) if digits.is_contiguous() else digits.reshape(4, -1, 40)
        powers = torch.tensor([1.0, 2.0**8, 2.0**16, 2.0**24], dtype=torch.float64)
        back = (planes.double() * powers[:, None, None]).sum(0) * unit.double()
        bound = unit.double() + 2.0**-23 * batch.double().abs()
        assert ((back - batch.double()).abs() <= bound).all()


def test_the_table_is_complete() -> None:
    kinds, floats = {key[1] for key in TABLE}, {key[2] for key in TABLE}
    assert set(TABLE) == {("cpu", kind, dtype) for kind in kinds for dtype in floats}


def test_attach() -> None:
    form = quantized((40, 64))
    bias = activations(40)
    table = CompressedEmbedding(quantized((40, 64)))
    model = nn.Sequential(table, CompressedLinear(form, bias), nn.Linear(40, 2))
    assert attach(model) is model
    assert model[1].runner is run
    assert not hasattr(table, "runner")
    x = activations(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(model[1](x), x @ form.dense().T + bias, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("offset", [1, 8, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (61, 576)])
def test_codes_may_begin_at_any_address(shape: tuple[int, int], dtype: torch.dtype, offset: int) -> None:
    """As they do in a mapped file; torch's own product of bfloat16 with int8 codes would crash."""
    size = shape[0] * shape[1]
    codes = torch.empty(size + 64, dtype=torch.int8)[offset : offset + size].view(shape)
    codes.copy_(torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)))
    scale = torch.full((shape[0], 1), 0.01)
    form = Quantized.from_codes(codes, scale, None, 8)
    assert form.packed.data_ptr() == codes.data_ptr()
    for tokens in (1, 8, 40):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        for stored in (form, ScaledCodes(codes, scale, torch.ones(1, shape[1]))):
            expected = x.double() @ stored.dense(torch.float64).T
            assert torch.allclose(run(stored, x).double(), expected, rtol=0.02, atol=0.1)
