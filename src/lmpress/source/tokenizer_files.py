"""The tokenizer of a source: how it is read, copied, and compared with the embedding."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lmpress.errors import RequestError
from lmpress.progress import note

DECIDING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What decides which ids a text becomes."""


def read_tokenizer(directory: Path, gguf: str | None, name: str, config: Any) -> Any:
    """The tokenizer of a directory, or of the GGUF file `gguf` in it.

    Raises:
        RequestError: there is none that transformers reads, or it has more words than the embedding rows.
    """
    extra = {"config": config} if gguf is None else {"gguf_file": gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **extra)
    except Exception as error:  # transformers raises whatever the files made it raise
        raise RequestError(
            f"{name} has no tokenizer that transformers reads: {_reason(directory, gguf, error)}"
        ) from None
    if gguf is None:  # of a GGUF file the tokens are counted in the file, for transformers adds some
        check_vocabulary(name, tokenizer.vocab_size, len(tokenizer), config.vocab_size)
    return tokenizer


def check_vocabulary(name: str, words: int, all_words: int, rows: int) -> None:
    """Compare a tokenizer with the embedding.

    Args:
        name: the model as the user named it, for messages.
        words: how many tokens plain text may become.
        all_words: the same with the tokens added to it, which text holds where it spells them out.
        rows: how many rows the embedding has.

    Raises:
        RequestError: plain text may become tokens that the embedding has no row for.
    """
    if words > rows:
        raise RequestError(
            f"{name}: the tokenizer has {words} tokens, and the embedding only {rows} rows; "
            "it is the tokenizer of another model"
        )
    if all_words > rows:
        note(f"{name}: the embedding has no row for {all_words - rows} of the tokens added to its tokenizer")


def _reason(directory: Path, gguf: str | None, error: Exception) -> str:
    marked = [name for name in DECIDING if _is_marked(directory / name)]
    if marked:
        return f"{directory / marked[0]} begins with a byte order mark; save it as UTF-8 without one"
    told = " ".join(str(error).split())[:200] or repr(error)
    if gguf is not None or any((directory / name).is_file() for name in DECIDING):
        return told
    return f"put the model's own files (tokenizer.json) beside its weights ({told})"


def _is_marked(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
