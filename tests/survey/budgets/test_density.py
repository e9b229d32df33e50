"""Parameters that modules share: the whole keeps what it was told to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.errors import RequestError
from lmpress.forms import Form, Sparse
from lmpress.recipes import parse_recipe
from tests.survey.budgets.made import leaves, recipe


@pytest.mark.parametrize(
    "step",
    [
        {"sparsify": {"sparsity": 0.6, "allocation": "sensitivity"}},
        {"sparsify": {"method": "alps", "sparsity": 0.6, "allocation": "sensitivity"}},
        {"sparse_low_rank": {"sparsity": 0.6, "allocation": "sensitivity", "iterations": 10}},
    ],
    ids=["sparsegpt", "alps", "sslc"],
)
def test_sparsity_is_shared_and_met(
    step: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    result = lmpress.compress(tiny("llama"), recipe(step), tmp_path / "out", calibration=str(text_file))
    kept, total, shares = 0.0, 0, []
    for name, form in plan_of(tmp_path / "out").items():
        weights = math.prod(form.shape)
        own = sum(_parameters(leaf) for leaf in leaves(form))
        kept, total = kept + own, total + weights
        shares.append(own / weights)
        assert "density" in result.manifest["modules"][name]["steps"][0]
    assert kept / total == pytest.approx(0.4, abs=0.02)  # ranks are whole numbers
    assert max(shares) - min(shares) > 0.05


def _parameters(leaf: Form) -> int:
    return leaf.pattern.kept if isinstance(leaf, Sparse) else math.prod(leaf.shape)


def test_a_pattern_leaves_no_sparsity_to_share() -> None:
    for step in (
        {"sparsify": {"pattern": "2:4", "allocation": "sensitivity"}},
        {"sparsify": {"method": "wanda", "sparsity": 0.5, "allocation": "sensitivity"}},
        {"sparsify": {"method": "wanda", "sparsity": 0.5, "asymmetry": 0.5}},
    ):
        with pytest.raises(RequestError):
            parse_recipe(recipe(step), "r")


def test_with_a_pattern_outputs_count_all_the_same(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    def made(name: str, **step: Any) -> list[bytes]:
        how = {"pattern": "2:4", "iterations": 10} | step
        lmpress.compress(
            tiny("llama"), recipe({"sparse_low_rank": how}), tmp_path / name, calibration=str(text_file)
        )
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("model-*.safetensors"))]

    plain, shared = made("plain"), made("shared", allocation="sensitivity")
    assert [len(data) for data in plain] == [len(data) for data in shared]
    assert plain != shared
