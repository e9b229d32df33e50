"""The plan: targets, hybrids, and bytes that are foretold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import RequestError


def one(step: dict[str, Any]) -> dict[str, Any]:
    return {"calibration": {"samples": 4, "seq_len": 32}, "steps": [step]}


@pytest.mark.parametrize("family", ["llama", "llama-untied", "opt"])
@pytest.mark.parametrize(
    "step",
    [
        {"quantize": {"bits": 8}},
        {"quantize": {"bits": 3, "granularity": "group:32"}},
        {"quantize": {"bits": 5, "symmetric": False, "granularity": "channel"}},
        {"svd": {"ratio": 0.6}},
        {"svd": {"ratio": 0.9, "multiple_of": 8}},
        {"quantize": {"bits": 3, "granularity": "channel"}},
        {"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 8}},
        {"svd": {"ratio": 0.7, "method": "asvd", "multiple_of": 4}},
        {"sparsify": {"sparsity": 0.3}},
        {"sparsify": {"sparsity": 0.3, "bits": 5, "granularity": "group:32"}},
        {"sparsify": {"sparsity": 0.3, "bits": 4, "case": "all", "symmetric": False}},
        {"sparsify": {"pattern": "4:8", "bits": 4, "symmetric": False}},
        {"sparsify": {"sparsity": 0.3, "method": "wanda"}},
        {"sparsify": {"sparsity": 0.3, "method": "magnitude"}},
        {"sparsify": {"pattern": "2:4", "method": "alps"}},
        {"sparse_low_rank": {"sparsity": 0.4, "iterations": 10, "metric": "diagonal"}},
        {"sparse_low_rank": {"pattern": "2:4", "iterations": 12, "bits": 4, "factor_bits": 8}},
        {"sparse_low_rank": {"sparsity": 0.4, "kappa": 1, "iterations": 2}},
    ],
)
def test_foretold_bytes_are_those_of_the_files(
    family: str, step: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    predicted = lmpress.plan(tiny(family), one(step))["predicted"]
    assert predicted["exact"]
    result = lmpress.compress(tiny(family), one(step), tmp_path / "out", calibration=str(text_file))
    stored = result.manifest["sizes"]["weight_bytes"]
    headers = sum(
        8 + int.from_bytes(p.read_bytes()[:8], "little")
        for p in (tmp_path / "out").glob("model-*.safetensors")
    )
    assert stored - headers == pytest.approx(predicted["bytes"], rel=0.002, abs=256)


def foretold_and_stored(steps: list[dict[str, Any]], model: Path, text: Path, out: Path) -> tuple[int, int]:
    """The bytes that a plan takes for an estimate, and those of the tensors that a run stores."""
    recipe = {"calibration": {"samples": 4, "seq_len": 32}, "steps": steps}
    predicted = lmpress.plan(model, recipe)["predicted"]
    assert not predicted["exact"]
    result = lmpress.compress(model, recipe, out, calibration=str(text))
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in out.glob("model-*.safetensors"))
    return predicted["bytes"], result.manifest["sizes"]["weight_bytes"] - headers


@pytest.mark.parametrize(
    "steps",
    [
        [{"svd": {"ratio": 0.7}}, {"pivot": {"targets": "attention"}}],
        [{"svd": {"ratio": 0.7}}, {"pivot": {"targets": "attention"}}, {"quantize": {"bits": 8}}],
        [{"sparse_low_rank": {"sparsity": 0.5, "kappa": None, "iterations": 10}}],
        [{"svd": {"max_error": 0.3}}, {"quantize": {"targets": "attention", "bits": 4}}],
    ],
)
def test_bytes_that_data_decide_are_foretold_at_their_most(
    steps: list[dict[str, Any]], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    predicted, stored = foretold_and_stored(steps, tiny("llama"), text_file, tmp_path / "out")
    assert 0.5 * predicted < stored <= predicted + 256


def test_steps_that_cannot_follow_are_found_by_module(tiny: Callable[[str], Path]) -> None:
    def plan(*steps: dict[str, Any]) -> dict[str, Any]:
        return lmpress.plan(tiny("llama"), {"steps": list(steps)})

    sparse, down = {"sparsify": {"sparsity": 0.5, "targets": "mlp"}}, "*.mlp.down_proj"
    assert plan(sparse, {"quantize": {"targets": "attention"}})["modules"]
    with pytest.raises(RequestError, match=r"step 2 \(quantize\).*mlp.down_proj: .*solver: gptq"):
        plan(sparse, {"quantize": {"targets": down}})
    with pytest.raises(RequestError, match=r"model.layers.0.mlp.down_proj, which step 1 quantizes"):
        plan({"quantize": {}}, {"quantize": {"targets": down}})
    with pytest.raises(RequestError, match="there is none for these modules"):
        plan({"quantize": {"targets": down}}, {"correct": {"targets": "mlp"}})
    with pytest.raises(RequestError, match="works on the linears of the blocks"):
        plan({"sparsify": {"sparsity": 0.5, "targets": "*embed*"}})


def test_patterns_that_do_not_divide(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match=r"the pattern 3:5 does not divide the 64 inputs"):
        lmpress.plan(tiny("llama"), one({"sparsify": {"pattern": "3:5"}}))
    steps = [{"svd": {"ratio": 0.8, "targets": "mlp"}}, {"sparsify": {"pattern": "2:4", "targets": "mlp"}}]
    with pytest.raises(RequestError, match="let svd have multiple_of: 4"):
        lmpress.plan(tiny("llama"), {"steps": steps})
    grouped = {"quantize": {"solver": "gptq", "granularity": "group:16"}}
    with pytest.raises(RequestError, match="the bits of sparse_low_rank"):
        lmpress.plan(tiny("llama"), {"steps": [{"sparse_low_rank": {"sparsity": 0.5}}, grouped]})


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 8),
        ("mlp", 6),
        ("linears", 14),
        ("embeddings", 1),
        ("*.mlp.down_proj", 2),
        ("*layers.0*", 7),
    ],
)
def test_targets(targets: str, count: int, tiny: Callable[[str], Path]) -> None:
    plan = lmpress.plan(tiny("llama"), one({"quantize": {"targets": targets}}))
    assert len(plan["modules"]) == count


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"recover": {"targets": "*.nothing"}}], "step 1 .recover. targets .*matches no module"),
        ([{"recover": {"targets": "*"}}], "not on embeddings"),
        (
            [{"sparsify": {"sparsity": 0.5, "targets": "*.q_proj"}}, {"recover": {}}],
            "layers.0.self_attn.q_proj.* keep: term",
        ),
    ],
)
def test_targets_of_recovery_are_looked_at_by_name(
    steps: list[dict[str, Any]], words: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(RequestError, match=words):
        lmpress.plan(tiny("llama"), {"steps": steps})


def test_a_glob_that_matches_nothing(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="matches no module"):
        lmpress.plan(tiny("llama"), one({"quantize": {"targets": "*.experts.*"}}))


def test_groups_that_do_not_divide(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="groups of 40 do not divide the 64 inputs"):
        lmpress.plan(tiny("llama"), one({"quantize": {"granularity": "group:40"}}))


def test_groups_that_do_not_divide_ranks(tiny: Callable[[str], Path]) -> None:
    steps = [{"svd": {"ratio": 0.8, "targets": "linears"}}, {"quantize": {"granularity": "group:32"}}]
    with pytest.raises(RequestError, match="let svd have multiple_of: 32"):
        lmpress.plan(tiny("llama"), {"steps": steps})
    steps[0]["svd"]["multiple_of"] = 32
    assert lmpress.plan(tiny("llama"), {"steps": steps})["modules"]


@pytest.mark.parametrize(
    ("rule", "per_tensor"),
    [
        # out-dimensions of a block: q 64, k 32, v 32, o 64, gate 96, up 96, down 64; the median is 64
        ("percentile", {"k_proj", "v_proj"}),
        ("name", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("meanstd", {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}),  # mean 64, std 24.2
    ],
)
def test_hybrids(rule: str, per_tensor: set[str], tiny: Callable[[str], Path]) -> None:
    plan = lmpress.plan(tiny("llama"), one({"quantize": {"granularity": rule}}))
    found = {
        name.rpartition(".")[2]
        for name, module in plan["modules"].items()
        if module["steps"][0]["quantize"]["granularity"] == "tensor"
    }
    assert found == per_tensor


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"quantize": {}}, {"quantize": {"targets": "attention"}}], r"step 2.*q_proj.*step 1 quantizes"),
        (
            [{"quantize": {"targets": "attention"}}, {"svd": {"targets": "*.q_proj", "ratio": 0.5}}],
            r"step 2 \(svd\).*q_proj.*step 1 quantizes",
        ),
        ([{"svd": {"targets": "*", "ratio": 0.5}}], r"embed_tokens.*not on embeddings"),
    ],
)
def test_steps_that_cannot_follow_each_other(
    steps: list[Any], message: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(RequestError, match=message):
        lmpress.plan(tiny("llama"), {"steps": steps})


@pytest.mark.parametrize("first", ["quantize", "entropy_quantize"])
@pytest.mark.parametrize("second", ["quantize", "entropy_quantize"])
def test_modules_get_their_bits_once(first: str, second: str, tiny: Callable[[str], Path]) -> None:
    steps = [{first: {"bits": 4}}, {second: {"targets": "attention", "bits": 4}}]
    with pytest.raises(RequestError, match=rf"step 2 \({second}\).* step 1 quantizes"):
        lmpress.plan(tiny("llama"), {"steps": steps})


@pytest.mark.parametrize(
    "steps",
    [
        [{"entropy_quantize": {"bits": 4}}, {"entropy_quantize": {"targets": "embeddings", "bits": 6}}],
        [{"svd": {"ratio": 0.7}}, {"entropy_quantize": {"bits": 5}}],
        [{"quantize": {"bits": 4.25, "allocation": "mixed"}}],
        [
            {"quantize": {"bits": 4.5, "allocation": "mixed", "granularity": "group:32", "solver": "gptq"}},
            {"quantize": {"targets": "embeddings"}},
        ],
    ],
)
def test_bytes_of_a_budget_are_foretold(
    steps: list[dict[str, Any]], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    predicted, stored = foretold_and_stored(steps, tiny("llama"), text_file, tmp_path / "out")
    assert stored == pytest.approx(predicted, rel=0.02)


def test_ranks_that_the_text_gives_out_are_an_estimate(tiny: Callable[[str], Path]) -> None:
    step = {"targets": "linears", "method": "svd_llm", "ratio": 0.6}
    known, shared = (
        lmpress.plan(tiny("llama"), one({"svd": step | {"allocation": kind}}))["predicted"]
        for kind in ("uniform", "error")
    )
    assert known["exact"]
    assert not shared["exact"]


def test_the_terms_that_training_leaves_are_foretold(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """They are an estimate: where training comes to nothing, none are stored."""
    recover = {"steps": 4, "seq_len": 32, "learning_rate": 1e-2, "keep": "term", "targets": "attention"}
    steps: list[dict[str, Any]] = [{"quantize": {"bits": 4}}, {"recover": recover}]
    predicted, stored = foretold_and_stored(steps, tiny("llama"), text_file, tmp_path / "out")
    assert stored == pytest.approx(predicted, abs=256)
    recover["keep"] = "merge"
    assert lmpress.plan(tiny("llama"), {"steps": steps})["predicted"]["exact"]


@pytest.mark.parametrize("options", [{}, {"allocation": "loss", "ratio": 0.2}])
@pytest.mark.parametrize("unit", [96, 97, 10**20])
def test_neurons_too_few_for_their_multiples(unit: int, options: dict[str, Any], tiny: Any) -> None:
    with pytest.raises(
        RequestError, match=rf"multiple_of: {unit} leaves nothing to remove of the 96 neurons"
    ):
        lmpress.plan(tiny("llama"), one({"prune_neurons": options | {"multiple_of": unit}}))
