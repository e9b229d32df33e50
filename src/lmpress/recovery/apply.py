"""Recovery of a staged checkpoint: load, train, write the changed forms into new shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmpress.checkpoint import plan_of, read_json, stored_names, write_tensors
from lmpress.corpora import check_context, check_ids, draw_windows, fingerprint
from lmpress.errors import RequestError
from lmpress.forms import Dense, Form, in_storage
from lmpress.forms.linear import FormHolder
from lmpress.pipeline import assemble, sizes
from lmpress.recipes import Recover
from lmpress.recovery.lora import train_lora
from lmpress.recovery.merge import as_term, merged
from lmpress.source import ModelSource
from lmpress.stream.text import CALIBRATION, read_corpora, small_ids, vocabulary_of


def recover_checkpoint(
    source: ModelSource,
    staged: Path,
    target: Path,
    manifest: dict[str, Any],
    step: Recover,
    modules: Sequence[str],
    calibration: str,
    seed: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train as `step` says, and write the recovered checkpoint into `target`.

    Args:
        staged: the compressed checkpoint.
        target: an empty directory.
        manifest: of the staged checkpoint.
        modules: full names of the linears that are trained.
        calibration: what text to train on, as for calibration; `self` takes the windows that the model wrote.
        dtype: of the linears that are stored dense.

    Returns:
        The manifest of the recovered checkpoint.
    """
    windows, record = recovery_windows(source, staged, step, calibration, seed, tell=True)
    model = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32).to(device)
    recovered = train_lora(model, modules, windows, step, seed)
    forms = _staged_forms(staged)
    changed = {
        name: _changed(model.get_submodule(name), forms.get(name), update, step, dtype)
        for name, update in recovered.updates.items()
        if recovered.report["best_step"]
    }
    plan = _write(staged, target, changed, windows)
    manifest = {
        key: value for key, value in manifest.items() if key not in ("environment", "files", "lmpress")
    }
    for name, form in changed.items():
        manifest["modules"][name] = manifest["modules"].get(name, {}) | {
            "form": form.formula,
            "bytes": form.num_bytes,
        }
    manifest |= {
        "calibration": [*manifest["calibration"], record],
        "sizes": sizes(source, target, plan),
        "recovery": recovered.report | {"step": step.model_dump(mode="json"), "modules": len(changed)},
    }
    return assemble(source, target, plan, manifest)


def check_recovery_text(source: ModelSource, step: Recover, calibration: str) -> None:
    """Refuse what training could not work with, before anything is computed.

    Raises:
        RequestError: windows beyond the model's context; text that gives fewer than two of them.
    """
    check_context(source.config, step.seq_len, "windows of recover", "lower its `seq_len`")
    if calibration != "self":
        recovery_windows(source, Path(), step, calibration, 0)


def recovery_windows(
    source: ModelSource, staged: Path, step: Recover, calibration: str, seed: int, *, tell: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Windows to train on (samples, seq_len): as many as the steps need, or as the text has.

    Of several texts every prefix is a fair mix, so what is held out has all of them.

    Args:
        tell: on standard error, what was taken of rows.

    Raises:
        RequestError: the text gives fewer than two windows.
    """
    wanted = int(step.steps * step.batch_size / (1 - step.held_out)) + 2
    if calibration == "self":
        flat = load_file(staged / CALIBRATION)["input_ids"].long().flatten()
        windows = flat[: flat.numel() // step.seq_len * step.seq_len].view(-1, step.seq_len)[:wanted]
        record: dict[str, Any] = {
            "name": "self (recovery)",
            "split": "generated",
            "sha256": fingerprint(windows),
        }
    else:
        corpora = read_corpora(calibration, tell=tell)
        wanted = max(wanted, len(corpora))
        windows, record = draw_windows(
            corpora, source.tokenizer(), wanted, step.seq_len, seed + 101, fewer=True
        )
        check_ids(windows, vocabulary_of(source), record["name"])
        record["name"] += " (recovery)"
    if windows.shape[0] < 2:
        raise RequestError(f"recover needs at least two windows of {step.seq_len} tokens: give it more text")
    return windows, record | {"tokens": windows.numel(), "ids_sha256": fingerprint(windows)}


def _staged_forms(staged: Path) -> dict[str, Form]:
    """The forms of a checkpoint by module, as its files have them: what runs may be another form."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(staged.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    forms = {}
    for name, empty in plan_of(staged).items():
        stored = stored_names(empty)
        forms[name] = empty.with_tensors({key: tensors[f"{name}.{own}"] for key, own in stored.items()})
    return forms


def _changed(
    module: nn.Module, stored: Form | None, update: tuple[Tensor, Tensor], step: Recover, dtype: torch.dtype
) -> Form:
    """The module's form with its update, in the types in which it is stored."""
    form: Form | None = module.stored_form if isinstance(module, FormHolder) else None
    if form is None:
        form = Dense(in_storage(cast(Tensor, module.weight).detach(), dtype))
    elif stored is not None and step.keep == "merge":
        names = stored.tensors()
        form = form.with_tensors({name: t.to(names[name].dtype) for name, t in form.tensors().items()})
    elif stored is not None:
        form = stored
    return as_term(form, *update, dtype) if step.keep == "term" else merged(form, *update)


def _write(staged: Path, target: Path, changed: dict[str, Form], windows: Tensor) -> dict[str, Any]:
    """Copy the shards with the changed forms in the place of the old ones. Returns the new plan."""
    target.mkdir(parents=True, exist_ok=True)
    config = read_json(staged / "config.json")
    plan: dict[str, Any] = dict(config["quantization_config"]["plan"])
    for shard in sorted(staged.glob("model-*.safetensors")):
        tensors = load_file(shard)
        modules = {name.rpartition(".")[0] for name in tensors}
        for module in sorted(modules & changed.keys()):
            for name in [n for n in tensors if n.rpartition(".")[0] == module and not n.endswith(".bias")]:
                del tensors[name]
            form = changed[module]
            names = stored_names(form)
            tensors |= {f"{module}.{names[key]}": tensor for key, tensor in form.tensors().items()}
            plan[module] = form.describe()
        write_tensors(target / shard.name, tensors)
    seen = load_file(staged / CALIBRATION) if (staged / CALIBRATION).is_file() else {}
    write_tensors(target / CALIBRATION, {**seen, "recovery_ids": small_ids(windows)})
    return plan
