"""Phi-3 and Phi-4 mini: as Llama, with queries, keys and values in one linear, gate and up in another."""

from __future__ import annotations

from typing import Any

from lmpress.families.base import BlockLayout, Family, Feed, Layout, Neurons, Norm, Rows, Site

ATTENTION = ("self_attn.qkv_proj", "self_attn.o_proj")
MLP = ("mlp.gate_up_proj", "mlp.down_proj")


class Phi3(Family):
    """y = x + Attention(norm(x)); z = y + down(act(gate) * up), [gate; up] = gate_up(norm(y))."""

    name = "phi3"
    model_types = ("phi3",)

    def layout(self, config: Any) -> Layout:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        whole = heads + 2 * groups
        values = Rows(ATTENTION[0], heads + groups, whole, whole)
        gate, up = Rows(MLP[0], 0, 1, 2), Rows(MLP[0], 1, 2, 2)
        block = BlockLayout(
            sites=(
                Site("qkv", ATTENTION[:1], Feed(norm=Norm("input_layernorm"))),
                Site("o", ATTENTION[1:], Feed(rows=values, heads=(groups, heads // groups))),
                Site("gate_up", MLP[:1], Feed(norm=Norm("post_attention_layernorm"))),
                Site("down", MLP[1:], Feed(rows=up)),
            ),
            neurons=Neurons(inputs=(gate, up), signal=up, output=MLP[1]),
            attention=ATTENTION,
            mlp=MLP,
            writers=(ATTENTION[1], MLP[1]),
        )
        return Layout(
            family=self.name,
            blocks="model.layers",
            each=(block,) * config.num_hidden_layers,
            embedding="model.embed_tokens",
            head="lm_head",
            tied=bool(config.tie_word_embeddings),
            last_norm=Norm("model.norm"),
        )
