"""Tiny random models of every supported family, a byte tokenizer and English-like text, for all tests.

model = tiny_model("qwen3")                 # float32, seeded, logits that are neither flat nor certain
directory = save_tiny("opt", tmp_path)      # a Hugging Face checkpoint with a tokenizer
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

PAD, BOS, EOS = 253, 254, 255
"""Special tokens sit on bytes that never occur in UTF-8; every other id is the byte of that value."""

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_GEMMA = {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}

TINY: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_GATED, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**{**_GATED, "num_hidden_layers": 3}, tie_word_embeddings=False),
    "llama-bias": lambda: LlamaConfig(
        **_GATED, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "mistral": lambda: MistralConfig(**_GATED, sliding_window=16, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_GATED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_GATED, head_dim=32, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_GEMMA, "num_hidden_layers": 3},
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": lambda: Phi3Config(**_GATED, tie_word_embeddings=False),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=96, dropout=0.0),
    "opt-post-norm": lambda: OPTConfig(
        **_COMMON, ffn_dim=96, dropout=0.0, do_layer_norm_before=False, word_embed_proj_dim=32
    ),
}
"""The tiny config of every family and variant, by the name that tests are parametrized over."""


def tiny_model(name: str, seed: int = 0) -> Any:
    """The model `TINY[name]` in float32 and eval mode; same seed, same weights.

    Linears keep the size of what passes through them, norms and biases are far from 1 and 0, and the logits
    have a standard deviation of some units: a mistake anywhere shows in the output.
    """
    model = AutoModelForCausalLM.from_config(TINY[name](), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    table_scale = 0.12 if name.startswith("gemma") else 0.25  # Gemma multiplies its embedding by sqrt(64)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                table = "embed" in key or "lm_head" in key
                parameter.copy_(noise * (table_scale if table else parameter.shape[1] ** -0.5))
            elif key.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:  # a norm: around 1, which Gemma stores as 0
                parameter.add_(0.2 * noise)
    return model


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte vocabulary: the id of a byte is its value, any text round-trips.

    With `bos`, its call puts BOS first, as a Llama tokenizer's does.
    ."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    vocabulary = {special.get(byte, symbol): byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",  # the class that AutoTokenizer takes for Qwen2 would add one of its own
        clean_up_tokenization_spaces=False,
    )


def save_tiny(name: str, directory: Path, seed: int = 0, bos: bool = False, **options: Any) -> Path:
    """Write `tiny_model(name, seed)` and its tokenizer to `directory`; `options` go to `save_pretrained`."""
    tiny_model(name, seed).save_pretrained(directory, **options)
    tiny_tokenizer(bos).save_pretrained(directory)
    return Path(directory)


_WORDS = (
    "the of and a to in was he that it his her with as had for she not at but be on they have him which "
    "said from all this there were by one so an when their who would no or if out up been more into them "
    "like then what will some time now could little man great house river light water evening morning "
    "letter garden window street winter summer stone carried walked opened remembered answered found "
    "followed turned between under against quietly slowly never always perhaps "
)


def tiny_text(n_chars: int, seed: int = 0) -> str:
    """Exactly `n_chars` characters of English-like prose: common words, sentences, paragraphs."""
    rng = random.Random(seed)
    words = _WORDS.split()
    weights = [1 / (rank + 1) for rank in range(len(words))]
    pieces: list[str] = []
    length = 0
    while length < n_chars:
        sentence = " ".join(rng.choices(words, weights, k=rng.randint(4, 16))).capitalize()
        pieces.append(sentence + rng.choice([". ", ". ", ". ", "? ", ".\n\n"]))
        length += len(pieces[-1])
    return "".join(pieces)[:n_chars]


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [shifted.get(byte, chr(byte)) for byte in range(256)]
