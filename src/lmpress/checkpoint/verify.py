"""Whether a directory is the checkpoint that lmpress wrote: no weight is used before it is known to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmpress.checkpoint.files import MANIFEST, read_header, read_json, sha256_file, shard_paths
from lmpress.checkpoint.plan import check_stored, check_version, empty_forms
from lmpress.checkpoint.plugin import METHOD
from lmpress.errors import RequestError
from lmpress.forms import Form
from lmpress.progress import note


def is_compressed(directory: Path) -> bool:
    """Whether the directory's config.json says that lmpress wrote it."""
    if not (directory / "config.json").is_file():
        return False
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def plan_of(directory: Path) -> dict[str, Form]:
    """The empty forms (meta device) of a checkpoint, by module. RequestError where the plan is broken."""
    config = read_json(directory / "config.json")
    return empty_forms(config.get("quantization_config", {}).get("plan", {}), str(directory / "config.json"))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. RequestError where it is missing or lacks a part."""
    manifest = read_json(directory / MANIFEST)
    parts = {"files": dict, "modules": dict, "sizes": dict, "recipe": dict, "calibration": list}
    for key, kind in parts.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise RequestError(f"{directory / MANIFEST} is no manifest that lmpress wrote (it lacks {key!r})")
    return dict(manifest)


def verify_checkpoint(directory: Path, full: bool = True) -> dict[str, Any] | None:
    """Check a checkpoint before anything is built from it.

    Args:
        directory: a checkpoint that lmpress wrote, or that `save_pretrained` wrote of one.
        full: whether the files' hashes are compared too, and not only sizes, names and shapes.

    Returns:
        The manifest; None, and a note, where there is none: `save_pretrained` writes none.

    Raises:
        RequestError: a missing, truncated or changed file; a tensor that the plan does not expect.
        LmpressError: a format that this lmpress does not know yet.
    """
    config = directory / "config.json"
    check_version(read_json(config)["quantization_config"].get("version"), str(config))
    shards = shard_paths(directory)
    headers = {shard.name: read_header(shard) for shard in shards}
    manifest = None
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        _compare_files(directory, shards, manifest["files"], full)
    else:
        note(f"{directory} has no {MANIFEST} (save_pretrained writes none): no hashes are compared")
    _check_plan(directory, {k: v for header in headers.values() for k, v in header.items()})
    return manifest


def _compare_files(directory: Path, shards: Sequence[Path], files: Mapping[str, Any], full: bool) -> None:
    for shard in shards:
        known = files.get(shard.name)
        if not isinstance(known, dict) or not {"bytes", "sha256"} <= known.keys():
            raise RequestError(
                f"{directory / MANIFEST} does not know {shard.name}: the checkpoint was changed; if you "
                f"saved it again on purpose, delete {MANIFEST}"
            )
        if known["bytes"] != shard.stat().st_size:
            raise RequestError(
                f"{shard} has {shard.stat().st_size} bytes instead of {known['bytes']}; fetch it again"
            )
        if full and sha256_file(shard) != known["sha256"]:
            raise RequestError(f"{shard} is not what was written (its sha256 differs); fetch it again")


def _check_plan(directory: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    forms = plan_of(directory)
    for name, header in tensors.items():
        module = name.rpartition(".")[0]
        if module not in forms and header["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise RequestError(f"{directory / 'config.json'}: its plan does not tell what {name} is")
    check_stored(forms, tensors, str(directory))
