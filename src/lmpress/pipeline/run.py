"""A run: source + recipe + text -> a checkpoint, block by block, resumable at every block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmpress.checkpoint import sha256_file, write_tensors
from lmpress.errors import RequestError
from lmpress.forms import Dense, Form
from lmpress.pipeline.assemble import assemble, discard, sizes
from lmpress.pipeline.beforehand import Beforehand
from lmpress.pipeline.block import BlockResult, BlockTask
from lmpress.pipeline.heap import give_back_memory
from lmpress.pipeline.journal import WORK, Journal, file_entry
from lmpress.pipeline.outer import rewrite_outer
from lmpress.pipeline.output import (
    check_empty,
    check_foreign,
    check_output,
    finish_publication,
    finished_fingerprint,
)
from lmpress.pipeline.setting import RunOptions, Setting
from lmpress.plan import Plan, make_plan
from lmpress.progress import note, track
from lmpress.recipes import Recipe
from lmpress.source import (
    ModelSource,
    as_recipe_reads,
    block_tensors,
    failing_at,
    outer_tensors,
    restored_block,
    restored_outer,
)
from lmpress.stream import BlockStream, Walk
from lmpress.stream.text import CalibrationText
from lmpress.survey import Allocation
from lmpress.version import __version__

ATTEMPTS = 2
"""A block whose bits were predicted badly is done again, once."""


@dataclass(frozen=True)
class Streams:
    """The calibration text: through the compressed model and, where a step asks, through the dense one.

    Attributes:
        compressed: None where no block needs text.
        dense: None where no step needs it.
    """

    compressed: BlockStream | None = None
    dense: BlockStream | None = None


@dataclass
class Run:
    """One compression, from an open source to the staged checkpoint."""

    source: ModelSource
    recipe: Recipe
    output: Path
    options: RunOptions
    plan: Plan = field(init=False)
    journal: Journal = field(init=False)
    setting: Setting = field(init=False)

    def __post_init__(self) -> None:
        self.source = as_recipe_reads(self.source, self.recipe)
        self.plan = make_plan(self.recipe, self.source)
        self.work = self.output / WORK
        self.journal = Journal(self.work)
        self.staging = self.journal.staging
        self.setting = Setting(self.source, self.plan, self.options, self.work)

    @property
    def fingerprint(self) -> str:
        """Of all that decides the result: model, recipe, calibration text, version."""
        spec = self.options.calibration
        if spec != "self":
            parts = [part.strip().removeprefix("file:") for part in spec.split(",")]
            spec = ",".join(sha256_file(Path(p)) if Path(p).is_file() else p for p in parts)
        decided = {
            "model": self.source.fingerprint,
            "recipe": self.recipe.resolved(),
            "calibration": spec,
            "precision": str(self.setting.precision) if self.plan.needs_text else None,
            "version": __version__,
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def prepare(self) -> bool:
        """Look at the output directory; whether there is anything left to do.

        Raises:
            RequestError: the directory is in use, and neither resume nor force was asked for; or the model's
                tokenizer is none that can go along.
        """
        check_output(self.output, self.source, self.options.resume or self.options.force)
        if self.options.force:
            finish_publication(self.output)  # what is half in place is made whole before it is replaced
            check_foreign(self.output)
        fingerprint = self.fingerprint
        if self.options.resume:
            found = self.journal.open()
            finished = finished_fingerprint(self.output)
            if found == fingerprint:
                done, blocks = len(self.journal.blocks()), self.source.layout.num_blocks
                note(f"Resuming: {done} of {blocks} blocks are done")
                self.staging.mkdir(parents=True, exist_ok=True)
                return True
            if found is None and finished == fingerprint:
                note(f"{self.output} is finished already")
                return False
            if found is not None or finished is not None:
                raise RequestError(
                    f"{self.output} holds a run of another model, recipe, calibration, precision or version; "
                    "name another directory, or overwrite it with --force"
                )
            if not self.options.force:
                check_empty(self.output)
        self.source.check_tokenizer()
        discard(self.work)
        self.staging.mkdir(parents=True)
        self.journal.start(fingerprint)
        return True

    def abandon(self, fresh: bool) -> None:
        """Leave no trace of a run that came to nothing; `fresh` tells that it made the output directory."""
        if self.journal.entries:  # else what is there is not this run's
            discard(self.work)
        if fresh and self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()

    def execute(self) -> dict[str, Any]:
        """Compress, and stage the checkpoint in the work directory. Returns its manifest."""
        written = self.options.calibration == "self" and self.plan.recovers
        ask = Beforehand(self.setting, self.journal)
        text = ask.text() if self.plan.needs_text or written else None
        weights = ask.weights(text)
        allocation = ask.allocation(text, weights)
        outer = self._outer(allocation)
        allocation = ask.widths(allocation, text, self._outer_model, weights)
        done = {entry["block"]: entry for entry in self.journal.blocks()}
        blocks = self.source.layout.num_blocks
        streams = self._streams(text, weights) if len(done) < blocks else Streams()
        for i in track(range(blocks), f"Compressing {self.source.name} with {self.recipe.name}"):
            if i in done:
                self._pass_by(i, streams, done[i])
            else:
                self._block(i, streams, allocation.after(self.journal.blocks()))
                give_back_memory()
        entries = [outer, *self.journal.blocks()]
        return self._assemble(entries, text, allocation.after(self.journal.blocks()))

    def _streams(self, text: CalibrationText | None, weights: Mapping[str, Tensor]) -> Streams:
        if text is None or not self.plan.needs_text:
            return Streams()
        compressed = self.setting.stream(text, self._outer_model(), weights)
        if not self.plan.needs_original:
            return Streams(compressed)
        return Streams(compressed, self.setting.stream(text, self.setting.dense_outer(), weights))

    def _pass_by(self, i: int, streams: Streams, entry: Mapping[str, Any]) -> None:
        """Let the text through a block that an earlier run finished."""
        if streams.dense is not None:
            streams.dense.block(i).advance(self.setting.dense_block(i))
        if streams.compressed is not None:
            shard = self.staging / entry["file"]
            block = restored_block(self.source, i, shard, entry["plan"], self.setting.device)
            streams.compressed.block(i).advance(block)

    def _outer(self, allocation: Allocation) -> dict[str, Any]:
        """Embeddings, last norm and head: rewritten and stored first, for the stream begins with them."""
        entry = self.journal.find("outer")
        if entry is not None:
            return entry
        tensors = self.source.read(self.source.outer_names)
        forms: dict[str, Form] = {}
        report: dict[str, Any] = {}
        for name in self.plan.outer:
            if self.plan.modules[name].steps:
                weight = tensors[f"{name}.weight"].to(self.setting.device, torch.float32)
                with failing_at(name):
                    metric = allocation.table(name, self.source.layout)
                    rewritten = rewrite_outer(Dense(weight), name, self.plan, metric)
                forms[name], report[name] = rewritten.form, rewritten.report
        stored = outer_tensors(self.source, forms, tensors, self.plan.dtype)
        plan = {name: form.describe() for name, form in forms.items()}
        return self._finish(0, stored, {"outer": True, "plan": plan, "report": report})

    def _outer_model(self) -> Any:
        entry = self.journal.find("outer")
        assert entry is not None
        return restored_outer(self.source, self.staging / entry["file"], entry["plan"], self.setting.device)

    def _block(self, index: int, streams: Streams, allocation: Allocation) -> None:
        """Rewrite one block and store it. The streams go through it, but for the last."""
        tried: dict[str, Any] | None = None
        for attempt in range(1, ATTEMPTS + 1):
            shares = allocation.next(self.source.layout.linears_of(index), tried)
            with self._walks(index, streams) as task:
                task.shares, task.sensitivity = shares, allocation.sensitivity
                result = task.run()
                name = task.name
                forms = {f"{name}.{linear}": form for linear, form in result.forms.items()}
                tried = allocation.took(forms, shares)
                if attempt < ATTEMPTS and not allocation.settled(tried):
                    continue
                self._store(index, task, result, tried)
                if index + 1 < self.source.layout.num_blocks:
                    for walk in filter(None, (task.walk, task.original)):
                        walk.finish()
            return

    def _store(self, index: int, task: BlockTask, result: BlockResult, rates: Mapping[str, Any]) -> None:
        stored = block_tensors(self.source, index, task.block, self.plan.dtype)
        plan = {f"{task.name}.{linear}": form.describe() for linear, form in result.forms.items()}
        report = {f"{task.name}.{linear}": told for linear, told in result.report.items()}
        entry = {"block": index, "plan": plan, "report": report}
        self._finish(index + 1, stored, entry | ({"rates": rates} if rates else {}))

    @contextmanager
    def _walks(self, index: int, streams: Streams) -> Iterator[BlockTask]:
        """One block to rewrite, with the texts on their way through it."""
        task = BlockTask(self.plan, index, self.setting.dense_block(index), rest=self.source.dtype)
        if streams.compressed is not None:
            task.walk = Walk(streams.compressed.block(index), task.block)
        if streams.dense is not None:
            task.original = Walk(streams.dense.block(index), self.setting.dense_block(index))
        try:
            yield task
        finally:
            for walk in filter(None, (task.walk, task.original)):
                walk.close()

    def _finish(self, number: int, stored: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
        """Write a shard, and then, only then, its line in the journal."""
        count = self.source.layout.num_blocks + 1
        path = self.staging / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(path, stored)
        entry |= file_entry(path)
        self.journal.append(entry)
        return entry

    def _assemble(
        self, entries: list[dict[str, Any]], text: CalibrationText | None, allocation: Allocation
    ) -> dict[str, Any]:
        plan = {name: d for entry in entries for name, d in entry["plan"].items()}
        shared = {f"step {i + 1}": facts for i, facts in allocation.facts(gradients=True).items()}
        manifest: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "source": {"name": self.source.name, "fingerprint": self.source.given.fingerprint},
            "recipe": self.recipe.resolved(),
            "calibration": [] if text is None else [text.record],
            "sizes": sizes(self.source, self.staging, plan),
            "survey": next(iter(allocation.facts(gradients=False).values()), None),
            "weighting": (self.journal.find("weighting") or {}).get("weighting"),
            "allocation": {"tokens": allocation.tokens} | shared if allocation.tokens else None,
            "modules": {name: told for entry in entries for name, told in entry["report"].items()},
        }
        return assemble(self.source, self.staging, plan, manifest)
