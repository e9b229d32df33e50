"""Recipes: shipped ones parse; a wrong key or value is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lmpress.errors import RequestError
from lmpress.recipes import load_recipe, parse_recipe, shipped_recipes

GOOD = {"steps": [{"quantize": {"bits": 8}}]}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse_and_carry_their_file_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.steps


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_resolved_recipe_reads_back_as_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(recipe.resolved(), name) == recipe
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), name) == recipe


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"steps": [{"quantise": {}}]}, ["quantise", "did you mean 'quantize'"]),
        ({"steps": [{"quantize": {"bit": 8}}]}, ["bit", "did you mean 'bits'"]),
        ({"steps": [{"quantize": {"bits": 9}}]}, ["bits", "8"]),
        ({"steps": [{"quantize": {"bits": 1}}]}, ["bits", "2"]),
        ({"steps": [{"quantize": {"granularity": "row"}}]}, ["granularity", "row"]),
        ({"steps": [{"quantize": {"granularity": "group:0"}}]}, ["granularity"]),
        ({"steps": [{"quantize": {"targets": ""}}]}, ["targets"]),
        ({"steps": [{"svd": {}}]}, ["exactly one", "none is given"]),
        ({"steps": [{"svd": {"ratio": 0.5, "keep_variance": 0.9}}]}, ["exactly one"]),
        ({"steps": [{"svd": {"ratio": 1.5}}]}, ["ratio"]),
        ({"steps": [{"prune_neurons": {"max_ratio": 1.2}}]}, ["max_ratio"]),
        ({"steps": [{"prune_neurons": {"min_ratio": 0.5, "max_ratio": 0.1}}]}, ["min_ratio"]),
        ({"steps": [{"prune_neurons": {"allocation": "loss"}}]}, ["ratio"]),
        ({"steps": [{"prune_neurons": {"max_ratio": float("nan")}}]}, ["max_ratio"]),
        ({"steps": []}, ["at least one step"]),
        ({"steps": "svd"}, ["list"]),
        ({"steps": [{"svd": {"ratio": 0.5}, "quantize": {}}]}, ["one key"]),
        ({"steps": [{"quantize": [8]}]}, ["mapping"]),
        ({"calibation": {}, **GOOD}, ["calibation", "did you mean 'calibration'"]),
        ({"calibration": {"sample": 3}, **GOOD}, ["sample", "did you mean 'samples'"]),
        ({"calibration": {"samples": 0}, **GOOD}, ["samples"]),
        ({"steps": [{"recover": {}}, {"quantize": {}}]}, ["recover comes last"]),
        ({"steps": [{"svd": {"method": "asvd", "max_error": 0.1}}]}, ["asvd", "ratio"]),
        ({"steps": [{"svd": {"method": "svd_llm", "ratio": 0.5, "whiten": False}}]}, ["method: svd"]),
        ({"steps": [{"sparsify": {}}]}, ["sparsify", "sparsity", "2:4"]),
        ({"steps": [{"sparsify": {"sparsitiy": 0.5}}]}, ["did you mean 'sparsity'"]),
        ({"steps": [{"sparsify": {"sparsity": 1}}]}, ["sparsity", "less than 1"]),
        ({"steps": [{"sparsify": {"sparsity": 0.5, "pattern": "2:4"}}]}, ["2:4", "leave `sparsity` out"]),
        ({"steps": [{"sparsify": {"pattern": "4:2"}}]}, ["pattern", "n:m"]),
        (
            {"steps": [{"sparsify": {"pattern": 124}}]},
            ["pattern", "in quotes"],
        ),  # YAML 1.1 reads 2:4 as a number
        ({"steps": [{"sparsify": {"sparsity": 0.5, "method": "wanda", "bits": 4}}]}, ["solver: gptq"]),
        ({"steps": [{"sparsify": {"sparsity": 0.5, "case": "all"}}]}, ["case: all", "bits"]),
        ({"steps": [{"sparsify": {"sparsity": 0.5, "bits": 4, "symmetric": False}}]}, ["symmetric grid"]),
        ({"steps": [{"sparsify": {"sparsity": 0.5, "targets": "embeddings"}}]}, ["not on embeddings"]),
        ({"steps": [{"sparse_low_rank": {"sparsity": 0.5, "kappa": 1.5}}]}, ["kappa"]),
        ({"steps": [{"sparse_low_rank": {"pattern": "2:4", "kappa": None}}]}, ["kappa below 1"]),
        ({"steps": [{"correct": {"rank": 0}}]}, ["rank"]),
        ({"steps": [{"quantize": {}}, {"correct": {"bits": 8, "metric": "none"}}]}, ["metric"]),
        ({"steps": [{"sparsify": {"sparsity": 0.5}}] * 2}, ["made sparse once"]),
        ({"steps": [{"quantize": {"bits": 4.25}}]}, ["a share of a bit takes allocation: mixed"]),
        ({"steps": [{"quantize": {"bits": 8.5}}]}, ["allocation: mixed"]),
        ({"steps": [{"quantize": {"bits": 9.5, "allocation": "mixed"}}]}, ["bits", "9"]),
        ({"steps": [{"quantize": {"allocation": "mixd"}}]}, ["allocation", "mixed"]),
        ({"steps": [{"quantize": {"allocation": "mixed", "granularity": "percentile"}}]}, ["group:N"]),
        (
            {"steps": [{"quantize": {"allocation": "mixed", "targets": "embeddings"}}]},
            ["allocation: mixed", "not on embeddings"],
        ),
        ({"steps": [{"entropy_quantize": {"bits": 0}}]}, ["bits", "greater than 0"]),
        ({"steps": [{"entropy_quantize": {"bits": 12.5}}]}, ["bits", "12"]),
        ({"steps": [{"entropy_quantize": {"largest_code": 0}}]}, ["largest_code"]),
        ({"steps": [{"entropy_quantise": {}}]}, ["did you mean 'entropy_quantize'"]),
        ({"steps": [{"recover": {"targets": "embeddings"}}]}, ["recover works on", "not on embeddings"]),
        ("steps", ["mapping"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe: object, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_recipe(recipe, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("r.yaml")
    for word in words:
        assert word in message


def test_an_unknown_name_lists_what_ships() -> None:
    with pytest.raises(RequestError, match="did you mean 'int8'"):
        load_recipe("int9")


def test_a_file_that_is_no_yaml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps: [unclosed", encoding="utf-8")
    with pytest.raises(RequestError, match="no YAML file"):
        load_recipe(path)


def test_a_step_without_options_is_its_name(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n  - quantize\n", encoding="utf-8")
    assert load_recipe(path) == parse_recipe({"steps": [{"quantize": {}}]}, "r")
