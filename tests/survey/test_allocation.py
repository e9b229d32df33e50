"""Budgets of bits: real sizes meet them, the best shares are found, and what cannot be met is told."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lmpress.pipeline.allocation import Allocation, survey_key
from safetensors.torch import load_file

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.errors import LmpressError, RequestError
from lmpress.forms import EntropyCoded, Form, Quantized, Sparse
from lmpress.methods.entropy_quantization import RateCurve
from lmpress.pipeline import allocation, open_source
from lmpress.plan import make_plan
from lmpress.recipes import parse_recipe

SMALL = {"samples": 4, "seq_len": 32}


def recipe(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": "budget", "calibration": SMALL, "steps": list(steps)}


def leaves(form: Form) -> Iterator[Form]:
    found: list[Form] = []

    def visit(leaf: Form) -> Form:
        found.append(leaf)
        return leaf

    form.rewrite(visit)
    return iter(found)


def coded_rate(directory: Path) -> float:
    """Bits a weight of all that the files hold for the coded linears of the blocks."""
    forms = {name: form for name, form in plan_of(directory).items() if ".layers." in f".{name}"}
    sizes = {
        key: tensor.numel() * tensor.element_size()
        for file in directory.glob("model-*.safetensors")
        for key, tensor in load_file(file).items()
    }
    own = [
        size for key, size in sizes.items() if key.rpartition(".")[0] in forms and not key.endswith(".bias")
    ]
    weights = 0
    for form in forms.values():
        for leaf in leaves(form):
            assert isinstance(leaf, EntropyCoded)
            weights += math.prod(leaf.shape)
    return 8 * sum(own) / weights


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_coded_bits_meet_the_target(
    bits: float, family: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    made = recipe({"entropy_quantize": {"bits": bits}}, {"entropy_quantize": {"targets": "embeddings"}})
    result = lmpress.compress(tiny(family), made, tmp_path / "out", calibration=str(text_file))
    told = result.manifest["allocation"]["step 1"]["bits_per_weight"]
    assert coded_rate(tmp_path / "out") == pytest.approx(told, abs=1e-6)
    assert told == pytest.approx(bits, abs=0.05)
    assert result.manifest["sizes"]["linear_bpw"] == pytest.approx(told, abs=1e-5)


@pytest.mark.parametrize(
    "before",
    [
        {"svd": {"ratio": 0.7, "targets": "linears"}},
        {"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 8}},
    ],
)
def test_so_they_do_behind_other_steps(
    before: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """What factors and narrower weights take is not what the curves of the dense weights foretell."""
    made = recipe(before, {"entropy_quantize": {"bits": 4}})
    lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
    assert coded_rate(tmp_path / "out") == pytest.approx(4.0, abs=0.06)


def test_a_glob_that_reaches_the_embedding(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    made = recipe({"entropy_quantize": {"targets": "*", "bits": 4}})
    result = lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
    table = result.manifest["modules"]["model.embed_tokens"]
    assert 3.97 <= table["steps"][0]["bits_per_weight"] <= 4.0
    assert coded_rate(tmp_path / "out") == pytest.approx(4.0, abs=0.05)


def curve(weights: int, middle: float) -> RateCurve:
    """A bit an octave down to zero, with a bend: what a Gaussian weight of size 2^middle takes."""
    logs = [middle + k / 2 for k in range(-22, 8)]
    bits = [weights * math.log2(1 + 2.0 ** (middle - log) * 4) for log in logs]
    return RateCurve(weights, 16.0 * 40, tuple(logs), tuple(bits))


Truth = Callable[[RateCurve, float], float]

TRUTHS: dict[str, Truth] = {
    "5 % more": lambda c, step: 1.05 * c.total_bits(step),
    "5 % less": lambda c, step: 0.95 * c.total_bits(step),
    "larger values": lambda c, step: c.total_bits(step / 1.3),
    "much larger values": lambda c, step: c.total_bits(step / 4),
}


@pytest.mark.parametrize("truth", list(TRUTHS))
@pytest.mark.parametrize("target", [2.0, 4.0])
def test_real_sizes_correct_the_step(target: float, truth: str) -> None:
    """Thirty blocks, one after the other as a run does them, whose sizes are not those of the curves."""
    blocks = {
        i: {f"{i}.{k}": curve(50_000 * (k + 1), (i * 7 + k * 3) % 5 - 2.0) for k in range(3)}
        for i in range(30)
    }
    curves = {name: c for block in blocks.values() for name, c in block.items()}
    budget = Allocation({}, {}, {0: target}, {0: curves}, {})
    past: list[dict[str, Any]] = []
    repeated = 0
    for block in blocks.values():
        rates: dict[str, Any] = {}
        for attempt in range(2):
            repeated += attempt
            step = budget.step(0, past, rates)
            rates = {
                "0": {
                    "modules": list(block),
                    "bits": sum(TRUTHS[truth](c, step) for c in block.values()),
                    "weights": sum(c.weights for c in block.values()),
                    "predicted": sum(c.total_bits(step) for c in block.values()),
                }
            }
            if budget.settled(rates, past):
                break
        past.append({"rates": rates})
    spent = sum(entry["rates"]["0"]["bits"] for entry in past)
    far = truth == "much larger values"  # a coarse step, at which small modules are all zeros already
    assert spent / sum(c.weights for c in curves.values()) == pytest.approx(
        target, rel=0.004 if far else 0.002
    )
    assert far or repeated <= 4


def test_weights_that_went_do_not_leave_their_budget_behind() -> None:
    """Half of every module is gone: the target is for the weights that are coded."""
    curves = {f"{i}": curve(100_000, 0.0) for i in range(10)}
    budget = Allocation({}, {}, {0: 3.0}, {0: curves}, {})
    past: list[dict[str, Any]] = []
    for name, c in curves.items():
        step = budget.step(0, past, {})
        half = c.total_bits(step) / 2
        past.append({"rates": {"0": {"modules": [name], "bits": half, "weights": 50_000, "predicted": half}}})
    spent = sum(entry["rates"]["0"]["bits"] for entry in past)
    assert spent / 500_000 == pytest.approx(3.0, rel=0.002)


def test_a_budget_that_is_spent_leaves_the_widest_step() -> None:
    curves = {f"{i}": curve(1000, 0.0) for i in range(2)}
    budget = Allocation({}, {}, {0: 3.0}, {0: curves}, {})
    past = [{"rates": {"0": {"modules": ["0"], "bits": 9000, "weights": 1000, "predicted": 3000.0}}}]
    step = budget.step(0, past, {})
    assert math.log2(step) == pytest.approx(curves["1"].log_steps[-1], abs=0.5)


def mixed_leaves(directory: Path) -> dict[str, Quantized]:
    forms = {name: form for name, form in plan_of(directory).items() if ".layers." in f".{name}"}
    assert all(isinstance(form, Quantized) for form in forms.values())
    return forms  # type: ignore[return-value]


@pytest.mark.parametrize("solver", ["round", "gptq"])
@pytest.mark.parametrize(("bits", "granularity"), [(4.25, "group:32"), (3.1, "channel"), (6.0, "tensor")])
def test_mixed_bits_stay_within_the_target(
    bits: float,
    granularity: str,
    solver: str,
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    step = {"bits": bits, "allocation": "mixed", "granularity": granularity, "solver": solver}
    made = recipe({"quantize": step})
    result = lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
    told, real = result.manifest["allocation"]["step 1"], result.manifest["sizes"]["linear_bpw"]
    assert told["exact"]
    assert real == pytest.approx(told["bits_per_weight"], abs=1e-5)
    assert bits - 0.1 <= real <= bits
    widths = {form.bits for form in mixed_leaves(tmp_path / "out").values()}
    assert len(widths) > 1


def test_mixed_bits_are_those_of_exhaustive_search(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six modules, every way to give them bits: the shares that come out lose least within the budget."""
    outlooks: list[tuple[list[float], list[int]]] = []
    original = allocation._outlook

    def outlook(*given: Any) -> Any:
        outlooks.append(original(*given))
        return outlooks[-1]

    monkeypatch.setattr(allocation, "_outlook", outlook)
    monkeypatch.setattr(allocation, "CHOICES", (2, 3, 4, 6))
    step = {"targets": "*.mlp.*", "bits": 3.6, "allocation": "mixed"}
    result = lmpress.compress(
        tiny("llama"), recipe({"quantize": step}), tmp_path / "out", calibration=str(text_file)
    )
    forms = mixed_leaves(tmp_path / "out")
    assert len(outlooks) == len(forms) == 6
    budget = 3.6 * sum(math.prod(form.shape) for form in forms.values())
    best = min(
        sum(losses[k] for (losses, _), k in zip(outlooks, choice, strict=True))
        for choice in itertools.product(range(4), repeat=6)
        if sum(sizes[k] for (_, sizes), k in zip(outlooks, choice, strict=True)) <= budget
    )
    assert 2 * result.manifest["allocation"]["step 1"]["expected_loss"] == pytest.approx(best)


