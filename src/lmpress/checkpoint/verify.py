"""Whether a directory is the checkpoint that lmpress wrote: no weight is used before it is known to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmpress.checkpoint.files import MANIFEST, read_header, read_json, sha256_file, shard_paths
from lmpress.checkpoint.plugin import METHOD
from lmpress.errors import RequestError
from lmpress.forms import Form, form_from_description


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
    plan = config.get("quantization_config", {}).get("plan", {})
    forms: dict[str, Form] = {}
    try:
        for name, description in plan.items():
            forms[name] = form_from_description(description)
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(f"{directory / 'config.json'}: the plan is broken: {error}") from None
    return forms


def stored_names(form: Form) -> dict[str, str]:
    """How the tensors of a form are called under their module: the first one is `weight`."""
    names = list(form.tensors())
    return {name: "weight" if i == 0 else name for i, name in enumerate(names)}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. RequestError where it is missing or lacks a part."""
    manifest = read_json(directory / MANIFEST)
    parts = {"files": dict, "modules": dict, "sizes": dict, "recipe": dict, "calibration": list}
    for key, kind in parts.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise RequestError(f"{directory / MANIFEST} is no manifest that lmpress wrote (it lacks {key!r})")
    return dict(manifest)


def verify_checkpoint(directory: Path, full: bool = True) -> dict[str, Any]:
    """Check a checkpoint before anything is built from it.

    Args:
        directory: a checkpoint that lmpress wrote.
        full: whether the files' hashes are compared too, and not only sizes, names and shapes.

    Returns:
        The manifest.

    Raises:
        RequestError: a missing, truncated or changed file; a tensor that the plan does not expect.
    """
    shards = shard_paths(directory)
    headers = {shard.name: read_header(shard) for shard in shards}
    manifest = read_manifest(directory)
    files = manifest["files"]
    for shard in shards:
        known = files.get(shard.name)
        if not isinstance(known, dict) or not {"bytes", "sha256"} <= known.keys():
            raise RequestError(
                f"{directory / MANIFEST} does not know {shard.name}: the checkpoint was changed"
            )
        if known["bytes"] != shard.stat().st_size:
            raise RequestError(
                f"{shard} has {shard.stat().st_size} bytes instead of {known['bytes']}; fetch it again"
            )
        if full and sha256_file(shard) != known["sha256"]:
            raise RequestError(f"{shard} is not what was written (its sha256 differs); fetch it again")
    version = read_json(directory / "config.json")["quantization_config"].get("version")
    if not isinstance(version, int):
        raise RequestError(f"{directory / 'config.json'}: a format version is a number, not {version!r}")
    _check_plan(directory, {k: v for header in headers.values() for k, v in header.items()})
    return manifest


def _check_plan(directory: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    forms = plan_of(directory)
    for name, header in tensors.items():
        module = name.rpartition(".")[0]
        if module not in forms and header["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise RequestError(f"{directory / 'config.json'}: its plan does not tell what {name} is")
    for module, form in forms.items():
        expected = form.tensors()
        for name, stored in stored_names(form).items():
            entry = tensors.get(f"{module}.{stored}")
            if entry is None:
                raise RequestError(f"{directory} lacks the tensor {module}.{stored}, which its plan names")
            if tuple(entry["shape"]) != tuple(expected[name].shape):
                raise RequestError(
                    f"{directory}: {module}.{stored} has shape {tuple(entry['shape'])}, and its plan says "
                    f"{tuple(expected[name].shape)}"
                )
