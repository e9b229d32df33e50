"""A model that is read as an equal one: what is told of it is told of the model that was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.api.compression import compress_with
from lmpress.api.measuring import inspect
from lmpress.errors import RequestError
from lmpress.pipeline import RunOptions
from lmpress.recipes import parse_recipe
from lmpress.source import as_recipe_reads, load_dense, open_source
from tests.tiny import TINY

INT4 = {"quantize": {"bits": 4, "granularity": "group:16"}}
SMALL = {"samples": 4, "seq_len": 32, "precision": "float32"}
TURNED: dict[str, Any] = {"name": "turned", "calibration": SMALL, "steps": [{"rotate": {}}, INT4]}
PLAIN: dict[str, Any] = {"name": "plain", "calibration": SMALL, "steps": [INT4]}
Tiny = Callable[[str], Path]


@pytest.mark.parametrize("family", list(TINY))
def test_it_computes_the_same_or_is_refused(family: str, tiny: Tiny) -> None:
    source, recipe = open_source(tiny(family)), parse_recipe(TURNED, "turned")
    if family.startswith(("opt", "gemma")):
        with pytest.raises(RequestError, match=r"step 1 \(rotate\) cannot be applied to"):
            as_recipe_reads(source, recipe)
        return
    equal = as_recipe_reads(source, recipe)
    assert equal.given is source.given is source
    assert not equal.layout.tied
    assert equal.fingerprint != source.fingerprint
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    one, other = (load_dense(each, torch.float32)(ids).logits for each in (source, equal))
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_ratios_are_relative_to_the_model_that_was_given(
    tiny: Tiny, other_text: Path, tmp_path: Path
) -> None:
    """A head that is untied is no byte more of the model that is compressed."""
    model, other = tiny("llama"), str(other_text)
    full = lmpress.plan(model, PLAIN)["predicted"]["bytes_16bit"]
    told = lmpress.plan(model, TURNED)["predicted"]
    assert told["exact"]
    assert told["bytes_16bit"] == full == open_source(model).bytes_16bit
    made = lmpress.compress(model, TURNED, tmp_path / "out")
    assert made.manifest["sizes"]["bytes_16bit"] == full
    assert inspect(tmp_path / "out")[0]["sizes"]["bytes_16bit"] == full
    assert lmpress.evaluate(tmp_path / "out", text=other).bytes_16bit == full
    assert lmpress.evaluate(tmp_path / "out", text=other, reference=model).bytes_16bit == full


def test_the_model_writes_the_same_text_whatever_it_is_read_as(tiny: Tiny, tmp_path: Path) -> None:
    """So that recipes are compared on one text, which is written once."""
    calibrated = {**INT4["quantize"], "solver": "gptq"}
    options = RunOptions(calibration="self")
    made = {}
    for name, more in (("plain", []), ("turned", [{"rotate": {}}])):
        recipe = {"name": name, "calibration": SMALL, "steps": [*more, {"quantize": calibrated}]}
        made[name] = compress_with(tiny("llama"), recipe, tmp_path / name, options).manifest
    assert made["plain"]["calibration"] == made["turned"]["calibration"]
    assert made["plain"]["source"] == made["turned"]["source"]
    lending = replace(options, lenders=(tmp_path / "plain",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lmpress.stream.text.generate_text", lambda *_: pytest.fail("the text is there already")
        )
        compress_with(tiny("llama"), recipe, tmp_path / "again", lending)
