"""One pass through a block that is rewritten on the way, against passes from its entrance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmpress
from lmpress.forms import Dense
from lmpress.source import dense_block, dense_outer, open_source, set_form
from lmpress.stream import IN_FLIGHT, BlockStream, Walk
from tests.pipeline.test_original import FACTOR, PRUNE, gptq, recipe, shards
from tests.tiny import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_first_linear_of_a_site_is_called_first(family: str, tiny: Callable[[str], Path]) -> None:
    """A batch that waits in front of it has called none of the others."""
    source = open_source(tiny(family))
    windows = torch.randint(0, source.config.vocab_size, (2, 8))
    stream, called = BlockStream(source, dense_outer(source, CPU), windows), []
    block, layout = dense_block(source, 0, CPU), source.layout.block(0)
    for linear in layout.linears:
        block.get_submodule(linear).register_forward_pre_hook(
            lambda module, args, linear=linear: called.append(linear)
        )
    stream.block(0).advance(block)
    for site in layout.sites:
        assert min(map(called.index, site.linears)) == called.index(site.linears[0])


@pytest.fixture(params=["llama", "opt"])
def stream(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> tuple[BlockStream, nn.Module]:
    source = open_source(tiny(request.param))
    windows = torch.randint(0, source.config.vocab_size, (10, 16), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(source, dense_outer(source, CPU), windows, batch=4)
    return stream, dense_block(source, 0, CPU)


def halve(block: nn.Module, linear: str) -> None:
    module: Any = block.get_submodule(linear)
    set_form(block, linear, Dense(module.weight.data / 2))


def walked(stream: BlockStream, block: nn.Module, memory: int) -> tuple[list[Tensor], Tensor, int]:
    """Hessians of all sites, each seen behind halved linears; the states at the exit; calls of the first."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    walk = Walk(stream.block(0), block, memory)
    next(iter(block.children())).register_forward_pre_hook(count)
    hessians = []
    for site in stream.layout.block(0).sites:
        hessians.append(walk.gather(site, hessian=True).statistics.require_hessian())
        for linear in site.linears:
            halve(block, linear)
    walk.finish()
    return hessians, stream.states[slice(None)].clone(), calls


def test_paused_batches_see_what_replayed_ones_see(
    stream: tuple[BlockStream, nn.Module], tiny: Callable[[str], Path]
) -> None:
    entrance = stream[0].states[slice(None)].clone()
    block = stream[1]
    originals = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    paused = walked(*stream, memory=IN_FLIGHT)
    stream[0].states[slice(None)] = entrance
    fresh = dense_block(open_source(tiny(stream[0].layout.family.split("-")[0])), 0, CPU)
    fresh.load_state_dict(originals)
    replayed = walked(stream[0], fresh, memory=0)
    for ours, theirs in zip(paused[0], replayed[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(paused[1], replayed[1], rtol=0, atol=0)
    assert not torch.equal(paused[1], entrance)
    batches = 3
    assert paused[2] == batches
    assert replayed[2] > batches


def test_who_waits_at_no_site_goes_on_later(stream: tuple[BlockStream, nn.Module]) -> None:
    first, *_, last = stream[0].layout.block(0).sites
    walk = Walk(stream[0].block(0), stream[1])
    assert walk.gather(first, hessian=False, whole=False).statistics.count == 4 * 16
    halve(stream[1], first.linears[0])
    assert walk.gather(last, hessian=False).statistics.count == 10 * 16
    walk.close()
    assert torch.is_grad_enabled()


def test_a_site_that_is_never_reached_is_an_error(stream: tuple[BlockStream, nn.Module]) -> None:
    first, *_, last = stream[0].layout.block(0).sites
    walk = Walk(stream[0].block(0), stream[1])
    walk.gather(last, hessian=False)
    with pytest.raises(RuntimeError, match="ended before"):
        walk.gather(first, hessian=False)


@pytest.mark.parametrize("steps", [[PRUNE, gptq(0.5)], [{"svd": FACTOR}]], ids=["gptq", "svd"])
def test_memory_decides_nothing(
    steps: list[dict[str, Any]], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    made = []
    for memory in (None, 1):
        output = tmp_path / str(memory)
        lmpress.compress(tiny("llama"), recipe(*steps), output, calibration=str(text_file), memory=memory)
        made.append(shards(output))
    assert made[0] == made[1]


def test_products_in_bfloat16(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    steps = {"quantize": {"bits": 4, "solver": "gptq"}}, {"entropy_quantize": {"bits": 4}}
    for number, step in enumerate(steps):
        made = []
        for precision in ("float32", "bfloat16", "bfloat16"):
            plan = recipe(step)
            plan["calibration"] = plan["calibration"] | {"precision": precision}
            output = tmp_path / f"{number}-{len(made)}"
            done = lmpress.compress(tiny("llama"), plan, output, calibration=str(text_file))
            made.append((shards(output), done.manifest["modules"]))
        (full, told), (lower, lower_told), (again, _) = made
        assert lower == again
        assert lower != full
        for name, module in told.items():
            error = module["relative_output_error"]
            assert lower_told[name]["relative_output_error"] == pytest.approx(error, rel=0.2, abs=0.02)


def test_the_rows_that_tell_an_error_come_from_all_of_the_text(
    stream: tuple[BlockStream, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 64, 64 and 32 rows."""
    site = stream[0].layout.block(0).sites[0]

    def sample(whole: bool = True) -> Tensor:
        return Walk(stream[0].block(0), stream[1]).gather(site, hessian=False, whole=whole).sample

    rows = sample()
    assert rows.shape[0] == 160
    monkeypatch.setattr("lmpress.stream.walk.SAMPLE_TOKENS", 6)
    assert torch.equal(sample(), rows[[0, 63, 64, 127, 128, 159]])
    assert torch.equal(sample(whole=False), rows[[0, 13, 25, 38, 50, 63]])
