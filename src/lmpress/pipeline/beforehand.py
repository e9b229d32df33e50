"""What is found out before the first block is rewritten: the text, which positions count, who gets what.

Each is told once, kept in the journal and in the work directory, and read from there by a resumed run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmpress.checkpoint import sha256_file, write_tensors
from lmpress.errors import LmpressError
from lmpress.pipeline.allocation import Allocation, survey_budgets, survey_key
from lmpress.pipeline.calibration import (
    CALIBRATION,
    CalibrationText,
    borrowed_text,
    calibration_text,
    small_ids,
)
from lmpress.pipeline.journal import Journal, file_entry
from lmpress.pipeline.plan import Plan
from lmpress.pipeline.rewriting import rewrite_early
from lmpress.pipeline.setting import Setting
from lmpress.pipeline.survey import needs_survey, survey_samples, survey_widths, uniform_widths
from lmpress.pipeline.surveys import Survey, key_of, shared_survey
from lmpress.pipeline.weighting import position_weights, weighting_samples
from lmpress.progress import note

SENSITIVITY = "sensitivity.safetensors"
"""In the work directory: what the survey of the gradients told."""

WEIGHTS = "weights.safetensors"
"""In the work directory: how much each position counts."""


@dataclass(frozen=True)
class Beforehand:
    """Asks the dense model, or the journal."""

    setting: Setting
    journal: Journal

    def text(self) -> CalibrationText:
        """The calibration windows; made once, kept for a resumed run and for the manifest."""
        path = self.journal.staging / CALIBRATION
        entry = self.journal.find("calibration")
        if entry is not None and path.is_file():
            return CalibrationText(load_file(path)["input_ids"].long(), entry["calibration"])
        recipe, options, source = self.setting.plan.recipe, self.setting.options, self.setting.source
        size = recipe.calibration.samples, recipe.calibration.seq_len, recipe.seed
        text = None
        if options.calibration == "self":
            text = borrowed_text(options.lenders, source, *size)
        if text is None:
            text = calibration_text(options.calibration, source, *size, options.device)
        self._warn_of_few(text.windows.numel())
        write_tensors(path, {"input_ids": small_ids(text.windows)})
        self.journal.append({"calibration": text.record} | file_entry(path))
        return text

    def weights(self, text: CalibrationText | None) -> dict[str, Tensor]:
        """How much each position counts at each site, by its full name; empty where all count alike."""
        setting, plan = self.setting, self.setting.plan
        if not plan.weighs_positions or text is None:
            return {}

        def told() -> Survey:
            part, outer = self._part(text, weighting_samples(*text.windows.shape)), setting.dense_outer()
            stream, seed = setting.stream(part, outer), plan.recipe.seed
            found = position_weights(stream, outer, setting.dense_block, setting.work, seed)
            return {"tokens": part.windows.numel()}, found

        key = key_of(*self._decided(text), survey="weighting")
        return self._asked("weighting", WEIGHTS, key, told)[1]

    def allocation(self, text: CalibrationText | None, weights: Mapping[str, Tensor]) -> Allocation | None:
        """How the modules share their budgets; None where nothing is shared, and no token weighed."""
        setting, plan = self.setting, self.setting.plan
        if not plan.budgets and not plan.weighs_tokens:
            return None

        assert text is not None
        part = self._part(text, survey_samples(text.windows.shape[0]))

        def told() -> Survey:
            outer = setting.dense_outer()
            stream = setting.stream(part, outer, weights)
            try:
                return survey_budgets(plan, stream, outer, setting.dense_block, setting.work)
            except ValueError as error:
                raise LmpressError(f"the survey of the blocks: {error}") from error

        key = survey_key(*self._decided(text))
        return Allocation.from_entry(*self._asked("allocation", SENSITIVITY, key, told), plan)

    def widths(
        self, text: CalibrationText | None, outer: Any, weights: Mapping[str, Tensor]
    ) -> list[int] | None:
        """How many neurons each block keeps; None where none are pruned.

        Args:
            outer: gives the model behind whose embeddings the text begins.
        """
        setting, plan = self.setting, self.setting.plan
        if not needs_survey(plan):
            return uniform_widths(plan, setting.source)
        entry = self.journal.find("survey")
        if entry is None:
            assert text is not None
            part = self._part(text, survey_samples(text.windows.shape[0]))
            stream = setting.stream(part, outer(), weights)
            try:
                survey = survey_widths(plan, setting.source, stream, self._unpruned)
            except ValueError as error:
                raise LmpressError(f"the survey of the blocks: {error}") from error
            entry = {"survey": survey}
            self.journal.append(entry)
        return list(entry["survey"]["widths"])

    def _asked(self, name: str, file: str, key: str | None, make: Callable[[], Survey]) -> Survey:
        """A survey with tensors: from the journal and the work directory, or shared, or made now."""
        path, entry = self.setting.work / file, self.journal.find(name)
        if entry is None or not path.is_file() or sha256_file(path) != entry["tensors_sha256"]:
            facts, tensors = shared_survey(self.setting.options.surveys, key, make)
            write_tensors(path, tensors)
            entry = {name: facts, "tensors_sha256": sha256_file(path)}
            self.journal.append(entry)
        return entry[name], load_file(path)

    def _decided(self, text: CalibrationText) -> tuple[Plan, str, str, torch.dtype]:
        """What decides a survey, see `key_of`."""
        setting, ids = self.setting, str(text.record.get("ids_sha256"))
        return setting.plan, setting.source.fingerprint, ids, setting.precision

    def _part(self, text: CalibrationText, samples: int) -> CalibrationText:
        return CalibrationText(text.windows[:samples], text.record)

    def _unpruned(self, index: int) -> nn.Module:
        """A block as the pruning will find it, as far as that can be told without text."""
        block, layout, plan = self.setting.dense_block(index), self.setting.source.layout, self.setting.plan
        rewrite_early(block, layout.block_name(index), layout, plan, plan.neurons or 0)
        return block

    def _warn_of_few(self, tokens: int) -> None:
        """Tell of Hessians that so few tokens leave singular: damping decides what they do not span."""
        plan = self.setting.plan
        steps = plan.recipe.steps
        wide = [
            module.shape[1]
            for name, module in plan.modules.items()
            if name not in plan.outer and any(steps[i].needs_hessian for i in module.steps)
        ]
        if wide and tokens < max(wide):
            note(
                f"Calibration has {tokens} tokens, and some Hessians have {max(wide)} inputs: with fewer "
                "tokens than inputs they are singular, and unseen text will fare worse; raise samples or "
                "seq_len"
            )
