"""The helpers of a layout."""

from dataclasses import replace

import pytest

from lmpress.families import Neurons, Rows, Site, layout_of
from tests.tiny import TINY

LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def test_linears_come_in_the_order_of_the_sites():
    layout = layout_of(TINY["llama"]())
    assert layout.block(0).linears == LLAMA
    assert layout_of(TINY["opt"]()).block(0).linears[-2:] == ("fc1", "fc2")
    assert layout.linears_of(1) == tuple(f"model.layers.1.{linear}" for linear in LLAMA)
    assert tuple(layout.linears) == (*layout.linears_of(0), *layout.linears_of(1))


def test_blocks_may_differ():
    layout = layout_of(TINY["llama"]())
    first, second = layout.each
    mixed = replace(layout, each=(first, replace(second, sites=second.sites[2:])))
    assert mixed.num_blocks == 2
    assert mixed.block(1).linears == LLAMA[4:]
    expected = (
        *(f"model.layers.0.{linear}" for linear in LLAMA),
        *(f"model.layers.1.{linear}" for linear in LLAMA[4:]),
    )
    assert tuple(mixed.linears) == expected


def test_block_name():
    layout = layout_of(TINY["opt"]())
    assert layout.block_name(1) == "model.decoder.layers.1"
    for outside in (-1, layout.num_blocks):
        with pytest.raises(IndexError, match="no block"):
            layout.block_name(outside)


def test_site_of():
    block = layout_of(TINY["opt"]()).block(0)
    assert block.site_of("self_attn.v_proj") is block.sites[0]
    alone = block.site_of("fc1")
    assert alone == Site("gate_up", ("fc1",), alone.feed)
    with pytest.raises(KeyError, match=r"mlp\.gate_proj"):
        block.site_of("mlp.gate_proj")


def test_groups():
    block = layout_of(TINY["llama"]()).block(0)
    assert block.group("attention") == LLAMA[:4]
    assert block.group("mlp") == LLAMA[4:]
    assert block.group("linears") == LLAMA
    with pytest.raises(KeyError):
        block.group("embeddings")


def test_rows_of_fused_projections():
    assert Rows("fc1").within(12) == slice(0, 12)
    assert Rows("qkv", 2, 3, 3).within(12) == slice(8, 12)
    assert Rows("gate_up", 1, 2, 2).within(12) == slice(6, 12)
    with pytest.raises(ValueError, match="13 rows of gate_up are no 2 equal parts"):
        Rows("gate_up", 1, 2, 2).within(13)


def test_neurons_of_a_fused_projection_have_two_rows_each():
    gate, up = Rows("gate_up", 0, 1, 2), Rows("gate_up", 1, 2, 2)
    neurons = Neurons(inputs=(gate, up), signal=up, output="down")
    assert neurons.linears == ("gate_up",)
    assert (neurons.parts("gate_up"), neurons.parts("down")) == (2, 0)
    apart = layout_of(TINY["llama"]()).block(0).neurons
    assert apart.linears == LLAMA[4:6]
    assert [apart.parts(linear) for linear in LLAMA[4:]] == [1, 1, 0]
