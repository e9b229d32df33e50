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
from lmpress.survey import budgets_of, look_backwards, look_forwards, survey_samples
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
