"""A plan fits its model, or is refused: only neurons may be fewer than the config says."""

from __future__ import annotations

import pytest
import torch

from lmpress.checkpoint.fit import check_fit
from lmpress.errors import RequestError
from lmpress.forms import Dense, Form
from tests.tiny import tiny_model

MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}


def block(neurons: dict[str, int]) -> dict[str, Form]:
    """Forms of the MLP of block 1, each with so many neurons."""
    forms: dict[str, Form] = {}
    for name, count in neurons.items():
        shape = (64, count) if name == "down_proj" else (count, 64)
        forms[f"model.layers.1.mlp.{name}"] = Dense(torch.empty(shape, device="meta"))
    return forms


def test_neurons_may_be_fewer() -> None:
    for count in (96, 40, 1):
        check_fit(tiny_model("llama"), block(dict.fromkeys(MLP, count)), "config.json")


@pytest.mark.parametrize("neurons", [{"up_proj": 97}, {"up_proj": 0}, {"down_proj": 97}])
def test_neurons_may_not_be_more_or_none(neurons: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="the config asks for"):
        check_fit(tiny_model("llama"), block(neurons), "config.json")


def test_a_block_has_one_number_of_neurons() -> None:
    with pytest.raises(RequestError, match="down_proj has 40 neurons, its block 48"):
        check_fit(
            tiny_model("llama"), block({"gate_proj": 48, "up_proj": 48, "down_proj": 40}), "config.json"
        )


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.q_proj", (63, 64), "asks for"),
        ("model.layers.0.mlp.up_proj", (96, 63), "asks for"),
        ("model.embed_tokens", (255, 64), "asks for"),
        ("model.norm", (64, 64), "no such matrix"),
        ("model.layers.9.mlp.up_proj", (96, 64), "no such matrix"),
        ("", (64, 64), "no such matrix"),
        ("../model", (64, 64), "no such matrix"),
    ],
)
def test_what_is_no_matrix_of_the_model(name: str, shape: tuple[int, int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_fit(tiny_model("llama"), {name: Dense(torch.empty(shape, device="meta"))}, "config.json")


@pytest.mark.parametrize(("rows", "fits"), [(192, True), (96, True), (2, True), (95, False), (194, False)])
def test_fused_rows_are_two_to_a_neuron(rows: int, fits: bool) -> None:
    name, form = "model.layers.0.mlp.gate_up_proj", Dense(torch.empty(rows, 64, device="meta"))
    down = Dense(torch.empty(64, rows // 2, device="meta"))
    forms = {name: form, "model.layers.0.mlp.down_proj": down}
    if fits:
        check_fit(tiny_model("phi3"), forms, "config.json")
        return
    with pytest.raises(RequestError, match="gate_up_proj"):
        check_fit(tiny_model("phi3"), forms, "config.json")
