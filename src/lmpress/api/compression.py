"""A model in, a checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmpress.api.loading import device_of, load
from lmpress.checkpoint import MANIFEST, read_json
from lmpress.errors import LmpressError, RequestError, writing
from lmpress.evaluation import disk_bytes, peak_resident_set
from lmpress.pipeline import (
    Run,
    RunOptions,
    at_work,
    discard,
    finish_publication,
    staged_files,
    written_files,
)
from lmpress.plan import make_plan
from lmpress.recipes import Recipe, load_recipe
from lmpress.recovery import check_recovery_text, recover_checkpoint
from lmpress.source import as_recipe_reads, open_source
from lmpress.stream.text import check_calibration

RECOVERED = "recovered"
"""Below the work directory: the checkpoint after training, until it is published."""


@dataclass(frozen=True)
class Compressed:
    """A finished compression.

    Attributes:
        directory: the checkpoint.
        manifest: what lmpress.json says.
        seconds: wall time of this call; of a resumed run, the last part of it.
        peak_resident_set: of the process, bytes.
    """

    directory: Path
    manifest: Mapping[str, Any]
    seconds: float
    peak_resident_set: int

    def load(self, **options: Any) -> Any:
        """The model, as `lmpress.load` gives it."""
        return load(self.directory, **options)

    def to_json(self) -> dict[str, Any]:
        """Sizes and what it took."""
        total = disk_bytes(self.directory)
        sizes = dict(self.manifest["sizes"])
        return {
            "directory": str(self.directory),
            "recipe": self.manifest["recipe"]["name"],
            "bytes_on_disk": total,
            **sizes,
            "ratio": total / sizes["bytes_16bit"],
            "seconds": round(self.seconds, 3),
            "peak_resident_set": self.peak_resident_set,
            "recovery": self.manifest.get("recovery"),
        }


def compress(
    model: str | Path,
    recipe: str | Path | Recipe | Mapping[str, Any],
    output: str | Path,
    *,
    calibration: str = "self",
    device: str = "auto",
    memory: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> Compressed:
    """Compress a model, and write a checkpoint that `from_pretrained` loads.

    Args:
        model: a directory, a .gguf file, a hub id, or `demo`.
        recipe: a shipped recipe's name, a YAML file, a mapping, or a `Recipe`.
        output: a directory that is empty or does not exist.
        calibration: `self` (the model writes it), a file, `wikitext2`, `c4`, or several joined by commas.
        device: `auto`, `cpu`, `cuda`, ...
        memory: bytes that the run may use for hidden states; larger ones are spooled to disk.
        resume: go on where an interrupted run stopped.
        force: overwrite an earlier checkpoint in `output`.

    Raises:
        RequestError: what was asked for cannot be done; nothing was changed.
        LmpressError: the work failed.
    """
    options = RunOptions(calibration, device_of(device), memory, resume, force)
    with writing(Path(output), "go on with --resume"):
        return compress_with(model, recipe, output, options)


def compress_with(
    model: str | Path,
    recipe: str | Path | Recipe | Mapping[str, Any],
    output: str | Path,
    options: RunOptions,
) -> Compressed:
    """`compress`, with its options in one. OSError where the system refuses to read or write."""
    start = time.perf_counter()
    target = Path(output).expanduser()
    wanted = load_recipe(recipe)  # before the model is looked for: that may take a download
    check_calibration(options.calibration)
    run = Run(open_source(model), wanted, target, options)
    fresh = not target.exists()
    with at_work(target, run.source, options.resume or options.force):
        if run.prepare():  # a refusal leaves what it found as it was
            _finish(run, fresh)
    manifest = read_json(target / MANIFEST)
    return Compressed(target, manifest, time.perf_counter() - start, peak_resident_set())


def _finish(run: Run, fresh: bool) -> None:
    """Execute a run, and leave no trace of it where nothing comes of it; `fresh` as `Run.abandon` has it."""
    try:
        _execute(run)
    except LmpressError as error:
        # nothing that a resumed run could go on from, or a fault that it would meet again
        if not run.journal.blocks() or (isinstance(error, RequestError) and not run.options.resume):
            run.abandon(fresh)
        raise


def _execute(run: Run) -> None:
    """Compress, recover, publish; each part is skipped where a resumed run has it behind itself."""
    step = run.recipe.recovery
    if run.journal.find("publishing") is None:
        if step is not None:
            check_recovery_text(run.source, step, run.options.calibration)
        manifest = run.execute()
        staged = run.staging
        if step is not None:
            staged = run.work / RECOVERED
            discard(staged)
            recover_checkpoint(
                run.source,
                run.staging,
                staged,
                manifest,
                step,
                run.plan.trained,
                run.options.calibration,
                run.recipe.seed,
                run.plan.dtype,
                run.options.device,
            )
        stale = sorted(written_files(run.output) - staged_files(staged))
        run.journal.append({"publishing": staged.name, "stale": stale})
    finish_publication(run.output)


def plan(
    model: str | Path, recipe: str | Path | Recipe | Mapping[str, Any], *, calibration: str = "self"
) -> dict[str, Any]:
    """What `compress` would do, as JSON, with the bytes to expect; nothing is computed or written."""
    wanted = load_recipe(recipe)
    check_calibration(calibration)
    source = as_recipe_reads(open_source(model), wanted)
    resolved = make_plan(wanted, source)
    predicted = resolved.predicted["bytes"]
    full = source.bytes_16bit
    told = resolved.to_json()
    told["predicted"] = told["predicted"] | {"bytes_16bit": full, "ratio": predicted / full}
    return told
