"""Pre-norm decoders with rotary positions and a gated MLP: Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3.

They differ in biases, in norms on queries and keys or behind a sub-layer, in sliding windows and in the
scale of the embedding: none of these changes which linears there are, what they read or how they are named.
"""

from __future__ import annotations

from typing import Any

from lmpress.families.base import Family, Layout, Neurons, Site

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class LlamaLike(Family):
    """y = x + Attention(norm(x)); z = y + down(act(gate(norm(y))) * up(norm(y)))."""

    name = "llama-like"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")

    def layout(self, config: Any) -> Layout:
        return Layout(
            family=self.name,
            blocks="model.layers",
            num_blocks=config.num_hidden_layers,
            sites=(
                Site("qkv", ATTENTION[:3]),
                Site("o", ATTENTION[3:]),
                Site("gate_up", MLP[:2]),
                Site("down", MLP[2:]),
            ),
            neurons=Neurons(inputs=MLP[:2], signal="mlp.up_proj", output="mlp.down_proj"),
            attention=ATTENTION,
            mlp=MLP,
            embedding="model.embed_tokens",
            head="lm_head",
            tied=bool(config.tie_word_embeddings),
        )
