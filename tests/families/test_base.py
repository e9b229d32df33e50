"""The helpers of a layout."""

import pytest

from lmpress.families import Site, layout_of
from tests.tiny import TINY


def test_linears_come_in_the_order_of_the_sites():
    layout = layout_of(TINY["llama"]())
    assert layout.linears == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert layout_of(TINY["opt"]()).linears[-2:] == ("fc1", "fc2")


def test_block_name():
    layout = layout_of(TINY["opt"]())
    assert layout.block_name(1) == "model.decoder.layers.1"
    for outside in (-1, layout.num_blocks):
        with pytest.raises(IndexError, match="no block"):
            layout.block_name(outside)


def test_site_of():
    layout = layout_of(TINY["opt"]())
    assert layout.site_of("self_attn.v_proj") is layout.sites[0]
    assert layout.site_of("fc1") == Site("gate_up", ("fc1",))
    with pytest.raises(KeyError, match=r"mlp\.gate_proj"):
        layout.site_of("mlp.gate_proj")
