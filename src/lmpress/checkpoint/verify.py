"""Whether a directory is the checkpoint that lmpress wrote: no weight is used before it is known to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from lmpress.checkpoint.bounds import dense_model
from lmpress.checkpoint.files import MANIFEST, read_header, read_json, sha256_file, shard_paths
from lmpress.checkpoint.fit import check_fit
from lmpress.checkpoint.manifest import read_manifest
from lmpress.checkpoint.plan import check_stored, check_version, empty_forms, names_in, spellings
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
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    plan = quantization.get("plan", {}) if isinstance(quantization, dict) else {}
    return empty_forms(plan, str(directory / "config.json"))


def verify_checkpoint(directory: Path, full: bool = True) -> dict[str, Any] | None:
    """Check a checkpoint before anything is built from it.

    Args:
        directory: a checkpoint that lmpress wrote, or that `save_pretrained` wrote of one.
        full: whether the files' hashes are compared too, and not only sizes, names and shapes.

    Returns:
        The manifest; None, and a note, where there is none: `save_pretrained` writes none.

    Raises:
        RequestError: a missing, truncated or changed file; a config of which there is no model; a plan that
            does not fit it, or a tensor that the plan does not expect.
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
        if known is None:
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
    forms, config = plan_of(directory), str(directory / "config.json")
    for name, header in tensors.items():
        module = name.rpartition(".")[0]
        if module not in forms and header["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise RequestError(f"{config}: its plan does not tell what {name} is")
    check_stored(forms, tensors, str(directory))
    model = dense_model(directory)
    names = names_in(model, forms)  # of a bare model, too, what was saved is a checkpoint
    held = {names.get(name, name): form for name, form in forms.items()}
    check_fit(model, held, config)
    _check_whole(directory, model, {f"{name}.weight" for name in held} | tensors.keys())


def _check_whole(directory: Path, model: Any, there: Set[str]) -> None:
    """RequestError where a weight of the model is nowhere, nor a twin of it: it would be drawn at random."""
    twins: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        twins.setdefault(id(tensor), []).append(name)
    for names in twins.values():
        if there.isdisjoint(place for name in names for place in spellings(model, name)):
            raise RequestError(
                f"{directory} lacks the tensor {names[0]} of a causal language model: fetch it again, or "
                "load it as what was saved (AutoModel, AutoModelForSequenceClassification, ...)"
            )
