"""Who looks, at what, and which recipes can share what was seen."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lmpress.errors import RequestError
from lmpress.plan import make_plan
from lmpress.recipes import parse_recipe
from lmpress.source import dense_block, dense_outer, open_source
from lmpress.statistics import InputStatistics, StatisticsAccumulator
from lmpress.stream import BlockStream
from lmpress.stream.text import load_dense
from lmpress.survey import budgets_of, look_backwards, look_forwards, sensitivity, survey_samples
from lmpress.survey.budgets import Sight
from lmpress.survey.budgets.widths import Widths
from lmpress.survey.tables import HEAD, LOOKED_UP, TOKENS
from tests.survey.budgets.made import recipe

CPU = torch.device("cpu")


def test_who_shares_a_budget(tiny: Callable[[str], Path]) -> None:
    def budgets(*steps: dict[str, Any]) -> Mapping[int, tuple[str, ...]]:
        parsed = parse_recipe({"steps": list(steps)}, "r")
        found = budgets_of(make_plan(parsed, open_source(tiny("llama-untied"))))
        return {index: tuple(budget.pool.shapes) for index, budget in found.items()}

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


@pytest.mark.parametrize(("samples", "looked_at"), [(4, 4), (16, 16), (40, 16), (64, 16), (256, 64)])
def test_a_quarter_of_the_text_is_looked_at_and_sixteen_windows_at_the_least(
    samples: int, looked_at: int
) -> None:
    assert survey_samples(samples) == looked_at


def looked_at_backwards(path: Path, directory: Path, *steps: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The layout, and what a look at eight windows tells."""
    source = open_source(path)
    plan = make_plan(parse_recipe(recipe(*steps), "r"), source)
    windows = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(1))
    outer = dense_outer(source, CPU)
    stream = BlockStream(source, outer, windows, directory=directory)
    budgets = budgets_of(plan)
    told, sensitivity = look_backwards(
        budgets, stream, outer, lambda i: dense_block(source, i, CPU), directory, 0, plan.weighs_tokens
    )
    return source.layout, told, sensitivity


