"""Surveys that recipes share: used where they are whole, made anew where they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmpress.pipeline import Run, RunOptions, beforehand
from lmpress.plan import make_plan
from lmpress.recipes import parse_recipe
from lmpress.source import open_source
from lmpress.survey.kept import keep_survey, kept_survey, key_of, shared_survey


def coded(bits: float) -> dict[str, Any]:
    step = {"entropy_quantize": {"targets": "*", "bits": bits}}
    return {"name": "coded", "calibration": {"samples": 4, "seq_len": 32}, "steps": [step]}


def test_a_survey_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    assert kept_survey(tmp_path / "none", "a") is None
    survey, tensors = (
        {"tokens": 3, "budgets": {"0": {"curves": {}}}, "worst": float("inf")},
        {"x": torch.arange(4.0)},
    )
    keep_survey(tmp_path, "a", survey, tensors)
    kept = kept_survey(tmp_path, "a")
    assert kept is not None
    assert kept[0] == survey
    assert torch.equal(kept[1]["x"], tensors["x"])
    data = tmp_path / "a.safetensors"
    data.write_bytes(data.read_bytes()[:-3])
    assert kept_survey(tmp_path, "a") is None
    keep_survey(tmp_path, "a", survey, tensors)
    (tmp_path / "a.json").write_text("{")
    assert kept_survey(tmp_path, "a") is None


def test_recipes_of_other_bits_share_a_survey(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    survey = beforehand.look_backwards

    def counted(*given: Any) -> Any:
        looks.append(1)
        return survey(*given)

    monkeypatch.setattr(beforehand, "look_backwards", counted)

    def shards(name: str, bits: float, surveys: Path | None) -> dict[str, bytes]:
        options = RunOptions(str(text_file), surveys=surveys)
        once = Run(open_source(tiny("llama")), parse_recipe(coded(bits), "test"), tmp_path / name, options)
        once.prepare()
        once.execute()
        return {p.name: p.read_bytes() for p in once.staging.glob("model-*.safetensors")}

    shared = tmp_path / "surveys"
    shards("first", 3.0, shared)
    second = shards("second", 4.0, shared)
    assert len(looks) == 1
    assert second == shards("alone", 4.0, None)
    for file in shared.glob("*.safetensors"):
        file.write_bytes(b"torn")
    assert second == shards("third", 4.0, shared)
    assert len(looks) == 3


def test_a_key_tells_of_all_that_decides_a_survey(tiny: Callable[[str], Path]) -> None:
    def key(
        model: str = "m",
        text: str = "t",
        precision: torch.dtype = torch.float32,
        bits: float = 3.0,
        **own: Any,
    ) -> str:
        calibration = {"samples": own.pop("samples", 4), "seq_len": 32}
        seed = own.pop("seed", 0)
        recipe = coded(bits) | {"calibration": calibration, "seed": seed}
        plan = make_plan(parse_recipe(recipe, "r"), open_source(tiny("llama")))
        return key_of(plan, model, text, precision, **own)

    others = [
        key(model="n"),
        key(text="u"),
        key(precision=torch.bfloat16),
        key(samples=5),
        key(seed=1),
        key(kind="weighting"),
    ]
    assert len({key(), *others}) == 7
    assert key(bits=4.0) == key()
    assert len(key()) == 32


def test_without_a_place_or_a_key_nothing_is_kept(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        made.append(1)
        return {"tokens": len(made)}, {"x": torch.ones(2)}

    assert shared_survey(None, "a", make)[0] == {"tokens": 1}
    assert shared_survey(tmp_path / "s", None, make)[0] == {"tokens": 2}
    assert not (tmp_path / "s").exists()
    assert shared_survey(tmp_path / "deep" / "s", "a", make)[0] == {"tokens": 3}
    assert shared_survey(tmp_path / "deep" / "s", "a", make)[0] == {"tokens": 3}
    (tmp_path / "deep" / "s" / "a.json").unlink()
    assert shared_survey(tmp_path / "deep" / "s", "a", make)[0] == {"tokens": 4}
    (tmp_path / "deep" / "s" / "a.json").write_text("[]")
    assert shared_survey(tmp_path / "deep" / "s", "a", make)[0] == {"tokens": 5}
