"""The examples run, and leave what they say."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import lmpress

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_compress_and_load(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(EXAMPLES / "compress_and_load.py"))
    output = tmp_path / "out"
    script["main"]([str(tiny("llama")), str(output), "--calibration", str(text_file), "--prompt", "the "])
    printed = capsys.readouterr().out.splitlines()
    on_disk = sum(path.stat().st_size for path in output.iterdir())
    assert printed[0].startswith(f"{on_disk} bytes on disk")
    assert printed[1].startswith("'the ")
    forms = {line.split()[0]: line for line in printed[2:]}
    assert "int4/group:32" in forms["model.layers.1.mlp.down_proj"]
    assert "int8" in forms["model.layers.0.self_attn.q_proj"]
    # 4-bit codes, and a float16 scale for every 32 of them
    bits = re.search(r"([\d.]+) bits a weight", forms["model.layers.1.mlp.down_proj"])
    assert bits is not None
    assert float(bits[1]) == 4 + 16 / 32


def test_own_recipe(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    result = lmpress.compress(
        tiny("llama"), EXAMPLES / "own_recipe.yaml", tmp_path / "out", calibration=str(text_file)
    )
    widths = result.manifest["survey"]["widths"]
    assert sum(96 - width for width in widths) >= 0.05 * 96 * 2
    assert all(width % 16 == 0 for width in widths)
    modules = result.manifest["modules"]
    assert modules["model.layers.0.self_attn.v_proj"]["form"] == "int4/group:32"
    assert modules["model.layers.0.mlp.up_proj"]["form"] == "int8"
