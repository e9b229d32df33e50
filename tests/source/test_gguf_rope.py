"""Scalings of rotary frequencies that are found again from the numbers that they give."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmpress.source.gguf_rope import from_divisors


def frequencies(rope: dict[str, Any], theta: float, head_dim: int) -> torch.Tensor:
    """As transformers has them, (head_dim / 2,)."""
    if not rope:
        return theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    parameters = {"rope_theta": theta} | rope
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=8192, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device="cpu")[0]


def llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return scaling | {"original_max_position_embeddings": original}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        llama3(8.0, 1.0, 4.0, 8192),
        llama3(32.0, 1.0, 4.0, 8192),
        llama3(8.0, 2.0, 6.0, 4096),
        llama3(4.0, 1.0, 16.0, 1024),
    ],
)
def test_llama3_is_found_again(rope: dict[str, Any], head_dim: int) -> None:
    theta = 500000.0
    wanted = frequencies(rope, theta, head_dim)
    divisors = (frequencies({}, theta, head_dim) / wanted).numpy().astype(numpy.float64)
    found = from_divisors(divisors, theta, 131072)
    torch.testing.assert_close(frequencies(found, theta, head_dim), wanted, rtol=1e-4, atol=0)
    if head_dim > 16:
        assert found["rope_type"] == "llama3"
    if head_dim > 16 and rope["low_freq_factor"] == 1.0:
        assert found == rope


def test_equal_divisors_are_a_linear_scaling() -> None:
    assert from_divisors(numpy.full(8, 4.0), 10000.0, 100) == {"rope_type": "linear", "factor": 4.0}
    assert from_divisors(numpy.ones(8), 10000.0, 100) == {}


@pytest.mark.parametrize("seed", range(3))
def test_any_others_are_kept_number_by_number(seed: int) -> None:
    divisors = numpy.random.default_rng(seed).uniform(0.5, 9, 32)
    found = from_divisors(divisors, 10000.0, 100)
    wanted = frequencies({}, 10000.0, 64) / torch.from_numpy(divisors)
    torch.testing.assert_close(frequencies(found, 10000.0, 64).double(), wanted.double(), rtol=1e-5, atol=0)
    assert found["attention_factor"] == 1.0
