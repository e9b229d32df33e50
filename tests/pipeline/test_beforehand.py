"""What is found out before the first block: which recipes can share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmpress.pipeline import Journal, RunOptions
from lmpress.pipeline.beforehand import Beforehand
from lmpress.pipeline.setting import Setting
from lmpress.plan import make_plan
from lmpress.recipes import parse_recipe
from lmpress.source import open_source
from lmpress.stream.text import CalibrationText
from lmpress.survey import budgets_of

TEXT = CalibrationText(torch.zeros(4, 32, dtype=torch.long), {"ids_sha256": "text"})
Key = Callable[..., str | None]


@pytest.fixture
def key(tiny: Callable[[str], Path], tmp_path: Path) -> Key:
    """The key of the survey that a recipe asks for."""

    def key(*steps: dict[str, Any], text: CalibrationText = TEXT) -> str | None:
        source = open_source(tiny("llama"))
        size = {"samples": 4, "seq_len": 32}
        plan = make_plan(parse_recipe({"calibration": size, "steps": list(steps)}, "r"), source)
        beforehand = Beforehand(Setting(source, plan, RunOptions(), tmp_path), Journal(tmp_path))
        return beforehand._survey_key(budgets_of(plan), text)

    return key


def test_recipes_that_differ_in_sparsity_alone_share_a_survey(key: Key) -> None:
    def sparse(**step: Any) -> str | None:
        return key({"sparsify": {"allocation": "sensitivity"} | step})

    assert sparse(sparsity=0.5) is not None
    assert sparse(sparsity=0.5) == sparse(sparsity=0.7) == sparse(sparsity=0.5, bits=4)
    assert sparse(sparsity=0.5) != sparse(sparsity=0.5, damping=0.1)


def test_recipes_that_differ_in_bits_alone_share_a_survey(key: Key) -> None:
    def coded(**step: Any) -> str | None:
        return key({"entropy_quantize": step})

    assert coded(bits=4.0) is not None
    assert coded(bits=4.0) == coded(bits=5.0)
    assert coded(bits=4.0) != coded(bits=4.0, damping=0.2)
    assert coded(bits=4.0) != coded(bits=4.0, targets="mlp")
    other = CalibrationText(TEXT.windows, {"ids_sha256": "other"})
    assert key({"entropy_quantize": {}}) != key({"entropy_quantize": {}}, text=other)


@pytest.mark.parametrize(
    "step",
    [
        {"quantize": {"bits": 4.5, "allocation": "mixed"}},
        {"svd": {"method": "svd_llm", "ratio": 0.6, "allocation": "error"}},
    ],
    ids=["bits", "ranks"],
)
def test_what_is_given_out_at_once_is_shared_with_nobody(step: dict[str, Any], key: Key) -> None:
    assert key(step) is None
