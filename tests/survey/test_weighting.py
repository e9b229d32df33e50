"""Positions weighed by their gradients: pooled, of mean 1, where they come from, and what they change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.api.loading import load_any
from lmpress.source import dense_block, dense_outer, open_source
from lmpress.statistics import StatisticsAccumulator
from lmpress.stream import BlockStream
from lmpress.survey.weighting import pooled, position_weights, weighting_samples
from tests.pipeline.test_original import PRUNE, breaks_and_goes_on, gptq, recipe, shards

CPU = torch.device("cpu")


def test_runs_of_positions_double_in_length() -> None:
    weights = pooled(torch.tensor([8.0, 4.0, 1.0, 3.0, 0.0, 4.0, 0.0, 4.0, 1.0, 0.0]).double())
    whole = torch.tensor([8.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.5])
    torch.testing.assert_close(weights, whole / whole.mean())
    assert pooled(torch.zeros(5).double()).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("samples", "seq_len", "part"), [(64, 512, 8), (4, 512, 4), (64, 2048, 8), (64, 64, 64), (999, 64, 64)]
)
def test_a_few_windows_tell(samples: int, seq_len: int, part: int) -> None:
    assert weighting_samples(samples, seq_len) == part


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_weights_are_the_squared_gradients_of_the_whole_model(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Block by block, against autograd through the model in one piece, with the labels that were drawn."""
    source = open_source(tiny(family))
    windows = torch.randint(0, source.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    outer = dense_outer(source, CPU)
    stream = BlockStream(source, outer, windows, batch=2)
    weights = position_weights(stream, outer, lambda i: dense_block(source, i, CPU), tmp_path, seed=3)
    assert len(weights) == sum(len(block.sites) for block in source.layout.each)

    model: Any = load_any(tiny(family), "float32")[0]
    model.requires_grad_(True)
    noise = torch.Generator().manual_seed(3)
    gradients: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda g: gradients.__setitem__(name, g.reshape(16, -1).square().sum(1)))

        return hook

    layout = source.layout
    names = list(layout.linears)
    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    sums = {name: torch.zeros(16) for name in names}
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        drawn = torch.empty_like(logits).exponential_(generator=noise)
        labels = (logits.detach() - drawn.log()).argmax(-1)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name in names:
            sums[name] += gradients[name]
    for i in range(layout.num_blocks):
        for site in layout.block(i).sites:
            of_site = [pooled(sums[f"{layout.block_name(i)}.{linear}"].double()) for linear in site.linears]
            found = weights[f"{layout.block_name(i)}.{site.name}"]
            torch.testing.assert_close(found, torch.stack(of_site).mean(0), rtol=2e-3, atol=1e-4)
            assert float(found.mean()) == pytest.approx(1.0, rel=1e-5)


def test_weighted_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 5, 300, generator=generator), torch.rand(5, generator=generator)
    weights /= weights.mean()
    accumulator = StatisticsAccumulator(300, hessian=True)
    accumulator.update(x[:2], weights=weights)
    accumulator.update(x[2:].reshape(-1, 300), weights=weights)
    told = accumulator.result()
    rows, counts = x.reshape(-1, 300).double(), weights.double().repeat(3)[:, None]
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
    assert told.count == 15
    torch.testing.assert_close(told.mean.double(), (counts * rows).mean(0), **close)
    torch.testing.assert_close(told.second_moment.double(), (counts * rows.square()).mean(0), **close)
    assert told.abs_mean is not None
    torch.testing.assert_close(told.abs_mean.double(), (counts * rows.abs()).mean(0), **close)
    torch.testing.assert_close(told.require_hessian().double(), rows.T @ (counts * rows) / 15, **close)
    torch.testing.assert_close(told.require_hessian(), told.require_hessian().T, rtol=0, atol=0)


def test_moments_are_in_float32_whatever_the_forward_is_in() -> None:
    x, weights = torch.randn(4, 8, 32), torch.ones(8)
    found = []
    for lower in (False, True):
        accumulator = StatisticsAccumulator(32, hessian=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            accumulator.update(x, weights=weights)
        found.append(accumulator.result())
    for one, other in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True):
        assert one == other if isinstance(one, int) else torch.equal(one, other)


@pytest.mark.parametrize(
    "steps",
    [[PRUNE, gptq(0.5)], [{"entropy_quantize": {"bits": 4}}]],
    ids=["gptq", "coded"],
)
def test_a_weighted_run_is_another_one_and_goes_on_to_the_same_bytes(
    steps: list[dict[str, Any]],
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = recipe(*steps)
    weighted = plan | {"calibration": plan["calibration"] | {"weighting": "positions"}}
    lmpress.compress(tiny("llama"), plan, tmp_path / "plain", calibration=str(text_file))
    breaks_and_goes_on(tiny("llama"), weighted, text_file, tmp_path, monkeypatch)
    assert shards(tmp_path / "plain") != shards(tmp_path / "whole")
