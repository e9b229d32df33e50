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
    manifest = read_json(directory / MANIFEST)
    files = manifest.get("files", {}) if isinstance(manifest, dict) else {}
    for shard in shards:
        known = files.get(shard.name)
        if known is None:
            raise RequestError(
                f"{directory / MANIFEST} does not know {shard.name}: the checkpoint was changed"
            )
        if known["bytes"] != shard.stat().st_size:
            raise RequestError(
                f"{shard} has {shard.stat().st_size} bytes instead of {known['bytes']}; fetch it again"
            )
        if full and sha256_file(shard) != known["sha256"]:
            raise RequestError(f"{shard} is not what was written (its sha256 differs); fetch it again")
    _check_plan(directory, {k: v for header in headers.values() for k, v in header.items()})
    return dict(manifest)


def _check_plan(directory: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    for module, form in plan_of(directory).items():
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
