"""Whether a directory is the checkpoint that lmpress wrote: no weight is used before it is known to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from lmpress.checkpoint.bounds import dense_model
from lmpress.checkpoint.files import MANIFEST, read_header, read_json, sha256_file, shard_paths
from lmpress.checkpoint.fit import check_fit
from lmpress.checkpoint.manifest import read_manifest
from lmpress.checkpoint.plugin import METHOD
from lmpress.errors import RequestError
from lmpress.forms import Form, form_from_description

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int16: "I16",
}
"""What safetensors calls the types that forms store."""


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
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    plan = quantization.get("plan", {}) if isinstance(quantization, dict) else {}
    try:
        return forms_of_plan(plan)
    except ValueError as error:
        raise RequestError(f"{directory / 'config.json'}: the plan is broken: {error}") from None


def forms_of_plan(plan: Any) -> dict[str, Form]:
    """The empty forms (meta device) of a plan, by module. ValueError names the one that is broken."""
    if not isinstance(plan, Mapping):
        raise ValueError(f"a plan is an object, not {short(plan)}")
    forms: dict[str, Form] = {}
    for name, description in plan.items():
        try:
            forms[name] = form_from_description(description)
        except ValueError as error:
            raise ValueError(f"{short(name)}: {error}") from None
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
        RequestError: a missing, truncated or changed file; a config of which there is no model; a plan that
            does not fit it, or a tensor that the plan does not expect.
    """
    shards = shard_paths(directory)
    headers = {shard.name: read_header(shard) for shard in shards}
    manifest = read_manifest(directory)
    files = manifest["files"]
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
    version = read_json(directory / "config.json")["quantization_config"].get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise RequestError(f"{directory / 'config.json'}: a format version is a number, not {version!r}")
    _check_plan(directory, {k: v for header in headers.values() for k, v in header.items()})
    return manifest


def _check_plan(directory: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    forms = plan_of(directory)
    try:
        check_fit(dense_model(directory), forms)
    except ValueError as error:
        raise RequestError(f"{directory / 'config.json'}: the plan is broken: {error}") from None
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
            found = entry["dtype"], tuple(entry["shape"])
            if found != (DTYPES[expected[name].dtype], tuple(expected[name].shape)):
                raise RequestError(
                    f"{directory}: {module}.{stored} is {found[0]} of shape {found[1]}, and its plan says "
                    f"{DTYPES[expected[name].dtype]} of shape {tuple(expected[name].shape)}"
                )
