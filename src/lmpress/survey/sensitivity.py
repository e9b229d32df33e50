"""How sensitive the model is to each output of each linear: mean squared gradients, a block at a time.

The loss is the cross entropy of labels that the model draws itself: E[g^2] is the diagonal of Fisher's
information, and a small change d of the outputs costs about `sum_i E[g_i^2] d_i^2 / 2` in KL divergence (for
weights: HAWQ, arXiv 1905.03696; SqueezeLLM, arXiv 2306.07629). The gradient goes backwards through the blocks
as the text went forwards: the hidden states at every entrance are kept, each block is run again from them,
and no graph spans more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmpress.families import Layout
from lmpress.progress import track
from lmpress.source import failing_at
from lmpress.statistics import InputStatistics, StatisticsAccumulator
from lmpress.stream import Activations, BlockStream, Spooled, StreamBlock, replaced_blocks

Seen = Callable[[int, nn.Module, Mapping[str, Tensor], Mapping[str, InputStatistics]], None]
"""Hears of a block: its index, itself, and by linear the mean squared gradients and the moments of inputs."""


def entrance_gradient(outer: Any, stream: BlockStream, seed: int) -> Activations:
    """The gradient of the loss, summed over the tokens, by the hidden states behind the last block.

    Args:
        outer: the model, everything outside its blocks real.
        stream: behind the last block.

    Returns:
        float32 (samples, seq_len, width), in memory as far as the stream's budget goes.
    """
    device, windows = stream.device, stream.windows
    generator = torch.Generator(device).manual_seed(seed)
    gradients = stream.room(stream.states.shape[2])
    for i in range(windows.shape[0]):  # one window at a time: its logits are wide
        window = slice(i, i + 1)
        last = stream.states[window].to(device).requires_grad_(True)
        with torch.enable_grad():
            logits = _logits(outer, stream.layout, windows[window].to(device), last)
            labels = _drawn(logits.detach(), generator)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, last)
        gradients[window] = gradient.float().cpu()
    return gradients


def head_statistics(
    outer: Any, layout: Layout, windows: Tensor, states: Activations, device: torch.device
) -> tuple[Tensor, InputStatistics]:
    """What the head sees, and what it says; the arguments as above.

    Returns:
        how probable the model finds each token on average, float32 (vocabulary,), of sum 1 (counts of so
        little text would be zero for most tokens); and the statistics of the head's input.
    """
    head = outer.get_submodule(layout.head)
    inputs = StatisticsAccumulator(int(head.in_features), True, device)
    handle = head.register_forward_pre_hook(_gather(inputs))
    try:
        total = _mean_probabilities(outer, layout, windows, states, device)
    finally:
        handle.remove()
    return total, inputs.result()


def _mean_probabilities(
    outer: Any, layout: Layout, windows: Tensor, states: Activations, device: torch.device
) -> Tensor:
    total: Tensor | None = None
    for i in range(windows.shape[0]):
        with torch.no_grad():
            last = states[slice(i, i + 1)].to(device)
            logits = _logits(outer, layout, windows[i : i + 1].to(device), last)
        found = logits.softmax(-1).sum(0, dtype=torch.float64)
        total = found if total is None else total + found
    assert total is not None
    return (total / total.sum()).float().cpu()


def _logits(outer: Any, layout: Layout, ids: Tensor, last: Tensor) -> Tensor:
    """What the head makes of the hidden states behind the last block, float32 (tokens, vocabulary).

    Args:
        ids: of one window, (1, tokens).
        last: (1, tokens, width).
    """

    def stand(index: int, given: Tensor, args: Any, kwargs: Any) -> Tensor:
        return last if index == layout.num_blocks - 1 else given

    with replaced_blocks(outer, layout, stand):
        logits: Tensor = outer(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row (tokens, vocabulary), drawn from the softmax: the largest logit with Gumbel noise."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log_()).argmax(-1)


def squared_gradients(
    at: StreamBlock,
    block: nn.Module,
    entrance: Activations | Spooled,
    gradients: Activations,
    inputs: Mapping[str, StatisticsAccumulator] | None = None,
    positions: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mean squared gradients by the outputs of linears of one block; the gradients go on to its entrance.

    Args:
        at: tells how the block is called.
        entrance: the hidden states in front of the block, (samples, seq_len, width).
        gradients: by the hidden states behind the block, of this shape; afterwards by those in front.
        inputs: by linear, what gathers its inputs in the same pass.
        positions: takes, by linear, the squared gradients summed by position, (seq_len,).

    Returns:
        by linear, float32 (out,).
    """
    sums: dict[str, Tensor] = {}
    stream = at.stream
    seq_len = stream.windows.shape[1]
    handles = [
        block.get_submodule(name).register_forward_hook(_watch(name, sums, positions, seq_len))
        for name in at.layout.linears
    ]
    for name, accumulator in (inputs or {}).items():
        weights = at.weights_of(at.layout.site_of(name))
        handles.append(block.get_submodule(name).register_forward_pre_hook(_gather(accumulator, weights)))
    tokens = 0
    try:
        for rows in stream.batches():
            states = entrance[rows].to(stream.device).requires_grad_(True)
            with stream.forwards(gradients=True):
                output = at.call(block, rows, states)
                (gradient,) = torch.autograd.grad(output, states, gradients[rows].to(output))
            gradients[rows] = gradient
            tokens += states.shape[0] * states.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / max(1, tokens)).float().cpu() for name, total in sums.items()}


