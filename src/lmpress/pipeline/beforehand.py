"""What is found out before the first block is rewritten: the text, which positions count, who gets what.

Each is told once, kept in the journal and in the work directory, and read from there by a resumed run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmpress.checkpoint import sha256_file, write_tensors
from lmpress.pipeline.block import rewrite_early
from lmpress.pipeline.journal import Journal, file_entry
from lmpress.pipeline.setting import Setting
from lmpress.plan import Plan
from lmpress.progress import note
from lmpress.source import failing_at
from lmpress.stream.text import CALIBRATION, CalibrationText, borrowed_text, calibration_text, small_ids
from lmpress.survey import (
    Allocation,
    Budget,
    Survey,
    budgets_of,
    key_of,
    look_backwards,
    look_forwards,
    position_weights,
    shared_survey,
    survey_samples,
    weighting_samples,
)

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

    def allocation(self, text: CalibrationText | None, weights: Mapping[str, Tensor]) -> Allocation:
        """How modules share the budgets that ask for gradients, and what errors in tables cost."""
        setting, plan = self.setting, self.setting.plan
        budgets = {index: budget for index, budget in budgets_of(plan).items() if budget.gradients}
        if text is None or not (budgets or plan.weighs_tokens):
            return Allocation()
        part = self._part(text, survey_samples(text.windows.shape[0]))

        def told() -> Survey:
            outer, seed, tables = setting.dense_outer(), plan.recipe.seed, plan.weighs_tokens
            stream = setting.stream(part, outer, weights)
            with failing_at("the survey of the blocks"):
                return look_backwards(budgets, stream, outer, setting.dense_block, setting.work, seed, tables)

        facts, sensitivity = self._asked("allocation", SENSITIVITY, self._survey_key(budgets, text), told)
        return Allocation.begun(budgets, facts["budgets"], sensitivity, int(facts.get("tokens", 0)))

    def _survey_key(self, budgets: Mapping[int, Budget], text: CalibrationText) -> str | None:
        """The key of a survey that recipes can share; None where it tells more than they have in common."""
        plan = self.setting.plan
        looks = {index: [budget.decides, list(budget.pool.shapes)] for index, budget in budgets.items()}
        if any(decides is None for decides, _ in looks.values()):
            return None
        dtype = str(plan.dtype)
        return key_of(*self._decided(text), budgets=looks, tables=plan.weighs_tokens, dtype=dtype)

    def widths(
        self,
        allocation: Allocation,
        text: CalibrationText | None,
        outer: Any,
        weights: Mapping[str, Tensor],
    ) -> Allocation:
        """`allocation`, and the budgets of steps over sites that take no gradients.

        Args:
            outer: gives the model behind whose embeddings the text begins.
        """
        setting, plan = self.setting, self.setting.plan
        for index, budget in budgets_of(plan).items():
            if budget.gradients:
                continue
            told = (self.journal.find("survey") or {"survey": {}})["survey"]
            if str(index) not in told:
                assert text is not None
                part = self._part(text, survey_samples(text.windows.shape[0]))
                stream = setting.stream(part, outer(), weights)
                with failing_at("the survey of the blocks"):
                    given = look_forwards(budget, plan.layout, stream, partial(self._unpruned, index))
                told = {**told, str(index): given}
                self.journal.append({"survey": told})
            allocation = allocation.with_budget(index, budget, told[str(index)])
        return allocation

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

    def _unpruned(self, before: int, index: int) -> nn.Module:
        """A block as step `before` will find it, as far as that can be told without text."""
        setting, plan = self.setting, self.setting.plan
        block = setting.dense_block(index)
        rewrite_early(block, index, plan, before)
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
