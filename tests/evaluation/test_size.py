"""Bytes of files and of memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmpress.errors import RequestError
from lmpress.evaluation import (
    bytes_16bit,
    current_resident_set,
    disk_bytes,
    peak_resident_set,
    resident_bytes,
    weight_bytes,
)
from lmpress.forms import CompressedLinear, Quantized
from tests.tiny import TINY, save_tiny, tiny_model


def test_disk_counts_every_file_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "a.safetensors").write_bytes(b"x" * 1000)
    (model / "deep" / ".hidden").write_bytes(b"x" * 10)
    (model / "empty").touch()
    os.link(model / "a.safetensors", model / "hard.safetensors")
    blob = tmp_path / "blob"
    blob.write_bytes(b"x" * 200)
    (model / "b.safetensors").symlink_to(blob)  # as a hub cache has it
    (model / "broken").symlink_to(tmp_path / "nowhere")
    assert disk_bytes(model) == 1210
    assert weight_bytes(model) == 1200
    assert disk_bytes(blob) == weight_bytes(str(blob)) == 200
    with pytest.raises(RequestError, match="neither a file nor a directory"):
        disk_bytes(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma2", "opt"])
def test_16_bit_bytes_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    assert bytes_16bit(TINY[name]()) == 2 * tiny_model(name).num_parameters()
    path = save_tiny(name, tmp_path / "half", seed=0)
    assert 2 * bytes_16bit(TINY[name]()) <= weight_bytes(path) < 1.1 * 2 * bytes_16bit(TINY[name]())


def test_a_compressed_config_gives_the_bytes_of_the_original() -> None:
    config = TINY["llama"]()
    config.quantization_config = {"quant_method": "lmpress", "version": 1, "plan": {}}
    assert bytes_16bit(config) == bytes_16bit(TINY["llama"]())
    assert config.quantization_config["version"] == 1  # the config itself is as it was


def test_resident_bytes_count_what_is_tied_once() -> None:
    tied, untied = tiny_model("llama"), tiny_model("llama-untied")
    for model in (tied, untied):
        stored = {p.data_ptr(): p.nbytes for p in model.parameters()}
        stored |= {b.data_ptr(): b.nbytes for b in model.buffers()}
        assert resident_bytes(model) == sum(stored.values())
    head = tied.lm_head.weight.nbytes
    assert head == 256 * 64 * 4
    before = resident_bytes(tied)
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert resident_bytes(tied) == before + head


def test_resident_bytes_count_what_is_kept_alive_beside_the_parameters() -> None:
    class Packed:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    Packed.__module__ = "lmpress.kernels.somewhere"
    layer = nn.Linear(10, 10, bias=False)
    assert resident_bytes(layer) == 400
    layer.view = layer.weight.detach()[:5]  # type: ignore[assignment]
    assert resident_bytes(layer) == 400
    layer.cache = {"packed": [torch.zeros(25)]}  # type: ignore[assignment]
    assert resident_bytes(layer) == 500
    layer.runner = partial(torch.mul, torch.zeros(50))  # type: ignore[assignment]
    assert resident_bytes(layer) == 700
    held = torch.zeros(75)
    layer.closure = lambda: held  # type: ignore[assignment]
    assert resident_bytes(layer) == 1000
    layer.packed = Packed(torch.zeros(2, 50)[:1])  # type: ignore[assignment]  # the view keeps all of it
    assert resident_bytes(layer) == 1400
    opaque = nn.Linear(10, 10, bias=False)
    opaque.packed = torch.zeros(10, 20).to_mkldnn()  # type: ignore[assignment]
    assert resident_bytes(opaque) == 1200
    assert resident_bytes(nn.Linear(10, 10, device="meta")) == 0


def test_resident_bytes_of_a_form_are_the_packed_ones() -> None:
    codes = torch.randint(-8, 8, (32, 64))
    form = Quantized.from_codes(codes, torch.ones(32, 1, dtype=torch.float16), None, 4)
    layer = CompressedLinear(form)
    assert resident_bytes(layer) == form.num_bytes == 32 * 64 // 2 + 2 * 32
    layer(torch.randn(3, 64))
    assert resident_bytes(layer) == form.num_bytes


def test_the_resident_set_is_that_of_this_process() -> None:
    before = current_resident_set()
    assert 50e6 < before < 64e9  # torch alone is more than 50 MB
    ballast = torch.ones(100 << 20, dtype=torch.uint8)
    grown = current_resident_set() - before
    assert ballast.numel() * 0.9 < grown < ballast.numel() * 1.5
    assert peak_resident_set() >= 0.99 * current_resident_set()
