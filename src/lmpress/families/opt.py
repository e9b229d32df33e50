"""OPT: learned positions, biases everywhere, an MLP without a gate.

The norms stand before or behind the sub-layers (`do_layer_norm_before`), and the embedding may be narrower
than the blocks (`word_embed_proj_dim`; `project_in` and `project_out` stand between). Both leave the blocks'
linears as they are; the two projections belong to no block and are never compressed.
"""

from __future__ import annotations

from typing import Any

from lmpress.families.base import Family, Layout, Neurons, Site

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
MLP = ("fc1", "fc2")


class Opt(Family):
    """y = x + Attention(norm(x)); z = y + fc2(act(fc1(norm(y)))); or each norm behind its sum."""

    name = "opt"
    model_types = ("opt",)

    def layout(self, config: Any) -> Layout:
        return Layout(
            family=self.name,
            blocks="model.decoder.layers",
            num_blocks=config.num_hidden_layers,
            sites=(
                Site("qkv", ATTENTION[:3]),
                Site("o", ATTENTION[3:]),
                Site("gate_up", MLP[:1]),
                Site("down", MLP[1:]),
            ),
            neurons=Neurons(inputs=MLP[:1], signal="fc1", output="fc2"),
            attention=ATTENTION,
            mlp=MLP,
            embedding="model.decoder.embed_tokens",
            head="lm_head",
            tied=bool(config.tie_word_embeddings),
        )
