"""Squared gradients that go backwards block by block, against one backward pass through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmpress.source import dense_block, open_source
from lmpress.statistics import InputStatistics
from lmpress.stream import Activations, BlockStream
from lmpress.survey import sensitivity
from lmpress.survey.sensitivity import _drawn, head_statistics, sensitivities

WINDOWS = torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(3))


def streamed(path: Path, directory: Path, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By full name, the mean squared gradients of the outputs and the Hessians of the inputs."""
    source, device = open_source(path), torch.device("cpu")
    layout = source.layout
    outer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    stream = BlockStream(source, outer, WINDOWS, batch=2, directory=directory)
    entrances = []
    for i in range(layout.num_blocks):
        states = Activations(stream.states.shape, None, directory)
        for rows in stream.batches():
            states[rows] = stream.states[rows]
        entrances.append(states)
        stream.block(i).advance(dense_block(source, i, device))
    told: dict[str, Tensor] = {}
    hessians: dict[str, Tensor] = {}

    def seen(
        i: int, block: nn.Module, squares: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]
    ) -> None:
        for linear, square in squares.items():
            told[f"{layout.block_name(i)}.{linear}"] = square
            hessians[f"{layout.block_name(i)}.{linear}"] = inputs[linear].require_hessian()

    sensitivities(stream, outer, entrances, lambda i: dense_block(source, i, device), seen, seed)
    return told, hessians


def in_one_pass(path: Path, names: list[str], labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same by autograd on the whole model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            outputs[name], inputs[name] = output, args[0].detach()

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    logits = model(WINDOWS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    squares = {
        name: g.reshape(-1, g.shape[-1]).double().square().mean(0).float()
        for name, g in zip(outputs, gradients, strict=True)
    }
    flat = {name: x.reshape(-1, x.shape[-1]).double() for name, x in inputs.items()}
    return squares, {name: (x.T @ x / len(x)).float() for name, x in flat.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen3"])
def test_block_by_block_is_as_in_one_pass(
    family: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.randint(0, 250, WINDOWS.shape, generator=torch.Generator().manual_seed(9))
    given = iter(labels)
    monkeypatch.setattr(sensitivity, "_drawn", lambda logits, generator: next(given))
    told, hessians = streamed(tiny(family), tmp_path)
    expected, moments = in_one_pass(tiny(family), list(told), labels)
    assert set(told) == set(expected)
    assert set(told) == set(open_source(tiny(family)).layout.linears)
    for name, square in expected.items():
        # rounding is relative to the largest: gradients of keys and queries nearly cancel
        torch.testing.assert_close(told[name], square, rtol=1e-3, atol=1e-5 * float(square.max()))
        torch.testing.assert_close(hessians[name], moments[name], rtol=1e-4, atol=1e-5)


def test_labels_are_drawn_from_the_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    one, two, other = (streamed(tiny("llama"), tmp_path, seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-post-norm"])
def test_what_the_head_sees_and_says(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source, device = open_source(tiny(family)), torch.device("cpu")
    outer = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    stream = BlockStream(source, outer, WINDOWS, batch=2, directory=tmp_path)
    for i in range(source.layout.num_blocks):
        stream.block(i).advance(dense_block(source, i, device))
    found, inputs = head_statistics(outer, source.layout, WINDOWS, stream.states, device)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        said = model(WINDOWS, use_cache=False).logits.softmax(-1).mean((0, 1))
    torch.testing.assert_close(found, said, rtol=1e-3, atol=1e-7)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)
    flat = seen[0].reshape(WINDOWS.numel(), -1)
    hessian = flat.T @ flat / WINDOWS.numel()
    torch.testing.assert_close(inputs.require_hessian(), hessian, rtol=1e-3, atol=1e-4)
    assert inputs.count == WINDOWS.numel()
    assert not outer.get_output_embeddings()._forward_pre_hooks


def test_drawn_labels_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    drawn = _drawn(logits.expand(40_000, 4).clone(), torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(frequency, logits.softmax(0), rtol=0, atol=0.01)