def test_scales_of_tiny_weights_count_as_they_are_stored(
    text_file: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    """Where float16 cannot hold a scale it takes four bytes, and the budget holds all the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[0, :32] *= 1e-7
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "model")
    step = {"bits": 6.0, "allocation": "mixed", "granularity": "group:32"}
    made = recipe({"quantize": step})
    result = lmpress.compress(tmp_path / "model", made, tmp_path / "out", calibration=str(text_file))
    dtypes = {form.scale.dtype for form in mixed_leaves(tmp_path / "out").values()}
    assert dtypes == {torch.float16, torch.float32}
    real = result.manifest["sizes"]["linear_bpw"]
    assert real == pytest.approx(result.manifest["allocation"]["step 1"]["bits_per_weight"], abs=1e-5)
    assert real <= 6.0


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


def test_a_table_whose_bits_cannot_be_met_is_told_by_name(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    made = recipe({"entropy_quantize": {"targets": "embeddings", "bits": 0.01}})
    with pytest.raises(LmpressError, match=r"model\.embed_tokens: 0\.010 bits a weight cannot be met"):
        lmpress.compress(tiny("llama"), made, tmp_path / "out")


def test_who_shares_a_budget(tiny: Callable[[str], Path]) -> None:
    def budgets(*steps: dict[str, Any]) -> Mapping[int, tuple[str, ...]]:
        parsed = parse_recipe({"steps": list(steps)}, "r")
        return make_plan(parsed, open_source(tiny("llama-untied"))).budgets

    assert budgets({"quantize": {"bits": 4}}, {"entropy_quantize": {"targets": "embeddings"}}) == {}
    assert budgets({"entropy_quantize": {"targets": "*embed_tokens"}}) == {}
    both = budgets(
        {"quantize": {"targets": "attention", "bits": 4.5, "allocation": "mixed"}},
        {"entropy_quantize": {"targets": "*.mlp.*"}},
    )
    assert {index: len(names) for index, names in both.items()} == {0: 12, 1: 9}
    everything = budgets({"entropy_quantize": {"targets": "*"}})[0]
    assert len(everything) == 21
    with pytest.raises(RequestError, match="not on embeddings"):
        budgets({"quantize": {"targets": "*", "bits": 4.5, "allocation": "mixed"}})


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


def test_recipes_that_differ_in_sparsity_alone_share_a_survey(tiny: Callable[[str], Path]) -> None:
    def key(**step: Any) -> str | None:
        parsed = parse_recipe(recipe({"sparsify": {"allocation": "sensitivity"} | step}), "r")
        plan = make_plan(parsed, open_source(tiny("llama")))
        return survey_key(plan, "model", "text", torch.float32)

    assert key(sparsity=0.5) == key(sparsity=0.7) == key(sparsity=0.5, bits=4)
    assert key(sparsity=0.5) != key(sparsity=0.5, damping=0.1)


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
