"""The text that the methods look at, and the record of it that goes into the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lmpress.checkpoint import MANIFEST, read_json
from lmpress.corpora import (
    Corpus,
    check_context,
    check_corpus,
    check_distinct,
    check_ids,
    draw_windows,
    fingerprint,
    generate_text,
    load_corpus,
    split_specs,
)
from lmpress.errors import RequestError
from lmpress.progress import note
from lmpress.source import ModelSource, load_dense

CALIBRATION = "calibration.safetensors"
"""The token ids that calibration and recovery saw, kept so that evaluation can refuse them."""


def products_in(precision: str, device: torch.device) -> torch.dtype:
    """What the products of the blocks are computed in; `auto` is bfloat16 where the device multiplies it."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    made = device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return torch.bfloat16 if made else torch.float32


@dataclass(frozen=True)
class CalibrationText:
    """Token windows and where they come from.

    Attributes:
        windows: token ids (samples, seq_len).
        record: name, split, sha256, tokens, ids_sha256, for the manifest; what each corpus gave.
    """

    windows: Tensor
    record: dict[str, Any]


def check_calibration(spec: str) -> None:
    """Refuse a corpus or file that does not exist, whether or not a recipe needs it; no text is read.

    Args:
        spec: as for `calibration_text`.

    Raises:
        RequestError: an unknown corpus, or a file that is missing.
    """
    if spec != "self":
        for part in split_specs(spec):
            check_corpus(part)


def read_corpora(spec: str, *, tell: bool = True) -> list[Corpus]:
    """Corpora (their train split) and files that are joined by commas; what was taken of rows is told."""
    corpora = [load_corpus(part) for part in split_specs(spec)]
    check_distinct(corpora)
    for account in filter(None, (corpus.account for corpus in corpora if tell)):
        note(account)
    return corpora


def vocabulary_of(source: ModelSource) -> int:
    """Rows of the model's embedding."""
    return int(source.skeleton.get_submodule(source.layout.embedding).num_embeddings)


def calibration_text(
    spec: str, source: ModelSource, samples: int, seq_len: int, seed: int, device: str = "cpu"
) -> CalibrationText:
    """Windows from a corpus, or, for `self`, written by the model.

    Args:
        spec: a corpus name, a file, several of them joined by commas, or `self`.

    Returns:
        windows of which every prefix is a fair mix of all the texts: surveys look at the first ones alone.

    Raises:
        RequestError: an unknown or unreachable corpus, too little text, a window beyond the model's context,
            tokens that the model has no embedding for.
    """
    check_context(source.config, seq_len, "calibration windows", "lower `seq_len` in the recipe")
    tokenizer = source.tokenizer()
    if spec == "self":
        model = load_dense(source.given, torch.float32, device)
        windows = generate_text(model, tokenizer, samples, seq_len, seed).cpu()  # every one drawn alike
        record: dict[str, Any] = {"name": "self", "split": "generated", "sha256": fingerprint(windows)}
    else:
        corpora = read_corpora(spec)
        windows, record = draw_windows(corpora, tokenizer, samples, seq_len, seed)
        check_ids(windows, vocabulary_of(source), record["name"])
    record |= {"samples": samples, "seq_len": seq_len, "seed": seed}
    return CalibrationText(windows, record | {"tokens": windows.numel(), "ids_sha256": fingerprint(windows)})


def borrowed_text(
    lenders: Sequence[Path], source: ModelSource, samples: int, seq_len: int, seed: int
) -> CalibrationText | None:
    """The text that the model wrote for an earlier checkpoint, if it would write the same again."""
    wanted = {"name": "self", "samples": samples, "seq_len": seq_len, "seed": seed}
    for lender in lenders:
        if not (lender / MANIFEST).is_file() or not (lender / CALIBRATION).is_file():
            continue
        try:
            manifest = read_json(lender / MANIFEST)
            if manifest.get("source", {}).get("fingerprint") != source.given.fingerprint:
                continue
            for record in manifest.get("calibration") or []:
                if wanted.items() <= record.items():
                    windows = load_file(lender / CALIBRATION)["input_ids"].long()
                    if fingerprint(windows) == record["ids_sha256"]:
                        return CalibrationText(windows, record)
        except (RequestError, SafetensorError, AttributeError, KeyError):
            continue  # damaged: it lends nothing, and the text is written again
    return None


def small_ids(windows: Tensor) -> Tensor:
    """Token ids in the smallest type that holds them, for the checkpoint."""
    return windows.to(torch.uint16 if int(windows.max()) < 1 << 16 else torch.int32)