def test_two_steps_have_budgets_of_their_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Each is told of its own modules, as if it were alone; all linears have a sensitivity."""
    mixed = {"quantize": {"targets": "attention", "bits": 4.5, "allocation": "mixed"}}
    coded = {"entropy_quantize": {"targets": "mlp", "bits": 4, "token_weight": 0}}
    path = tiny("llama")
    layout, told, sensitivity = looked_at_backwards(path, tmp_path, mixed, coded)
    assert set(sensitivity) == set(layout.linears)
    assert told["tokens"] == 8 * 24
    assert set(told["budgets"]) == {"0", "1"}
    assert set(told["budgets"]["0"]["bits"]) == {n for n in layout.linears if "self_attn" in n}
    assert set(told["budgets"]["1"]["curves"]) == {n for n in layout.linears if "mlp" in n}
    for place, step in (("0", mixed), ("1", coded)):
        alone = looked_at_backwards(path, tmp_path, step)[1]
        assert alone["budgets"]["0"] == told["budgets"][place]
    assert json.dumps(told)


@pytest.mark.parametrize(("family", "factor"), [("llama", 1.0), ("llama-untied", 1.0), ("gemma2", 8.0)])
def test_a_look_at_tables_is_as_in_one_pass(
    family: str, factor: float, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients by rows as they are stored, which Gemma multiplies; what the head sees, and what it says."""
    source = open_source(tiny(family))
    generator = torch.Generator().manual_seed(2)
    windows, labels = (torch.randint(0, 250, (5, 16), generator=generator) for _ in range(2))
    given = iter(labels)
    monkeypatch.setattr(sensitivity, "_drawn", lambda logits, generator: next(given))
    outer = dense_outer(source, CPU)
    stream = BlockStream(source, outer, windows, batch=2, directory=tmp_path)
    told, found = look_backwards(
        {}, stream, outer, lambda i: dense_block(source, i, CPU), tmp_path, 0, tables=True
    )
    assert told == {"tokens": 80, "budgets": {}}

    model = load_dense(source, torch.float32)
    rows: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def looked_up(module: Any, args: Any, output: torch.Tensor) -> None:
        rows.append(output.requires_grad_(True))

    model.get_input_embeddings().register_forward_hook(looked_up)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits = model(windows, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, rows[0])
    expected = (factor * gradient).double().square().mean((0, 1)).float()
    torch.testing.assert_close(found[LOOKED_UP], expected, rtol=2e-3, atol=1e-5 * float(expected.max()))
    inputs = seen[0].reshape(80, -1)
    torch.testing.assert_close(found[HEAD], inputs.T @ inputs / 80, rtol=1e-4, atol=1e-4)
    said = logits.detach().softmax(-1).mean((0, 1))
    torch.testing.assert_close(found[TOKENS], said, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", ["llama-bias", "llama", "opt"])
def test_a_look_forwards_by_loss(
    family: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, the moments of their inputs, and the energy behind each block, against the whole model."""
    sights: list[Sight] = []

    def look(self: Widths, sight: Sight) -> Any:
        sights.append(sight)
        return {96: 0.0, 32: 1.0}, 1.0

    monkeypatch.setattr(Widths, "look", look)
    step = {"prune_neurons": {"allocation": "loss", "ratio": 0.2, "multiple_of": 8}}
    source = open_source(tiny(family))
    plan = make_plan(parse_recipe(recipe(step), "r"), source)
    windows = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(1))
    stream = BlockStream(source, dense_outer(source, CPU), windows, batch=4)
    (budget,) = budgets_of(plan).values()
    told = look_forwards(budget, source.layout, stream, lambda i: dense_block(source, i, CPU))
    assert set(told["widths"]) == set(budget.pool.shapes)
    model = load_dense(source, torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name in budget.pool.shapes:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(144, -1))
        )
    states: list[torch.Tensor] = []
    for block in model.get_submodule(source.layout.blocks):
        block.register_forward_hook(
            lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(windows, use_cache=False)
    assert len(sights) == len(budget.pool.shapes) == source.layout.num_blocks
    for sight, (name, inputs), state in zip(sights, seen.items(), states, strict=True):
        module = model.get_submodule(name)
        assert torch.equal(sight.weight, module.weight)
        assert sight.has_bias is (module.bias is not None)
        assert sight.activation is None
        assert sight.energy == pytest.approx(float(state.square().sum(-1).mean()), rel=1e-3)
        hessian = sight.inputs.require_hessian()
        torch.testing.assert_close(hessian, inputs.T @ inputs / 144, rtol=1e-3, atol=1e-4)


def test_a_look_forwards_sees_the_neurons(tiny: Callable[[str], Path]) -> None:
    """The mean magnitude of a block's neurons, against hooks on the whole model."""
    step = {"prune_neurons": {"allocation": "activation", "max_ratio": 0.3}}
    source = open_source(tiny("llama"))
    plan = make_plan(parse_recipe(recipe(step), "r"), source)
    windows = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(1))
    stream = BlockStream(source, dense_outer(source, CPU), windows, batch=4)
    (budget,) = budgets_of(plan).values()
    told = look_forwards(budget, source.layout, stream, lambda i: dense_block(source, i, CPU))
    model = load_dense(source, torch.float32)
    means: list[float] = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, args, y: means.append(float(y.abs().mean())))
    with torch.no_grad():
        model(windows)
    assert told["mean_activation"] == pytest.approx(means, rel=1e-4)
    assert list(told["widths"]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


@pytest.mark.parametrize(
    "step",
    [
        {"entropy_quantize": {}},
        {"prune_neurons": {}},
        {"prune_neurons": {"allocation": "loss", "ratio": 0.2}},
    ],
    ids=["backwards", "activation", "loss"],
)
def test_one_block_is_in_memory_at_a_time_and_no_hessian_stays(
    step: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny("llama-untied"))
    ((_, budget),) = budgets_of(make_plan(parse_recipe(recipe(step), "r"), source)).items()
    outer = dense_outer(source, CPU)
    windows = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(1))
    stream = BlockStream(source, outer, windows, directory=tmp_path)
    seen: list[weakref.ref[Any]] = []

    def load(index: int) -> Any:
        gc.collect()
        assert not any(one() for one in seen), "what was looked at before is still there"
        block = dense_block(source, index, CPU)
        seen.append(weakref.ref(block))
        return block

    def result(self: StatisticsAccumulator) -> InputStatistics:
        statistics = original(self)
        seen.append(weakref.ref(statistics))
        return statistics

    original = StatisticsAccumulator.result
    monkeypatch.setattr(StatisticsAccumulator, "result", result)
    if budget.gradients:
        look_backwards({0: budget}, stream, outer, load, tmp_path, 0, tables=False)
    else:
        look_forwards(budget, source.layout, stream, load)
    gc.collect()
    assert not any(one() for one in seen)
