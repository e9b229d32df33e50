"""Whole bits: they stay within the target, and no other shares of it lose less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.errors import RequestError
from lmpress.forms import Quantized
from lmpress.methods.gptq import GptqOptions
from lmpress.methods.mixed_precision import error_deviations, predicted_losses
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.recipes.steps import Quantize
from lmpress.survey.budgets import bits as module
from lmpress.survey.budgets.base import Pool, Sight, State
from lmpress.survey.budgets.bits import CHOICES, Bits
from tests.methods.data import inputs, statistics_of, weights
from tests.survey.budgets.made import recipe


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
    original = Bits.look

    def look(self: Bits, sight: Sight) -> tuple[list[float], list[int]]:
        outlooks.append(original(self, sight))
        return outlooks[-1]

    monkeypatch.setattr(Bits, "look", look)
    monkeypatch.setattr(module, "CHOICES", (2, 3, 4, 6))
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


def budget(bits: float = 4.0, **options: Any) -> Bits:
    step = Quantize(bits=bits, allocation="mixed", **options)
    return Bits(Pool(step, "r: step 1 (quantize)", {"a": (12, 16), "b": (8, 16)}))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("solver", ["round", "gptq"])
def test_a_look_tells_losses_and_sizes_at_every_choice(solver: str, symmetric: bool) -> None:
    weight, known = weights(12, 16, seed=1).float(), statistics_of(inputs(16, 80, seed=2), torch.float32)
    counts = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.1
    own = budget(solver=solver, symmetric=symmetric, granularity="group:8", clip=True)
    losses, sizes = own.look(Sight(weight, known, counts))
    feedback = GptqOptions(bits=2, granularity="group:8", symmetric=symmetric, clip=True)
    deviations = error_deviations(known, feedback if solver == "gptq" else None)
    assert losses == pytest.approx(
        predicted_losses(
            weight,
            deviations,
            CHOICES,
            granularity="group:8",
            symmetric=symmetric,
            clip=True,
            sensitivity=counts,
        )
    )
    assert losses == sorted(losses, reverse=True)
    grids = [RoundOptions(bits=bits, granularity="group:8", symmetric=symmetric) for bits in CHOICES]
    assert sizes == [8 * round_to_nearest(weight, None, grid).form.num_bytes for grid in grids]


def test_without_gradients_outputs_count_once() -> None:
    weight, known = weights(12, 16, seed=1).float(), statistics_of(inputs(16, 80, seed=2), torch.float32)
    plain = budget().look(Sight(weight, known))
    assert plain == budget().look(Sight(weight, known, torch.ones(12)))
    assert min(plain[0]) > 0


def test_what_is_given_out() -> None:
    own = budget(4.0)
    costs = [64.0, 16.0, 4.0, 1.0, 0.25, 0.0625, 0.0156]
    told = {
        "a": (costs, [192 * bits for bits in CHOICES]),
        "b": ([100 * cost for cost in costs], [128 * bits for bits in CHOICES]),
    }
    given = own.give_out(told)
    options = list(itertools.product(range(7), repeat=2))
    allowed = [(i, j) for i, j in options if 192 * CHOICES[i] + 128 * CHOICES[j] <= 4 * 320]
    i, j = min(allowed, key=lambda pair: costs[pair[0]] + 100 * costs[pair[1]])
    assert given["bits"] == {"a": CHOICES[i], "b": CHOICES[j]}
    assert given["bits_per_weight"] == (192 * CHOICES[i] + 128 * CHOICES[j]) / 320
    assert given["expected_loss"] == pytest.approx((costs[i] + 100 * costs[j]) / 2)
    state = own.begin(given)
    assert state == State(given, given["bits"])
    assert own.facts(State({"average": 4.0, **given})) == {
        "average": 4.0,
        "bits_per_weight": given["bits_per_weight"],
        "expected_loss": given["expected_loss"],
        "exact": given["exact"],
    }


def test_a_budget_of_just_the_least_can_be_met() -> None:
    told = {name: ([1.0] * 7, [size * bits for bits in CHOICES]) for name, size in (("a", 192), ("b", 128))}
    assert budget(2.0).give_out(told)["bits"] == {"a": 2, "b": 2}
    told["b"] = ([1.0] * 7, [129 * bits for bits in CHOICES])
    with pytest.raises(RequestError, match=r"step 1 \(quantize\): 2\.0 bits .* takes 2\.007, which is"):
        budget(2.0).give_out(told)
