"""Checkpoints measured and looked into."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lmpress.api.loading import load_any
from lmpress.checkpoint import (
    MANIFEST,
    is_compressed,
    model_card,
    read_manifest,
    read_tensors,
    sha256_file,
    verify_checkpoint,
    write_bytes,
)
from lmpress.corpora import (
    Corpus,
    check_corpus,
    check_distinct,
    evaluation_split,
    evaluation_windows,
    load_corpus,
)
from lmpress.errors import RequestError, writing
from lmpress.evaluation import (
    Evaluation,
    EvaluationText,
    ModuleRow,
    TextProtocol,
    Timing,
    bytes_16bit,
    check_windows,
    default_window,
    evaluate_models,
    module_table,
    refuse_seen_text,
    spq_text,
    stored_bits_per_weight,
    weight_bytes,
)
from lmpress.progress import note
from lmpress.stream.text import CALIBRATION


def evaluate(
    model: str | Path,
    *,
    text: str | Sequence[str] = "python-docs",
    reference: str | Path | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    paper_protocol: str | None = None,
    throughput: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Evaluation:
    """Measure a model: perplexity on text that it has not seen, divergence from a reference, size, speed.

    Args:
        model: a checkpoint, or any model that `compress` takes.
        text: one corpus or several: a file, `python-docs`, `wikitext2`, `c4`.
        reference: the dense model, measured in the same run on the same windows.
        window: tokens a window; min(2048, context) by default.
        max_tokens: of each text, None for all.
        paper_protocol: `spq` repeats that paper's one-window measure, under its label.
        throughput: also time prefill and decoding.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16`, ...

    Raises:
        RequestError: text that the checkpoint was made with, among others.
    """
    names: dict[str, str | Path] = {} if reference is None else {"dense": reference}
    own = Path(model).name or str(model)
    own = own if own != "dense" else "compressed"
    results = evaluate_many(
        names | {own: model},
        text=text,
        reference="dense" if reference is not None else None,
        window=window,
        max_tokens=max_tokens,
        paper_protocol=paper_protocol,
        throughput=throughput,
        dtype=dtype,
        device=device,
    )
    return results[own]


def evaluate_many(
    models: Mapping[str, str | Path],
    *,
    text: str | Sequence[str] = "python-docs",
    reference: str | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    paper_protocol: str | None = None,
    throughput: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Evaluation]:
    """Measure several models in one pass over each text; `evaluate` says what the arguments mean."""
    if paper_protocol not in (None, "spq"):
        raise RequestError(f"there is no paper protocol {paper_protocol!r}; there is spq")
    specs = [text] if isinstance(text, str) else text
    for spec in specs:
        check_corpus(spec)
    loaded = {name: load_any(model, dtype, device) for name, model in models.items()}
    return evaluate_loaded(
        loaded, models, specs, reference, window, max_tokens, paper_protocol, throughput=throughput
    )


def evaluate_loaded(
    loaded: Mapping[str, tuple[Any, Any, Path | None]],
    models: Mapping[str, str | Path],
    specs: Sequence[str],
    reference: str | None,
    window: int | None,
    max_tokens: int | None,
    paper_protocol: str | None,
    *,
    throughput: bool,
) -> dict[str, Evaluation]:
    corpora = [load_corpus(spec, evaluation_split(spec)) for spec in specs]
    check_distinct(corpora)
    model, tokenizer, _ = next(iter(loaded.values()))
    texts = [
        _evaluation_text(corpus, tokenizer, model.config, window, max_tokens, paper_protocol)
        for corpus in corpora
    ]
    for account in filter(None, (corpus.account for corpus in corpora)):
        note(account)
    for text in texts:
        for reader, _, _ in loaded.values():
            check_windows(text, reader.config)
    for path in (Path(model) for model in models.values()):
        if path.is_dir() and is_compressed(path):
            _refuse_seen(path, corpora, texts)
    return evaluate_models(
        {name: parts[0] for name, parts in loaded.items()},
        texts,
        {name: parts[2] for name, parts in loaded.items()},
        reference,
        Timing() if throughput else None,
    )


def _evaluation_text(
    corpus: Corpus,
    tokenizer: Any,
    config: Any,
    window: int | None,
    max_tokens: int | None,
    protocol: str | None,
) -> EvaluationText:
    if protocol == "spq":
        return spq_text(corpus, tokenizer, tokenizer.bos_token_id)
    size = default_window(config) if window is None else window
    windows = evaluation_windows(corpus, tokenizer, size, max_tokens)
    if not windows:
        raise RequestError(f"{corpus.name} has fewer than two tokens: nothing to evaluate on")
    return EvaluationText(TextProtocol.of(corpus, windows, size, tokenizer.bos_token_id), windows)


def _refuse_seen(checkpoint: Path, corpora: Sequence[Corpus], texts: Sequence[EvaluationText]) -> None:
    if not (checkpoint / MANIFEST).exists():
        note(f"{checkpoint} does not tell what text it was made with: text that was seen is not refused")
        return
    manifest = read_manifest(checkpoint)
    record = manifest["calibration"]
    if not record:
        return
    if not (checkpoint / CALIBRATION).is_file():
        raise RequestError(
            f"{checkpoint / CALIBRATION} is missing: without it, text that was seen cannot be refused"
        )
    ids = read_tensors(checkpoint / CALIBRATION)
    known = manifest["files"].get(CALIBRATION)
    if known is not None and sha256_file(checkpoint / CALIBRATION) != known["sha256"]:
        raise RequestError(f"{checkpoint / CALIBRATION} is not what was written: fetch it again")
    keys = {str(entry["name"]): _ids_key(str(entry["name"])) for entry in record}
    seen = {name: ids[key].long() for name, key in keys.items() if key in ids}
    spread = [entry | {"sha256": sha} for entry in record for sha in str(entry.get("sha256")).split(", ")]
    for corpus, text in zip(corpora, texts, strict=True):
        shared = refuse_seen_text(spread, corpus, text.windows, seen)
        found = max(shared.values(), default=0)
        if found:
            note(f"{found} 13-grams of {corpus.name} are in the text that {checkpoint} was made with")


def _ids_key(name: str) -> str:
    """The tensor that holds the token ids of a text, by the name in its record."""
    return "recovery_ids" if name.endswith("(recovery)") else "input_ids"


def inspect(directory: str | Path) -> tuple[dict[str, Any], list[ModuleRow]]:
    """What each module of a checkpoint became: (everything as JSON, the rows of the table).

    Of a directory that `save_pretrained` wrote, the sizes are measured, and the rest of the manifest is null.

    Raises:
        RequestError: no checkpoint that lmpress wrote, or one that is damaged.
    """
    path = Path(directory)
    if not path.is_dir() or not is_compressed(path):
        raise RequestError(f"{path} is no checkpoint that lmpress wrote")
    manifest = verify_checkpoint(path, full=False) or {"sizes": _sizes(path), "modules": {}}
    rows = module_table(path)
    unchanged: dict[str, int] = {}
    for report in manifest["modules"].values():
        for step in report.get("steps", []):
            if step.get("reason"):
                kind = f"{step['step']}: factors would take more than the weight"
                unchanged[kind] = unchanged.get(kind, 0) + 1
    told = {
        key: manifest.get(key) for key in ("source", "recipe", "sizes", "calibration", "survey", "recovery")
    }
    return told | {"unchanged": unchanged, "modules": manifest["modules"]}, rows


def _sizes(path: Path) -> dict[str, Any]:
    """What a manifest says of sizes, from the files themselves."""
    config = AutoConfig.from_pretrained(path)
    return {
        "weight_bytes": weight_bytes(path),
        "bytes_16bit": bytes_16bit(config),
        "linear_bpw": stored_bits_per_weight(path, config),
    }


def check_card(directory: Path) -> None:
    """RequestError where there is no model card that can be written into."""
    if not is_compressed(directory):
        raise RequestError(f"{directory} is no checkpoint that lmpress wrote: it has no card to write into")
    if not (directory / MANIFEST).exists():
        raise RequestError(
            f"{directory / MANIFEST} is missing, and a card is made from it (save_pretrained writes none)"
        )
    if not os.access(directory, os.W_OK):
        raise RequestError(f"{directory}: permission denied; its card cannot be written into")


def write_card(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Write what was measured into a checkpoint's model card."""
    check_card(directory)
    card = model_card(read_manifest(directory), evaluation)
    with writing(directory, "run it again"):
        write_bytes(directory / "README.md", card.encode(errors="backslashreplace"))
