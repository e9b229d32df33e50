"""`compare`: all recipes on the same text, real bytes, pictures, and no work twice."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import RequestError
from lmpress.pipeline import Run
from tests.conftest import EVERY_STEP

INT4: dict[str, Any] = {
    "name": "four",
    "calibration": EVERY_STEP["calibration"],
    "steps": [{"quantize": {"bits": 4, "granularity": "group:32", "solver": "gptq"}}],
}


@pytest.fixture(scope="module")
def comparison(
    tiny: Callable[[str], Path], text_file: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> lmpress.Comparison:
    return lmpress.compare(
        tiny("llama"),
        ["int8", EVERY_STEP, INT4],
        tmp_path_factory.mktemp("comparison"),
        calibration=str(text_file),
        text=str(other_text),
        window=64,
        throughput=False,
    )


def test_rows(comparison: lmpress.Comparison) -> None:
    rows = {row.name: row.to_json() for row in comparison.rows}
    assert list(rows) == ["dense", "int8", "every-step", "four"]
    for name in ("int8", "every-step", "four"):
        files = (comparison.directory / name).rglob("*")
        assert rows[name]["bytes_on_disk"] == sum(p.stat().st_size for p in files if p.is_file())
        assert rows[name]["kl"] > 0
        assert rows[name]["compression_seconds"] > 0
    # nothing removed at 8 bits: 1 - 8/16; at 4 bits 1 - 4/16
    assert rows["int8"]["tcr"] == pytest.approx(0.5)
    assert rows["four"]["tcr"] == pytest.approx(0.75)
    assert 0 < rows["every-step"]["sparsity"] < 0.5
    dense, own = rows["dense"]["perplexity"], rows["four"]["perplexity"]
    assert rows["four"]["sr_perplexity"] == pytest.approx(dense / own)
    # g(0, 4) = 1 - (1 - 0) (1 - 2/4) = 1/2
    assert rows["four"]["srcr_perplexity"] == pytest.approx(dense / own / 2)


def test_files(comparison: lmpress.Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO((comparison.directory / "comparison.csv").read_text())))
    assert [line["name"] for line in lines] == [row.name for row in comparison.rows]
    told = json.loads((comparison.directory / "comparison.json").read_text())
    assert float(lines[1]["perplexity"]) == pytest.approx(told["rows"][1]["perplexity"])
    assert (comparison.directory / "comparison.svg").read_bytes().startswith(b"<?xml")
    assert (comparison.directory / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_two_texts_of_one_file_name_have_columns_of_their_own(
    tiny: Callable[[str], Path], other_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "evaluation.txt").write_text(
        "Rain falls on the hills, and the rivers carry it to the sea. " * 9
    )
    texts = [str(other_text), str(tmp_path / "evaluation.txt")]
    compared = lmpress.compare(tiny("llama"), ["int8"], tmp_path / "out", text=texts, window=64)
    dense = next(csv.DictReader(io.StringIO(compared.to_csv())))
    measured = compared.rows[0].to_json()["texts"]
    assert len({text["tokens"] for text in measured}) == 2
    for text in measured:
        assert int(dense[f"tokens (file:evaluation.txt {text['corpus_sha256'][:12]})"]) == text["tokens"]


def test_a_second_comparison_compresses_nothing(
    comparison: lmpress.Comparison,
    tiny: Callable[[str], Path],
    text_file: Path,
    other_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Run, "execute", lambda self: pytest.fail("a finished recipe was compressed again"))
    again = lmpress.compare(
        tiny("llama"),
        ["int8", EVERY_STEP, INT4],
        comparison.directory,
        calibration=str(text_file),
        text=str(other_text),
        window=64,
        throughput=False,
    )
    drop = ("peak_resident_set", "name")
    for one, two in zip(comparison.rows, again.rows, strict=True):
        before = {k: v for k, v in one.to_json().items() if k not in drop}
        assert before == {k: v for k, v in two.to_json().items() if k not in drop}


def test_two_recipes_of_one_name(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'int8' is taken"):
        lmpress.compare(tiny("llama"), ["int8", "int8"], tmp_path)


def test_a_recipe_that_is_called_like_the_surveys(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'surveys' is taken"):
        lmpress.compare(tiny("llama"), [INT4 | {"name": "surveys"}], tmp_path)


def test_recipes_share_a_survey(
    tiny: Callable[[str], Path],
    text_file: Path,
    other_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lmpress.pipeline import beforehand

    survey, surveyed = beforehand.look_backwards, []

    def counted(*args: Any) -> Any:
        surveyed.extend(budget.pool.place for budget in args[0].values())
        return survey(*args)

    monkeypatch.setattr(beforehand, "look_backwards", counted)
    size = {"samples": 4, "seq_len": 64}
    recipes = [
        {"name": f"ec{bits}", "calibration": size, "steps": [{"entropy_quantize": {"bits": bits}}]}
        for bits in (5.0, 7.0)
    ]
    other = {"name": "damped", "calibration": size}
    other |= {"steps": [{"entropy_quantize": {"bits": 7.0, "damping": 0.2}}]}
    lmpress.compare(
        tiny("llama"),
        [*recipes, other],
        tmp_path / "out",
        calibration=str(text_file),
        text=str(other_text),
        window=64,
        max_tokens=512,
    )
    assert surveyed == [f"recipe {name}: step 1 (entropy_quantize)" for name in ("ec5.0", "damped")]
    lmpress.compress(tiny("llama"), recipes[1], tmp_path / "alone", calibration=str(text_file))
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / "ec7.0" / path.name).read_bytes()


def test_the_model_writes_its_calibration_text_once(
    tiny: Callable[[str], Path], other_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmpress.stream import text

    write, written = text.generate_text, []

    def counted(*args: Any) -> Any:
        written.append(args[2:])
        return write(*args)

    monkeypatch.setattr(text, "generate_text", counted)
    size = {"samples": 4, "seq_len": 32}
    steps = [{"quantize": {"bits": 4, "solver": "gptq"}}]
    other = {"name": "longer", "calibration": size | {"seq_len": 48}, "steps": steps}
    recipes = [{"name": name, "calibration": size, "steps": steps} for name in ("a", "b")]
    lmpress.compare(
        tiny("llama"), [*recipes, other], tmp_path / "out", text=str(other_text), window=64, max_tokens=512
    )
    assert [args[:2] for args in written] == [(4, 32), (4, 48)]
    lmpress.compress(tiny("llama"), recipes[1], tmp_path / "alone")  # writes it again, and nothing differs
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / "b" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["", "..", "../elsewhere", "a/b"])
def test_a_recipe_names_a_directory_of_the_comparison(
    name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = {"name": name, "steps": [{"quantize": {}}]}
    with pytest.raises(RequestError, match="cannot name one"):
        lmpress.compare(tiny("llama"), [recipe], tmp_path / "out", text=str(text_file))
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "out").exists()