def _watch(
    name: str, sums: dict[str, Tensor], positions: dict[str, Tensor] | None, seq_len: int
) -> Callable[..., None]:
    def add(gradient: Tensor) -> None:
        squares = gradient.detach().reshape(-1, seq_len, gradient.shape[-1]).float().square()
        _add(sums, name, squares.double().sum((0, 1)))
        if positions is not None:
            _add(positions, name, squares.sum((0, 2)).double())

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook


def _add(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    sums[name] = sums[name] + more if name in sums else more


def _gather(accumulator: StatisticsAccumulator, weights: Tensor | None = None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        accumulator.update(args[0], weights=weights)

    return hook


@contextmanager
def entrances(
    stream: BlockStream, load: Callable[[int], nn.Module], directory: Path, label: str
) -> Iterator[list[Spooled]]:
    """Run the text through all blocks: the hidden states in front of every one, in files until the end."""
    kept: list[Spooled] = []
    try:
        for i in track(range(stream.layout.num_blocks), label):
            kept.append(Spooled(stream.states, stream.batch, directory))
            stream.block(i).advance(load(i))
        yield kept
    finally:
        for states in kept:
            states.close()


def sensitivities(
    stream: BlockStream,
    outer: Any,
    entered: Sequence[Activations | Spooled],
    load: Callable[[int], nn.Module],
    seen: Seen,
    seed: int,
) -> Activations:
    """Go back through all blocks, the last one first.

    Args:
        stream: whose states are those behind the last block.
        entered: the hidden states in front of every block.
        load: gives the real dense block of an index.
        seen: is called with each block's index, the block, its linears' mean squared gradients, and the
            statistics of their inputs, Hessians and all.

    Returns:
        the gradients by the hidden states in front of the first block, (samples, seq_len, width).
    """
    gradients = entrance_gradient(outer, stream, seed)
    for i in track(range(stream.layout.num_blocks - 1, -1, -1), "Sensitivity of the blocks"):
        _backwards(stream.block(i), load(i), entered[i], gradients, seen)  # alone: no block outlives its turn
    return gradients


def _backwards(
    at: StreamBlock, block: nn.Module, entrance: Activations | Spooled, gradients: Activations, seen: Seen
) -> None:
    """Let the gradients go through one block, and tell of it."""
    firsts = {site.linears[0]: site for site in at.layout.sites}
    inputs = {
        name: StatisticsAccumulator(
            int(cast(Any, block.get_submodule(name)).in_features), True, at.stream.device
        )
        for name in firsts
    }
    squares = squared_gradients(at, block, entrance, gradients, inputs)
    with failing_at(at.stream.layout.block_name(at.index)):
        results = {name: accumulator.result() for name, accumulator in inputs.items()}
    told = {linear: results[name] for name, site in firsts.items() for linear in site.linears}
    seen(at.index, block, squares, told)
