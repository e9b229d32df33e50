"""Which sparse or low-rank form keeps the output of real layers best, at half of the parameters?

    python benchmarks/sparsity.py MODEL TEXT [--gguf FILE] [--block 15] [--tokens 8192]

Prints the relative squared output error of three linears of one block, on the calibration tokens and on
half as many held-out tokens, the bits per weight (16-bit values, bitmaps counted), and the seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmpress.forms import Dense, Form
from lmpress.methods.alps import AlpsOptions, alps
from lmpress.methods.hessian import relative_loss
from lmpress.methods.low_rank_correction import CorrectionOptions
from lmpress.methods.result import Rewritten
from lmpress.methods.sparsegpt import SparseGptOptions, prune_then_quantize, sparsegpt
from lmpress.methods.sslc import SslcOptions, sslc
from lmpress.methods.svd_llm import SvdLlmOptions, svd_llm
from lmpress.methods.wanda import WandaOptions, wanda
from lmpress.statistics import InputStatistics, StatisticsAccumulator

WINDOW = 512

Method = Callable[[Tensor, InputStatistics], Rewritten]

QUANTIZED = SparseGptOptions(bits=4)
SURVIVORS = SparseGptOptions(bits=4, damping=0.1, per_channel_damping=True, sweeps=1)

METHODS: dict[str, Method] = {
    "magnitude 50 %": lambda w, s: wanda(w, s, WandaOptions(score="magnitude", per_row=False)),
    "wanda 50 %": lambda w, s: wanda(w, s, WandaOptions()),
    "sparsegpt 50 %": lambda w, s: sparsegpt(w, s, SparseGptOptions()),
    "alps 50 %": lambda w, s: alps(w, s, AlpsOptions()),
    "svd-llm 50 %": lambda w, s: svd_llm(w, s, SvdLlmOptions(ratio=0.5, update=1.0)),
    "sslc 50 %, diagonal": lambda w, s: sslc(w, s, SslcOptions(metric="diagonal", iterations=40)),
    "sslc 50 %": lambda w, s: sslc(w, s, SslcOptions()),
    "magnitude 2:4": lambda w, s: wanda(w, s, WandaOptions(score="magnitude", pattern="2:4")),
    "wanda 2:4": lambda w, s: wanda(w, s, WandaOptions(pattern="2:4")),
    "sparsegpt 2:4": lambda w, s: sparsegpt(w, s, SparseGptOptions(pattern="2:4")),
    "alps 2:4": lambda w, s: alps(w, s, AlpsOptions(pattern="2:4")),
    "prune, then 4 bits": lambda w, s: prune_then_quantize(w, s, QUANTIZED),
    "joint 50 % + 4 bits": lambda w, s: sparsegpt(w, s, QUANTIZED),
    "sslc 50 % + 4 bits": lambda w, s: sslc(
        w, s, SslcOptions(survivors=SURVIVORS, factors=CorrectionOptions(bits=4))
    ),
}


def gather(model: nn.Module, layers: dict[str, nn.Linear], windows: Tensor) -> dict[str, InputStatistics]:
    """Statistics of the inputs of some linears over token windows (count, WINDOW)."""
    sums = {name: StatisticsAccumulator(layer.in_features, hessian=True) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: sums[name].update(args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: accumulator.result() for name, accumulator in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--gguf", default=None, help="a GGUF file in MODEL")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, gguf_file=arguments.gguf)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, gguf_file=arguments.gguf, dtype=torch.float32
    ).eval()
    count = arguments.tokens // WINDOW
    text = arguments.text.read_text()[: 8 * arguments.tokens * 3 // 2]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: WINDOW * (count + count // 2)].view(-1, WINDOW)
    names = ("q_proj", "up_proj", "down_proj")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{arguments.block}." in name and name.endswith(names)
    }
    seen, unseen = (gather(model, layers, part) for part in (ids[:count], ids[count:]))
    noise = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        weight = layer.weight.detach()
        # a GGUF model lies on a grid of its own, which would flatter every other grid or spoil it
        weight = weight + 0.05 * weight.std() * torch.randn(weight.shape, generator=noise)
        print(f"\n{name} {tuple(weight.shape)}\n{'':22} {'seen':>8} {'unseen':>8} {'bpw':>6} {'s':>6}")
        for title, method in METHODS.items():
            start = time.perf_counter()
            form = method(weight.half().float(), seen[name]).form
            seconds = time.perf_counter() - start
            errors = [relative_loss(weight, form.dense(), s[name].require_hessian()) for s in (seen, unseen)]
            stored = stored_bits(form)
            print(f"{title:22} {errors[0]:8.5f} {errors[1]:8.5f} {stored:6.2f} {seconds:6.2f}", flush=True)


def stored_bits(form: Form) -> float:
    """Bits per weight with floating-point values stored in 16 bits."""
    return form.rewrite(
        lambda leaf: Dense(leaf.dense(torch.float16)) if isinstance(leaf, Dense) else leaf
    ).bits_per_weight


if __name__ == "__main__":
    main()
