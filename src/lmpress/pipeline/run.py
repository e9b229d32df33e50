"""A run: source + recipe + text -> a checkpoint, block by block, resumable at every block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lmpress.checkpoint import read_header, sha256_file, write_tensors
from lmpress.errors import LmpressError, RequestError
from lmpress.forms import Dense, Form
from lmpress.pipeline.allocation import Allocation, rates_of
from lmpress.pipeline.assemble import assemble, discard
from lmpress.pipeline.beforehand import Beforehand
from lmpress.pipeline.blocks import (
    Descriptions,
    block_tensors,
    outer_tensors,
    restored_block,
    restored_outer,
)
from lmpress.pipeline.calibration import CalibrationText
from lmpress.pipeline.heap import give_back_memory
from lmpress.pipeline.journal import WORK, Journal, file_entry
from lmpress.pipeline.output import (
    check_empty,
    check_foreign,
    check_output,
    finish_publication,
    finished_fingerprint,
)
from lmpress.pipeline.plan import Plan, make_plan
from lmpress.pipeline.rewriting import BlockResult, rewrite_block, rewrite_outer
from lmpress.pipeline.setting import RunOptions, Setting
from lmpress.pipeline.source import ModelSource
from lmpress.pipeline.stream import BlockStream
from lmpress.pipeline.walk import IN_FLIGHT, Walk
from lmpress.progress import note, track
from lmpress.recipes import Recipe
from lmpress.version import __version__

ATTEMPTS = 2
"""A block whose bits were predicted badly is done again, once."""


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
            RequestError: the directory is in use, and neither resume nor force was asked for.
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
        widths = ask.widths(text, self._outer_model, weights)
        done = {entry["block"]: entry for entry in self.journal.blocks()}
        streamed = self.plan.needs_text and len(done) < self.source.layout.num_blocks
        stream = dense = None
        if streamed and text is not None:
            stream = self.setting.stream(text, self._outer_model(), weights)
            if self.plan.needs_original:
                dense = self.setting.stream(text, self.setting.dense_outer(), weights)
        blocks = self.source.layout.num_blocks
        streams = stream, dense
        for i in track(range(blocks), f"Compressing {self.source.name} with {self.recipe.name}"):
            for each in filter(None, streams):
                each.at_block(i)
            if i not in done:
                width = None if widths is None else widths[i]
                self._block(i, streams, width, allocation, last=i + 1 == blocks)
                give_back_memory()
                continue
            if dense is not None:
                dense.advance(self.setting.dense_block(i))
            if stream is not None:
                shard = self.staging / done[i]["file"]
                stream.advance(restored_block(self.source, i, shard, done[i]["plan"], self.setting.device))
        entries = [outer, *self.journal.blocks()]
        return self._assemble(entries, text)

    def _outer(self, allocation: Allocation | None) -> dict[str, Any]:
        """Embeddings, last norm and head: rewritten and stored first, for the stream begins with them."""
        entry = self.journal.find("outer")
        if entry is not None:
            return entry
        tensors = self.source.read(self.source.outer_names)
        forms: dict[str, Form] = {}
        report: dict[str, Any] = {}
        for name in self.plan.outer:
            module = self.plan.modules[name]
            if module.steps:
                weight = tensors[f"{name}.weight"].float()
                try:
                    metric = None if allocation is None else allocation.table(name, self.source.layout)
                    rewritten = rewrite_outer(Dense(weight), module, self.plan, metric)
                except ValueError as error:
                    raise LmpressError(f"{name}: {error}") from error
                forms[name], report[name] = rewritten.form, rewritten.report
        stored = outer_tensors(self.source, forms, tensors, self.plan.dtype)
        plan = {name: form.describe() for name, form in forms.items()}
        return self._finish(0, stored, {"outer": True, "plan": plan, "report": report})

    def _outer_model(self) -> Any:
        entry = self.journal.find("outer")
        assert entry is not None
        return restored_outer(self.source, self.staging / entry["file"], entry["plan"], self.setting.device)

    def _block(
        self,
        index: int,
        streams: tuple[BlockStream | None, BlockStream | None],
        width: int | None,
        allocation: Allocation | None,
        last: bool,
    ) -> None:
        """Rewrite one block and store it. The streams (compressed, dense) go through it, but for the last."""
        rates: dict[str, Any] = {}
        made: tuple[nn.Module, BlockResult] | None = None
        for attempt in range(1, ATTEMPTS + 1):
            final = attempt == ATTEMPTS
            made = self._attempt(index, streams, width, allocation, rates, final=final, last=last)
            if made is not None:
                break
        assert made is not None
        block, result = made
        name = self.source.layout.block_name(index)
        stored = block_tensors(self.source, index, block, self.plan.dtype)
        plan = {f"{name}.{linear}": form.describe() for linear, form in result.forms.items()}
        report = {f"{name}.{linear}": told for linear, told in result.report.items()}
        entry = {"block": index, "plan": plan, "report": report}
        self._finish(index + 1, stored, entry | ({"rates": rates} if rates else {}))

    def _attempt(
        self,
        index: int,
        streams: tuple[BlockStream | None, BlockStream | None],
        width: int | None,
        allocation: Allocation | None,
        rates: dict[str, Any],
        final: bool,
        last: bool,
    ) -> tuple[nn.Module, BlockResult] | None:
        """A rewritten block, through which the streams have gone; None where its bits were predicted badly.

        Args:
            rates: what the attempt before took of each budget; afterwards what this one took.
            final: take it as it comes.
        """
        layout = self.source.layout
        name, past = layout.block_name(index), self.journal.blocks()
        linears = [f"{name}.{linear}" for linear in layout.linears]
        shares = {} if allocation is None else allocation.shares(linears, past, rates)
        block, rest = self.setting.dense_block(index), self.source.dtype
        with self._walks(index, block, streams) as (walk, original):
            try:
                result = rewrite_block(block, name, layout, self.plan, walk, width, shares, original, rest)
            except ValueError as error:
                raise LmpressError(f"{name}: {error}") from error
            if allocation is not None:
                forms = {f"{name}.{linear}": form for linear, form in result.forms.items()}
                rates.update(allocation.rates(forms, shares))
                if not final and not allocation.settled(rates, past):
                    return None
            for each in filter(None, (walk, original)):
                if not last:
                    each.finish()
        return block, result

    @contextmanager
    def _walks(
        self, index: int, block: nn.Module, streams: tuple[BlockStream | None, BlockStream | None]
    ) -> Iterator[tuple[Walk | None, Walk | None]]:
        """The texts on their way through one block: the compressed model's, and the dense one's."""
        stream, dense = streams
        memory = IN_FLIGHT if self.options.memory is None else self.options.memory // 4
        if self.setting.device.type != "cpu":
            memory = min(memory, IN_FLIGHT)  # the limit is the host's, and batches wait on the device
        memory //= 1 if dense is None else 2
        walk = None if stream is None else Walk(stream, block, memory)
        original = None if dense is None else Walk(dense, self.setting.dense_block(index), memory)
        try:
            yield walk, original
        finally:
            for each in filter(None, (walk, original)):
                each.close()

    def _finish(self, number: int, stored: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
        """Write a shard, and then, only then, its line in the journal."""
        count = self.source.layout.num_blocks + 1
        path = self.staging / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(path, stored)
        entry |= file_entry(path)
        self.journal.append(entry)
        return entry

    def _assemble(self, entries: list[dict[str, Any]], text: CalibrationText | None) -> dict[str, Any]:
        plan = {name: d for entry in entries for name, d in entry["plan"].items()}
        survey = self.journal.find("survey")
        manifest: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "source": {"name": self.source.name, "fingerprint": self.source.fingerprint},
            "recipe": self.recipe.resolved(),
            "calibration": [] if text is None else [text.record],
            "sizes": sizes(self.source, self.staging, plan),
            "survey": None if survey is None else survey["survey"],
            "weighting": (self.journal.find("weighting") or {}).get("weighting"),
            "allocation": self._told_allocation(),
            "modules": {name: told for entry in entries for name, told in entry["report"].items()},
        }
        return assemble(self.source, self.staging, plan, manifest)

    def _told_allocation(self) -> dict[str, Any] | None:
        """For the manifest: what came of each budget; the bits of a module are in its report."""
        entry = self.journal.find("allocation")
        if entry is None:
            return None
        told: dict[str, Any] = {"tokens": entry["allocation"]["tokens"]}
        for key, shared in entry["allocation"]["budgets"].items():
            rates = rates_of(int(key), self.journal.blocks())
            facts = {name: value for name, value in shared.items() if name not in ("curves", "bits", "ranks")}
            if rates:
                facts["bits_per_weight"] = sum(r["bits"] for r in rates) / sum(r["weights"] for r in rates)
                facts["predicted"] = sum(r["predicted"] for r in rates) / sum(r["weights"] for r in rates)
            told[f"step {int(key) + 1}"] = facts
        return told


def sizes(source: ModelSource, directory: Path, plan: Descriptions) -> dict[str, Any]:
    """What the checkpoint weighs: real bytes of the files, and bits per weight of the blocks' linears.

    bits per weight = 8 x all bytes stored for the linears, over the weights of the DENSE model's linears.
    """
    layout = source.layout
    shards = sorted(directory.glob("model-*.safetensors"))
    linears = [f"{layout.block_name(i)}.{name}" for i in range(layout.num_blocks) for name in layout.linears]
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
        "bytes_16bit": 2 * sum(dense[name].numel() for name in source.names),
        "linear_bpw": round(8 * sum(stored.values()) / max(1, weights), 6),
        "linear_weights": weights,
    }
