"""OPT: learned positions, biases everywhere, an MLP without a gate.

The norms stand before or behind the sub-layers (`do_layer_norm_before`), and the embedding may be narrower
than the blocks (`word_embed_proj_dim`; `project_in` and `project_out` stand between). Both leave the blocks'
linears as they are; the two projections belong to no block and are never compressed.
"""

from __future__ import annotations

from typing import Any

from lmpress.families.base import BlockLayout, Family, Feed, Layout, Neurons, Norm, Rows, Site

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
MLP = ("fc1", "fc2")


class Opt(Family):
    """y = x + Attention(norm(x)); z = y + fc2(act(fc1(norm(y)))); or each norm behind its sum."""

    name = "opt"
    model_types = ("opt",)

    def layout(self, config: Any) -> Layout:
        def behind(norm: str) -> Feed | None:
            """A norm in front of a sub-layer; one behind a sum feeds the residual stream as well."""
            return Feed(norm=Norm(norm, centred=True)) if config.do_layer_norm_before else None

        fc1 = Rows(MLP[0])
        homogeneous = config.activation_function == "relu"  # relu(x / s) = relu(x) / s
        block = BlockLayout(
            sites=(
                Site("qkv", ATTENTION[:3], behind("self_attn_layer_norm")),
                Site("o", ATTENTION[3:], Feed(rows=Rows(ATTENTION[2]))),
                Site("gate_up", MLP[:1], behind("final_layer_norm")),
                Site("down", MLP[1:], Feed(rows=fc1) if homogeneous else None),
            ),
            neurons=Neurons(inputs=(fc1,), signal=fc1, output=MLP[1]),
            attention=ATTENTION,
            mlp=MLP,
            writers=(ATTENTION[3], MLP[1]),
        )
        return Layout(
            family=self.name,
            blocks="model.decoder.layers",
            each=(block,) * config.num_hidden_layers,
            embedding="model.decoder.embed_tokens",
            head="lm_head",
            tied=bool(config.tie_word_embeddings),
        )
