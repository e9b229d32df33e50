"""What does each quantizer lose at the same real bits?

    python benchmarks/quantizers.py MODEL --text FILE                the relative output error of some linears
    python benchmarks/quantizers.py MODEL --gguf FILE --dither 32 --text FILE

Statistics come from the first half of the windows, errors are told on both halves: in brackets on the half
that the solver saw. Bits are those of the stored tensors, scales and tables included. `--dither 32` adds
uniform noise of one step of a 4-bit grid in groups of 32, for models that were quantized before: on their
own grid any method looks perfect.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.forms import Form
from lmpress.methods.entropy_quantization import (
    EntropyOptions,
    conditional_deviations,
    entropy_quantize,
    rate_curve,
    refine_step,
    solve_step,
)
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.hessian import relative_loss
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.statistics import InputStatistics, StatisticsAccumulator

Layers = dict[str, tuple[Tensor, InputStatistics, InputStatistics]]
WINDOW = 512


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model, **options)
    if arguments.dither:
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features % arguments.dither == 0:
                groups = module.weight.data.view(module.out_features, -1, arguments.dither)
                step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
                groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step
    return model, tokenizer


def gather(arguments: argparse.Namespace) -> Layers:
    """Weights and the statistics of both halves of the text, for linears spread over the depth."""
    model, tokenizer = load(arguments)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    names = list(linears)
    picked = [names[round(k * (len(names) - 1) / (arguments.linears - 1))] for k in range(arguments.linears)]
    text = Path(arguments.text).read_text(encoding="utf-8")[: 8 * arguments.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: arguments.tokens]
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    halves: list[dict[str, InputStatistics]] = []
    for half in windows.chunk(2):
        sums = {n: StatisticsAccumulator(linears[n].in_features, hessian=True) for n in picked}
        hooks = [
            linears[n].register_forward_pre_hook(lambda _, x, n=n: sums[n].update(x[0]))  # noqa: B023
            for n in picked
        ]
        with torch.no_grad():
            for window in half:
                model.base_model(window[None])
        for hook in hooks:
            hook.remove()
        halves.append({n: s.result() for n, s in sums.items()})
    return {n: (linears[n].weight.data.clone(), halves[0][n], halves[1][n]) for n in picked}


def tell(
    name: str,
    layers: Layers,
    method: Callable[[Tensor, InputStatistics], Form],
    reference: float | None = None,
) -> float:
    """Print one line; the mean bits a weight."""
    start, bits, weights = time.perf_counter(), 0.0, 0
    seen, unseen = [], []
    for weight, statistics, held in layers.values():
        form = method(weight, statistics)
        bits += 8 * form.num_bytes
        weights += weight.numel()
        seen.append(relative_loss(weight, form.dense(), statistics.require_hessian()))
        unseen.append(relative_loss(weight, form.dense(), held.require_hessian()))
    seconds = time.perf_counter() - start
    means = [
        math.exp(sum(math.log(max(e, 1e-30)) for e in errors) / len(errors)) for errors in (unseen, seen)
    ]
    columns = " ".join(f"{error:8.5f}" for error in unseen)
    print(
        f"{name:34} {bits / weights:6.3f} {means[0]:8.5f} ({means[1]:.5f}) {columns} {seconds:6.1f}",
        flush=True,
    )
    return bits / weights


def entropy_coded(layers: Layers, bits: float, options: EntropyOptions) -> Callable[..., Form]:
    """One step for all layers, each as sensitive as its output is small, that takes `bits` a weight."""
    power = {
        id(w): w.numel() / w.shape[1] / float(((w @ s.require_hessian()) * w).sum())
        for w, s, _ in layers.values()
    }

    def method(step: float) -> Callable[..., Form]:
        return lambda w, s: entropy_quantize(w, s, step, options, sensitivity=power[id(w)]).form

    def measure(step: float) -> float:
        total = sum(method(step)(w, s).num_bytes for w, s, _ in layers.values())
        return 8 * total / sum(w.numel() for w, _, _ in layers.values())

    curves = [
        rate_curve(w, conditional_deviations(s, options), options, sensitivity=power[id(w)])
        for w, s, _ in layers.values()
    ]
    step, _ = refine_step(measure, solve_step(curves, bits), bits, tolerance=0.01)
    return method(step)


def main() -> None:
    """Read the command line, and print one table a bit width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gguf", help="a GGUF file in the directory MODEL")
    parser.add_argument("--tokenizer", help="where it is not MODEL")
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=16384, help="for both halves together")
    parser.add_argument("--linears", type=int, default=4)
    parser.add_argument("--dither", type=int, default=0, help="group size of the noise; 0 for none")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--granularity", default="group:64")
    arguments = parser.parse_args()
    layers = gather(arguments)
    for name, (weight, _, _) in layers.items():
        print(f"# {name} {tuple(weight.shape)}", file=sys.stderr)
    print(f"{'method':34} {'bits':>6} {'error':>8} (seen)    of each linear, and seconds")
    for bits in arguments.bits:
        how: dict[str, Any] = {"bits": bits, "granularity": arguments.granularity}
        for clip in (False, True):
            options = RoundOptions(**how, clip=clip)
            tell(f"round{', clip' * clip}", layers, lambda w, s, o=options: round_to_nearest(w, s, o).form)
            # type: ignore[misc]
        cases: dict[str, dict[str, Any]] = {
            "gptq, no order": {"order": "none"},
            "gptq, group-aware": {},
            "gptq, activation order": {"order": "activation"},
            "gptq, no clip": {"clip": False},
            "gptq, dynamic groups": {"static_groups": False},
            "gptq, one sweep": {"sweeps": 1},
            "gptq, dynamic groups, one sweep": {"static_groups": False, "sweeps": 1},
            "gptq, asymmetric": {"symmetric": False},
        }
        stored = math.inf
        for name, changed in cases.items():
            solver = GptqOptions(**{**how, **changed})
            taken = tell(name, layers, lambda w, s, o=solver: gptq(w, s, o).form)  # type: ignore[misc]
            stored = min(stored, taken)
        for name, coded in {
            "entropy-coded": EntropyOptions(),
            "entropy-coded, no dead zone": EntropyOptions(dead_zone=0.0),
            "entropy-coded, flat columns": EntropyOptions(flat_columns=True),
            "entropy-coded, codes of a byte": EntropyOptions(largest_code=127),
        }.items():
            tell(name, layers, entropy_coded(layers, stored, coded))
        print()


if __name__ == "__main__":
    main()
