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
    calibration_windows,
    check_corpus,
    fingerprint,
    generate_text,
    load_corpus,
    split_specs,
)
from lmpress.errors import RequestError
from lmpress.pipeline.dense_model import load_dense
from lmpress.pipeline.source import ModelSource
from lmpress.pipeline.tokenizer_files import check_ids

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
        record: name, split, sha256, tokens, ids_sha256, for the manifest.
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


def calibration_text(
    spec: str, source: ModelSource, samples: int, seq_len: int, seed: int, device: str = "cpu"
) -> CalibrationText:
    """Windows from a corpus, or, for `self`, written by the model.

    Args:
        spec: a corpus name, a file, several of them joined by commas, or `self`.

    Raises:
        RequestError: an unknown or unreachable corpus, too little text, a window beyond the model's context.
    """
    context = getattr(source.config, "max_position_embeddings", None)
    if context is not None and seq_len > context:
        raise RequestError(
            f"calibration windows of {seq_len} tokens are longer than the model's context of {context}; "
            f"lower seq_len in the recipe"
        )
    tokenizer = source.tokenizer()
    if spec == "self":
        model = load_dense(source, torch.float32, device)
        windows = generate_text(model, tokenizer, samples, seq_len, seed).cpu()
        record: dict[str, Any] = {"name": "self", "split": "generated", "sha256": fingerprint(windows)}
    else:
        parts = [load_corpus(part) for part in split_specs(spec)]
        shares = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
        drawn = [
            calibration_windows(corpus, tokenizer, share, seq_len, seed + i)
            for i, (corpus, share) in enumerate(zip(parts, shares, strict=True))
            if share
        ]
        windows = torch.cat(drawn)
        record = {
            "name": ", ".join(corpus.name for corpus in parts),
            "split": ", ".join(corpus.split for corpus in parts),
            "sha256": ", ".join(corpus.sha256 for corpus in parts),
        }
    check_ids(source.name, windows, source.config.vocab_size)
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
            if manifest.get("source", {}).get("fingerprint") != source.fingerprint:
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
