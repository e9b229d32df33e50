"""From finished shards to a checkpoint that transformers loads: config, index, tokenizer, manifest, card."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from lmpress.checkpoint import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    METHOD,
    read_header,
    read_json,
    sha256_file,
    sync_directory,
    write_bytes,
    write_json,
)
from lmpress.checkpoint.card import model_card
from lmpress.source import Descriptions, ModelSource
from lmpress.source.companions import REMOTE_CODE, is_companion
from lmpress.stream.text import CALIBRATION
from lmpress.version import __version__

COMPANIONS = "companions"
"""In the manifest: the files that go along with the weights, as they came from the source."""

LOCK = "lock"
"""In the work directory: held by the run that is at work there, and the last to go."""


def assemble(
    source: ModelSource,
    directory: Path,
    plan: dict[str, dict[str, Any]],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Write all that goes beside the shards into `directory`; equal inputs give equal bytes.

    Args:
        plan: the description of every compressed module's form.
        manifest: what the run has to tell; the environment and the files are added here.

    Returns:
        The manifest as written.
    """
    write_json(directory / "config.json", _config(source, plan))
    shards = sorted(directory.glob("model-*.safetensors"))
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        header = read_header(shard)
        weight_map |= dict.fromkeys(header, shard.name)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    write_json(
        directory / INDEX,
        {"metadata": {"total_size": total}, "weight_map": {k: weight_map[k] for k in sorted(weight_map)}},
    )
    source.copy_tokenizer(directory)
    hashed = [*shards, *([directory / CALIBRATION] if (directory / CALIBRATION).is_file() else [])]
    manifest = {
        "lmpress": __version__,
        **manifest,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        COMPANIONS: sorted(name for name in staged_files(directory) if is_companion(name)),
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in hashed},
    }
    write_json(directory / MANIFEST, manifest)
    write_bytes(directory / "README.md", model_card(manifest).encode(errors="backslashreplace"))
    return manifest


def publish(staging: Path, output: Path) -> None:
    """Move a finished checkpoint to where the user wants it; may be repeated after a crash.

    An older checkpoint's config goes first and the new one's comes last: in between there is nothing that
    loads, so that old and new weights are never taken for one model.
    """
    new = staged_files(staging)
    if "config.json" in new:
        (output / "config.json").unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (name == "config.json", name)):  # the config makes it loadable
        target = output / name
        target.parent.mkdir(exist_ok=True)
        os.replace(staging / name, target)
        if target.parent != output:
            sync_directory(target.parent)
    sync_directory(output)


def sizes(source: ModelSource, directory: Path, plan: Descriptions) -> dict[str, Any]:
    """What the checkpoint weighs: real bytes of the files, and bits per weight of the blocks' linears.

    bits per weight = 8 x all bytes stored for the linears, over the weights of the DENSE model's linears.
    """
    layout = source.layout
    shards = sorted(directory.glob("model-*.safetensors"))
    linears = list(layout.linears)
    stored = dict.fromkeys(linears, 0)
    for shard in shards:
        for name, entry in read_header(shard).items():
            module, _, tensor = name.rpartition(".")
            if module in stored and tensor != "bias":
                stored[module] += entry["data_offsets"][1] - entry["data_offsets"][0]
    dense = source.skeleton.state_dict(keep_vars=True)
    weights = sum(dense[f"{name}.weight"].numel() for name in linears)
    return {
        "weight_bytes": sum(shard.stat().st_size for shard in shards),
        "bytes_16bit": source.bytes_16bit,
        "linear_bpw": round(8 * sum(stored.values()) / max(1, weights), 6),
        "linear_weights": weights,
    }


def staged_files(staging: Path) -> set[str]:
    """The files of a checkpoint that is not published yet, as paths relative to it."""
    return {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}


def written_files(output: Path) -> set[str]:
    """The files of the checkpoint in `output`, as its manifest names them; empty where there is none."""
    path = output / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    names: set[str] = set()
    for key in ("files", COMPANIONS):
        named = manifest.get(key) if isinstance(manifest, dict) else None
        names |= {str(name) for name in named} if isinstance(named, dict | list) else set()
    return names


def remove_stale(output: Path, names: Iterable[str]) -> None:
    """Remove what an earlier checkpoint has and the new one lacks: weights, and what went along."""
    for name in names:
        weights = name == os.path.basename(name) and name.endswith(".safetensors")
        if weights or is_companion(name):
            (output / name).unlink(missing_ok=True)


def discard(directory: Path) -> None:
    """Delete a directory; of one in which a run is at work, all but its lock."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # the lock is there
        directory.rmdir()


def _config(source: ModelSource, plan: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the source's config says, and the plan. Code of the model's own is not named: none goes along."""
    config: dict[str, Any] = _stated(source)
    config |= json.loads(source.config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "torch_dtype", "quantization_config", *REMOTE_CODE):
        config.pop(key, None)
    config["architectures"] = [type(source.skeleton).__name__]
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    config["quantization_config"] = {"quant_method": METHOD, "version": FORMAT_VERSION, "plan": plan}
    return config


def _stated(source: ModelSource) -> dict[str, Any]:
    """The keys of the source's own config.json, defaults included: other tools have other defaults."""
    directory, gguf = source.location
    stated = {} if gguf else read_json(directory / "config.json")
    return dict(stated) if stated.get("model_type") == source.config.model_type else {}
