"""Models of every kind that commands take, loaded and ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lmpress.checkpoint import (
    check_bounds,
    checked_resident,
    is_compressed,
    use_sparse_cores,
    verify_checkpoint,
)
from lmpress.errors import LmpressError, RequestError
from lmpress.forms.base import float_dtype
from lmpress.source import load_dense, open_source, read_tokenizer


def load(directory: str | Path, *, verify: bool = True, resident: str | None = None, **options: Any) -> Any:
    """Load a checkpoint: `AutoModelForCausalLM.from_pretrained` behind a check of its files.

    Args:
        directory: a checkpoint that lmpress wrote, or `save_pretrained` of one, or any dense model directory.
        verify: compare the files' hashes with the manifest; where there is none, a note says so.
        resident: how entropy-coded weights are kept in memory: `decoded` once, or `coded` as in the files and
            decoded in every call, which is slow. As config.json says where it is None, which is `decoded`
            unless somebody wrote it there. Saving the model again does not write it.
        options: passed on (`dtype`, `device_map`, ...).

    Raises:
        RequestError: a missing, truncated or changed file; another `resident`.
        LmpressError: what the files hold cannot be loaded.
    """
    if resident is not None:
        checked_resident(resident)
    path = Path(directory)
    if not path.is_dir():
        raise RequestError(f"there is no checkpoint at {path}")
    compressed = is_compressed(path)
    if compressed:
        verify_checkpoint(path, full=verify)
    else:
        check_bounds(path)
    try:
        if compressed and resident is not None:
            return _load_resident(path, resident, options)
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)
    except LmpressError:
        raise
    except Exception as error:  # transformers raises whatever the files made it raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LmpressError(f"{path} does not load: {lines[0] if lines else error!r}") from error


def _load_resident(path: Path, resident: str, options: dict[str, Any]) -> Any:
    """As `from_pretrained`, which hears of such wishes from the config alone."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    stated = config.quantization_config.get("resident")
    config.quantization_config["resident"] = resident
    model = AutoModelForCausalLM.from_pretrained(path, config=config, trust_remote_code=False, **options)
    model.config.quantization_config.stated = stated
    return model


def load_any(model: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any, Path | None]:
    """A model of any kind that commands take: (model, tokenizer, the path whose bytes it is measured by)."""
    path = Path(model).expanduser()
    chosen, asked = device_of(device), _dtype(dtype)
    if path.is_dir() and is_compressed(path):
        plain = GenerationConfig()  # as a dense model below has it; what a file says may not even be valid
        loaded = load(path, dtype=asked or "auto", generation_config=plain).to(chosen)
        use_sparse_cores(loaded)
        return loaded, read_tokenizer(path, None, str(path), loaded.config), path
    source = open_source(model)
    wanted = asked or (torch.float32 if source.dtype == torch.float64 else source.dtype)
    directory, gguf = source.location
    return load_dense(source, wanted, chosen), source.tokenizer(), None if gguf else directory


def _dtype(name: str) -> torch.dtype | None:
    """The type that a model computes in; None for `auto`."""
    if name == "auto":
        return None
    try:
        return float_dtype(name)
    except ValueError as error:
        raise RequestError(f"dtype: {error}, auto") from None


def device_of(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"device {device!r} is not to be had ({reason}); try --device cpu") from None
    return device
