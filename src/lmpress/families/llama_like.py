"""Pre-norm decoders with rotary positions and a gated MLP: Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3.

They differ in biases, in norms on queries and keys or behind a sub-layer, in sliding windows and in the
scale of the embedding: none of these changes which linears there are, what they read or how they are named.
"""

from __future__ import annotations

from typing import Any

from lmpress.families.base import BlockLayout, Family, Feed, Layout, Neurons, Norm, Rows, Site

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

GEMMA = ("gemma2", "gemma3_text")
"""They store a norm's gain less one, and have norms behind attention and MLP."""


class LlamaLike(Family):
    """y = x + Attention(norm(x)); z = y + down(act(gate(norm(y))) * up(norm(y)))."""

    name = "llama-like"
    model_types = ("llama", "mistral", "qwen2", "qwen3", *GEMMA)

    def layout(self, config: Any) -> Layout:
        gemma = config.model_type in GEMMA
        offset = 1.0 if gemma else 0.0
        before_mlp = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        behind = ("post_attention_layernorm", "post_feedforward_layernorm") if gemma else ()
        groups = config.num_key_value_heads
        gate, up = Rows(MLP[0]), Rows(MLP[1])
        block = BlockLayout(
            sites=(
                Site("qkv", ATTENTION[:3], Feed(norm=Norm("input_layernorm", offset))),
                Site(
                    "o",
                    ATTENTION[3:],
                    Feed(rows=Rows(ATTENTION[2]), heads=(groups, config.num_attention_heads // groups)),
                ),
                Site("gate_up", MLP[:2], Feed(norm=Norm(before_mlp, offset))),
                Site("down", MLP[2:], Feed(rows=up)),
            ),
            neurons=Neurons(inputs=(gate, up), signal=up, output=MLP[2]),
            attention=ATTENTION,
            mlp=MLP,
            writers=(ATTENTION[3], MLP[2]),
            norms_behind=tuple(Norm(name, offset) for name in behind),
        )
        return Layout(
            family=self.name,
            blocks="model.layers",
            each=(block,) * config.num_hidden_layers,
            embedding="model.embed_tokens",
            head="lm_head",
            tied=bool(config.tie_word_embeddings),
            last_norm=Norm("model.norm", offset),
        )
