"""Entropy-coded weights: bit-exact, small, and never wrong in silence."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lmpress.forms
from lmpress.forms import (
    Bitmap,
    CompressedEmbedding,
    CompressedLinear,
    Dense,
    EntropyCoded,
    Form,
    LowRank,
    NofM,
    Pivoted,
    ScaledCodes,
    Sparse,
    Sum,
    ans,
    ans_encoder,
    decode_all,
    entropy_coded,
    form_from_description,
)


def scales(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, 1, generator=generator) + 0.1, torch.rand(1, columns, generator=generator).half()


def coded(codes: Tensor, chunk_size: int = 1 << 16) -> EntropyCoded:
    return EntropyCoded.from_codes(codes, *scales(*codes.shape), chunk_size=chunk_size)


def laplace(rows: int, columns: int, size: float, seed: int = 0) -> Tensor:
    """Codes whose magnitude differs by row and by column."""
    random = np.random.default_rng(seed)
    by_row, by_column = np.exp(0.6 * random.normal(size=(rows, 1))), np.exp(0.4 * random.normal(size=columns))
    return torch.from_numpy(np.round(random.laplace(size=(rows, columns)) * size * by_row * by_column)).long()


matrices = st.tuples(
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 5, 100, 3000, 10**6, 2**31 - 1]),
    st.sampled_from([1, 7, 64, 1 << 16]),
)


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_round_trip_is_exact(case: tuple[int, int, int, int, int]) -> None:
    rows, columns, seed, largest, chunk_size = case
    random = np.random.default_rng(seed)
    spread = random.random((rows, 1)) ** 4 * random.random(columns) ** 4 * random.random((rows, columns)) ** 3
    signs = random.choice([-1, 1], size=(rows, columns))
    codes = torch.from_numpy(np.round(spread * largest * signs).astype(np.int64))
    form = coded(codes, chunk_size)
    assert torch.equal(form.codes().long(), codes)
    largest = int(codes.abs().max()) if codes.numel() else 0
    assert form.codes().dtype == (
        torch.int8 if largest < 128 else torch.int16 if largest < 1 << 15 else torch.int32
    )
    rebuilt = form_from_description(json.loads(json.dumps(form.describe())))
    shapes = {name: (t.shape, t.dtype) for name, t in form.tensors().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in rebuilt.tensors().items()}
    assert torch.equal(rebuilt.with_tensors(form.tensors()).dense(), form.dense())


@pytest.mark.parametrize("size", [0.4, 1.5, 6.0, 40.0])
def test_size_is_close_to_the_entropy_of_the_contexts(size: float) -> None:
    codes = laplace(768, 512, size)
    form = coded(codes)
    contexts = form._coded().parsed[0]
    context = torch.from_numpy(contexts.rows).long()[:, None] + torch.from_numpy(contexts.columns).long()
    entropy = 0.0
    for number in context.unique():
        counts = torch.unique(codes[context == number], return_counts=True)[1].double()
        entropy -= float((counts * (counts / counts.sum()).log2()).sum())
    stored = form.num_bytes - form.row_scale.numel() * 4 - form.column_scale.numel() * 2
    assert 0.99 * entropy < 8 * stored < (1.01 if size > 2 else 1.02) * entropy  # tables included
    plain = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    assert 8 * stored < float(-(plain * plain.log2()).sum()) * codes.numel()  # contexts pay


def test_num_bytes_counts_every_tensor() -> None:
    form = coded(laplace(100, 64, 3.0))
    parts = form.tensors()
    assert form.num_bytes == sum(t.numel() * t.element_size() for t in parts.values())
    assert next(iter(parts)) == "payload"
    assert form.payload.ndim == 1
    assert form.bits_per_weight == pytest.approx(8 * form.num_bytes / 6400)


def test_dense_forward_and_rows_agree_with_the_formula() -> None:
    codes = laplace(50, 32, 4.0)
    row_scale, column_scale = scales(50, 32)
    expected = codes.double() * row_scale.double() * column_scale.double()
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[4, 49, 4], [0, 17, 30]])
    form = coded(codes, chunk_size=300)
    for one in (form, form.resident()):
        torch.testing.assert_close(one.dense(torch.float64), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.dense(), expected.float())
        torch.testing.assert_close(one.forward(x), x @ expected.float().T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.rows(index), expected.float()[index])
        assert one.shape == (50, 32)
    for shapes in ((1, 1), (50, 1)):
        flat = EntropyCoded.from_codes(codes, torch.full(shapes, 0.5), torch.full((1, 1), 0.25))
        assert torch.equal(flat.dense(), codes * 0.125)
        assert torch.equal(flat.rows(index), codes[index] * 0.125)


def test_rare_large_codes_are_kept_apart() -> None:
    codes = laplace(300, 64, 4.0).clamp(-100, 100)
    codes[7, 3], codes[7, 60], codes[299, 63], codes[0, 0] = 900, -70_000, 128, -128
    form = coded(codes)
    resident = form.resident()
    assert resident.codes.dtype == torch.int8
    assert resident.overflow is not None
    assert len(resident.overflow) == 4
    assert torch.equal(resident.whole_codes(torch.int64), codes)
    row_scale, column_scale = scales(300, 64)
    expected = codes.double() * row_scale.double() * column_scale.double()
    torch.testing.assert_close(resident.dense(torch.float64), expected)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(resident.forward(x), x @ expected.T)
    index = torch.tensor([[7, 299, 7], [1, 0, 8]])
    torch.testing.assert_close(resident.rows(index), expected.float()[index])
    assert resident.rows(index[:0]).shape == (0, 3, 64)
    rebuilt = form_from_description(json.loads(json.dumps(resident.describe())))
    assert {n: (t.shape, t.dtype) for n, t in rebuilt.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in resident.tensors().items()
    }
    assert torch.equal(rebuilt.with_tensors(resident.tensors()).dense(), resident.dense())
    common = coded(codes * 100).resident()  # too many to keep apart
    assert common.overflow is None
    assert common.codes.dtype == torch.int32
    with pytest.raises(ValueError, match="together"):
        replace(resident, excess=None)


def test_rows_decode_only_their_chunks() -> None:
    codes = laplace(64, 32, 4.0)
    form = coded(codes, chunk_size=256)
    spoiled = replace(form, chunks=form.chunks.clone())
    spoiled.chunks[0, 2] ^= 1
    first = set(form._coded().chunk_rows(0).tolist())
    elsewhere = torch.tensor([row for row in range(64) if row not in first])
    assert len(elsewhere) == 56
    assert torch.equal(spoiled.rows(elsewhere), form.dense()[elsewhere])
    with pytest.raises(ValueError, match="chunk 0"):
        spoiled.rows(torch.arange(64))


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(9, 33),
        torch.cat([torch.zeros(5, 20), torch.ones(1, 20), torch.full((1, 20), -4000)]),
        torch.tensor([[2**31 - 1, -(2**31) + 1], [0, 5]]),
        torch.arange(-300, 300)[:, None],
        torch.arange(-300, 300)[None, :],
        torch.tensor([[7]]),
        torch.full((70, 70), 1_000_000),
    ],
    ids=["zeros", "zero rows", "extremes", "one column", "one row", "one code", "all escape"],
)
def test_odd_matrices(codes: Tensor) -> None:
    form = coded(codes, chunk_size=64)
    assert torch.equal(form.codes().double(), codes.double())


def test_any_flipped_bit_is_an_error() -> None:
    codes = laplace(40, 24, 5.0)
    codes[3, 3] = 10**6  # an escape
    form = coded(codes, chunk_size=240)
    random = np.random.default_rng(0)
    for name in ("payload", "chunks", "model"):
        whole = form.tensors()[name]
        for _ in range(60):
            raw = bytearray(whole.numpy().tobytes())
            raw[random.integers(len(raw))] ^= 1 << int(random.integers(8))
            spoiled = torch.frombuffer(raw, dtype=whole.dtype).view(whole.shape)
            with pytest.raises(ValueError, match=r"corrupt|truncated|payload"):
                form.with_tensors(form.tensors() | {name: spoiled}).codes()


def test_a_corrupt_chunk_is_named() -> None:
    form = coded(laplace(64, 64, 5.0), chunk_size=1024)
    starts = form._coded()._starts
    assert len(starts) == 5
    payload = form.payload.clone()
    payload[int(starts[2]) + 8] ^= 255
    with pytest.raises(ValueError, match="chunk 2 of an entropy-coded matrix of 64 x 64 is corrupt"):
        replace(form, payload=payload).codes()
    with pytest.raises(ValueError, match=r"chunk 2 of layers\.0\.mlp is corrupt"):
        decode_all([form, replace(form, payload=payload)], ["a", "layers.0.mlp"])
    wide = coded(laplace(16, 64, 5.0))
    with pytest.raises(ValueError, match="chunk 0 of an entropy-coded matrix of 16 x 64 is corrupt"):
        decode_all([replace(wide, payload=wide.payload ^ 255)])


def test_the_largest_are_dealt_out_first() -> None:
    shapes = [(40, 10), (20, 20), (2, 400), (5, 20)]  # 400, 400, 800 and 100 codes
    jobs = [coded(torch.zeros(shape, dtype=torch.int64))._coded() for shape in shapes]
    assert entropy_coded._shares(jobs, 2) == [[2, 3], [0, 1]]
    assert entropy_coded._shares(jobs, 1) == [[2, 0, 1, 3]]


def test_a_coder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    form = coded(laplace(6, 8, 5.0))
    monkeypatch.delattr(lmpress.forms, "ans")
    monkeypatch.setitem(sys.modules, "lmpress.forms.ans", None)
    with pytest.raises(ImportError, match="pip install constriction"):
        form.codes()


def test_it_is_a_value_with_a_short_name() -> None:
    form = coded(laplace(6, 8, 5.0))
    assert repr(form) == f"{form.formula}[6x8]"
    for field in fields(form):
        with pytest.raises(FrozenInstanceError):
            setattr(form, field.name, getattr(form, field.name))


def test_truncated_streams() -> None:
    form = coded(laplace(64, 64, 5.0), chunk_size=1024)
    whole = form.payload.numel()
    with pytest.raises(ValueError, match=f"has {whole - 4} bytes, its chunks take {whole}"):
        replace(form, payload=form.payload[:-4]).codes()
    with pytest.raises(ValueError, match="chunk table"):
        replace(form, chunks=form.chunks[:-1]).codes()
    for cut in (1, 5, 60, form.model.numel()):
        with pytest.raises(ValueError, match=r"model|chunk 0"):
            replace(form, model=form.model[:-cut]).codes()


def test_the_same_bytes_every_time_and_known_ones() -> None:
    """The stream is a file format: were this to change, old checkpoints could not be read."""
    codes = torch.tensor([[0, 1, -1, 2], [0, 0, 3, -70000]])
    form = coded(codes)
    again = coded(codes.to(torch.int32))
    assert all(
        torch.equal(a, b) for a, b in zip(form.tensors().values(), again.tensors().values(), strict=True)
    )
    assert form.model.tolist() == KNOWN_MODEL
    assert form.payload.tolist() == KNOWN_PAYLOAD


KNOWN_MODEL = [0, 4, 0, 13, 21, 21, 13]
KNOWN_PAYLOAD = [179, 171, 153, 235, 71, 4, 0, 0, 144, 238, 254, 255]


@pytest.mark.parametrize(
    "table", [bytes([1, 0, 255]), bytes([9, *range(0, 80, 10), 200, 255]), bytes([45] + [3] * 46)]
)
def test_tables_expand_to_whole_frequencies(table: bytes) -> None:
    middle, frequencies = ans.expand_table(table)
    assert middle == ans.KNOTS[table[0] - 1]
    assert len(frequencies) == 2 * middle + 2
    assert int(frequencies.sum()) == 1 << 22
    assert int(frequencies.min()) >= 1
    half = frequencies[middle:-1]
    assert (half[1:] != frequencies[:middle][::-1]).sum() <= 1  # one takes what is left to 2^22
    for knot, step in zip(ans.KNOTS[: table[0]].tolist()[1:], table[2:-1], strict=True):
        if half[knot] > 100 and table[1] == 0 and int(frequencies.argmax()) == middle:
            ratio = (half[knot] + 0.5) / (half[1] + 0.5) / 2 ** ((table[2] - step) / 8)
            assert 0.99 < ratio < 1.01


def test_roots_are_powers_of_two() -> None:
    for i, value in enumerate(ans.ROOTS.tolist()):
        assert value == pytest.approx(2**32 * math.exp2(-i / 256), abs=16)


def plain(shape: tuple[int, int], row_scale: float = 0.5) -> EntropyCoded:
    """Codes with one scale in all, some of them beyond a byte."""
    codes = laplace(*shape, 12.0, seed=shape[1])
    return EntropyCoded.from_codes(codes, torch.tensor([[row_scale]]), torch.tensor([[0.25]]), 100)


MASK = torch.arange(40)[:, None] * 7 % 5 + torch.arange(24) % 3 > 2
HALF = torch.arange(24) % 4 < torch.full((40, 1), 2)
ROW_SCALES = torch.rand(40, 1, generator=torch.Generator().manual_seed(3)).half()
MIXED: dict[str, Form] = {
    "alone": coded(laplace(40, 24, 3.0) + 300 * (torch.arange(960).view(40, 24) % 311 == 5), 100),
    "bytes": coded(laplace(40, 24, 3.0)),
    "wide": coded(laplace(40, 24, 4000.0), 10**6),
    "no columns": coded(torch.zeros(7, 0)),
    "no rows": coded(torch.zeros(0, 7)),
    "product": LowRank(coded(laplace(40, 5, 9.0)), Dense(torch.ones(5, 24))),
    "sum": Sum((coded(laplace(40, 24, 9.0)), LowRank(Dense(torch.ones(40, 2)), coded(laplace(2, 24, 50.0))))),
    "pivoted": Pivoted.from_parts(
        coded(laplace(5, 24, 9.0)), coded(laplace(35, 5, 9.0)), torch.arange(40) % 8 == 3
    ),
    "bitmap": Sparse(Bitmap.from_mask(MASK), plain((1, int(MASK.sum())))),
    "scaled bitmap": Sparse(Bitmap.from_mask(MASK), plain((1, int(MASK.sum()))), ROW_SCALES),
    "n:m": Sparse(NofM.from_mask(HALF, 2, 4), plain((40, 12))),
    "column scales of the kept": Sparse(Bitmap.from_mask(HALF), coded(laplace(40, 12, 9.0))),
}


@pytest.mark.parametrize("case", list(MIXED))
def test_the_stored_form_comes_back_from_the_resident_one(case: str) -> None:
    form = MIXED[case]
    resident = form.resident()
    assert "ec" not in resident.formula
    assert ("Sparse" in resident.formula) == (case == "column scales of the kept")
    torch.testing.assert_close(resident.dense(torch.float64), form.dense(torch.float64), rtol=1e-12, atol=0)
    again = form.without_values().stored(resident)
    assert again.describe() == form.describe()
    for name, tensor in form.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    assert resident.resident() is resident


def test_a_module_drops_the_payload_and_codes_it_anew() -> None:
    form = MIXED["alone"]
    module = CompressedLinear(form)
    module.hold_resident()
    assert isinstance(module.form, ScaledCodes)
    assert module.form.overflow is not None
    assert module.kept_beside() == []
    assert module.form_tensors()["weight"].dtype == torch.int8
    module.to(torch.bfloat16).to("cpu")
    for name, tensor in module.stored_form.tensors().items():
        assert torch.equal(tensor, form.tensors()[name]), name
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), x @ form.dense().T, rtol=1e-4, atol=1e-2)
    table = CompressedEmbedding(form)
    table.hold_resident()
    assert torch.equal(table(torch.tensor([3, 39])), form.dense()[[3, 39]])
    assert table.stored_form.describe() == form.describe()


def test_decode_all_shares_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmpress.forms.entropy_coded.SHARE", 2000)
    matrices = [laplace(rows, 24, 40.0 * rows, seed=rows) for rows in (50, 100, 3, 200)]
    forms = [coded(codes) for codes in matrices]
    assert {form.itemsize for form in forms} > {2}
    decoded = decode_all(forms, processes=3)
    for one in decoded:  # no matrix keeps another one's memory alive
        assert one.codes.untyped_storage().nbytes() == one.codes.nbytes
    for form, codes, one in zip(decoded, matrices, forms, strict=True):
        assert isinstance(form, ScaledCodes)
        assert torch.equal(form.whole_codes(torch.int64), codes)
        assert torch.equal(form.dense(), one.dense())
    payload = forms[1].payload.clone()
    payload[3] ^= 1
    spoiled = [forms[0], replace(forms[1], payload=payload), *forms[2:]]
    with pytest.raises(ValueError, match="chunk 0 of b is corrupt"):
        decode_all(spoiled, ["a", "b", "c", "d"], processes=3)
    assert decode_all([]) == []


def test_scales_can_be_trained() -> None:
    form = coded(laplace(20, 16, 3.0))
    trained = form.with_tensors(
        form.tensors()
        | {name: form.tensors()[name].float().requires_grad_() for name in ("row_scale", "column_scale")}
    )
    trained.forward(torch.ones(2, 16)).sum().backward()
    assert trained.row_scale.grad is not None
    assert trained.column_scale.grad is not None
    expected = (form.codes() * form.column_scale.float()).sum(1, keepdim=True) * 2
    torch.testing.assert_close(trained.row_scale.grad, expected)


def test_bad_codes_and_descriptions() -> None:
    with pytest.raises(ValueError, match="whole"):
        coded(torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match="32 bits"):
        coded(torch.tensor([[2**31]]))
    with pytest.raises(ValueError, match="fit"):
        EntropyCoded.from_codes(torch.zeros(3, 4), torch.ones(2, 1), torch.ones(1, 4))
    description = coded(torch.ones(3, 4)).describe()
    with pytest.raises(ValueError, match="lacks"):
        form_from_description({k: v for k, v in description.items() if k != "payload_bytes"})
    with pytest.raises(ValueError, match="fit"):
        form_from_description(description | {"row_scales": 2})
    with pytest.raises(ValueError, match="codes"):
        form_from_description(description | {"code_bytes": 3})
    resident = coded(torch.ones(3, 4)).resident()
    assert isinstance(form_from_description(resident.describe()), ScaledCodes)
    with pytest.raises(ValueError, match="codes are"):
        form_from_description(resident.describe() | {"code_dtype": "int64"})


def test_counting_and_checking_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = laplace(300, 17, 5.0)
    codes[7, 3] = 70_000
    whole = coded(codes)
    monkeypatch.setattr(ans_encoder, "PART", 100)
    monkeypatch.setattr(entropy_coded, "PART", 100)
    parts = coded(codes)
    assert all(torch.equal(tensor, parts.tensors()[name]) for name, tensor in whole.tensors().items())
    for wrong in (0.5, float("nan"), 2.0**31):
        broken = codes.double()
        broken[250, 2] = wrong
        with pytest.raises(ValueError, match=r"whole numbers|32 bits"):
            coded(broken)


def test_more_codes_than_the_bytes_can_tell_of_are_not_made_room_for() -> None:
    whole = coded(torch.zeros(1 << 10, 1 << 10, dtype=torch.int64))
    assert torch.equal(whole.codes(), torch.zeros(1 << 10, 1 << 10, dtype=torch.int8))
    bomb = replace(whole._coded(), shape=(1 << 20, 1 << 20), rows_per_chunk=1 << 16)
    for decode in (bomb.decode, lambda: bomb.decode_rows(np.zeros(1, np.int64))):
        with pytest.raises(ValueError, match="claims 1099511627776 codes"):
            decode()
