"""A block on its way: what a step moved is what the next one corrects; memory; names in errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lmpress
from lmpress.errors import LmpressError
from lmpress.methods.result import Rewritten
from lmpress.recipes.steps import Quantize, bits, factors
from lmpress.stream import Walk

SMALL = {"samples": 8, "seq_len": 32}


def test_a_correction_goes_towards_what_was_moved(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asymmetric calibration moves a weight towards the dense model's outputs; to correct towards the weight
    that was not moved would undo that."""
    moved: list[Tensor] = []
    wanted: list[tuple[Tensor, Any]] = []
    solve, correct = bits.gptq, factors.low_rank_correction

    def solving(weight: Tensor, *rest: Any) -> Rewritten:
        result = solve(weight, *rest)
        moved.append(weight if result.target is None else result.target)
        wanted.append((weight, result.target))
        return result

    corrected: list[Tensor] = []

    def correcting(weight: Tensor, *rest: Any) -> Rewritten:
        corrected.append(weight)
        return correct(weight, *rest)

    monkeypatch.setattr(bits, "gptq", solving)
    monkeypatch.setattr(factors, "low_rank_correction", correcting)
    steps = [
        {"quantize": {"bits": 3, "solver": "gptq", "asymmetry": 1.0}},
        {"correct": {"rank": 4}},
    ]
    lmpress.compress(
        tiny("llama"), {"calibration": SMALL, "steps": steps}, tmp_path / "out", calibration=str(text_file)
    )
    assert len(moved) == len(corrected) == 14
    strayed = [
        float((target - weight).norm() / weight.norm()) for weight, target in wanted if target is not None
    ]
    assert max(strayed) > 0.01  # something was moved, from the second site on
    for target, given in zip(moved, corrected, strict=True):
        torch.testing.assert_close(given, target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [None, 4096])
def test_the_limit_of_memory_holds_for_surveys(
    memory: int | None,
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where batches may hold little, none waits inside a block, and nothing wide stays in memory."""
    waiting: list[bool] = []
    start = Walk.__init__

    def starting(self: Walk, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        if options.get("memory") != 0 and len(args) < 3:
            waiting.append(self._runs is not None)
        waiting_on_disk.append(self.stream.states.on_disk)

    waiting_on_disk: list[bool] = []
    monkeypatch.setattr(Walk, "__init__", starting)
    steps = [{"prune_neurons": {"allocation": "loss", "ratio": 0.2}}, {"entropy_quantize": {"bits": 5.0}}]
    lmpress.compress(
        tiny("llama"),
        {"calibration": SMALL, "steps": steps},
        tmp_path / "out",
        calibration=str(text_file),
        memory=memory,
    )
    assert len(waiting) >= 4  # two blocks of the survey, and two that are rewritten
    assert set(waiting) == {memory is None}
    assert set(waiting_on_disk) == {memory is not None}


@pytest.mark.parametrize("error", [ValueError("no way"), torch.linalg.LinAlgError("singular")])
def test_a_failure_names_the_module(
    error: Exception,
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any) -> Rewritten:
        raise error

    monkeypatch.setattr(Quantize, "rewrite_leaf", failing)
    with pytest.raises(LmpressError, match=r"model\.layers\.0\.self_attn\.q_proj: (no way|singular)"):
        lmpress.compress(
            tiny("llama"),
            {"steps": [{"quantize": {"bits": 8}}]},
            tmp_path / "out",
            calibration=str(text_file),
        )


def test_ratios_are_relative_to_the_model_that_was_given(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A rotation unties a head from the embedding: that is a part of the result, not of the baseline."""
    steps: list[Any] = [{"rotate": {}}, {"quantize": {"bits": 8}}]
    told = lmpress.plan(tiny("llama"), {"steps": steps})["predicted"]
    plain = lmpress.plan(tiny("llama"), {"steps": steps[1:]})["predicted"]
    assert told["bytes_16bit"] == plain["bytes_16bit"]
    assert told["bytes"] == plain["bytes"] + 2 * 256 * 64
    result = lmpress.compress(tiny("llama"), {"steps": steps}, tmp_path / "out")
    assert result.manifest["sizes"]["bytes_16bit"] == plain["bytes_16bit"]
