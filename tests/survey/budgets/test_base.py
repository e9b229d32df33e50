"""What every budget does: what cannot be met is told, with the least that can."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import RequestError
from tests.survey.budgets.made import recipe


@pytest.mark.parametrize(
    "step",
    [
        {"quantize": {"bits": 2.0, "allocation": "mixed", "granularity": "group:32"}},
        {"entropy_quantize": {"bits": 0.1}},
    ],
)
def test_a_budget_that_cannot_be_met_names_the_least_that_can(
    step: dict[str, dict[str, Any]],
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RequestError, match=r"cannot be met.* which is the least") as caught:
        lmpress.compress(tiny("llama"), recipe(step), tmp_path / "out", calibration=str(text_file))
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capfd.readouterr().err
    (least,) = re.findall(r"(\d+\.\d+), which is the least", str(caught.value))
    ((kind, options),) = step.items()
    made = recipe({kind: options | {"bits": float(least)}})
    lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
