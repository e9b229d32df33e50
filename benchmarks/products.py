"""How fast do compressed weights run, against dense ones?

    python benchmarks/products.py                         single products
    python benchmarks/products.py MODEL                   a whole model: decoding and prefill
    python benchmarks/products.py MODEL --gguf FILE       the same, of a GGUF file in the directory MODEL

Every time is a median of rounds; in each round dense and compressed take turns, so that other load on the
machine hits both. Single products cycle over weights of 256 MB in all, as a model does, so that no dense
weight stays in a cache. A model decodes greedily after a prompt of 128 tokens (the time of one token), and
reads 512 tokens at once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.forms import CompressedEmbedding, CompressedLinear, Dense, Quantized
from lmpress.kernels import attach, run

GRIDS = {  # name: bits, symmetric, group (0: one scale a row)
    "int8": (8, True, 0),
    "uint8": (8, False, 0),
    "int4": (4, True, 0),
    "uint4": (4, False, 0),
    "int8/64": (8, True, 64),
    "int4/64": (4, True, 64),
    "uint4/64": (4, False, 64),
    "int4/32": (4, True, 32),
    "int2": (2, True, 0),
    "int3": (3, True, 0),
    "int5": (5, True, 0),
    "int6": (6, True, 0),
    "int7": (7, True, 0),
}
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))
CYCLED = 256 << 20


def quantize(weight: Tensor, bits: int, symmetric: bool, group: int) -> Quantized:
    """Round to the nearest point of a grid from the smallest to the largest weight that shares a scale."""
    rows, columns = weight.shape
    grouped = weight.detach().float().reshape(rows, -1, group or columns)
    if symmetric:
        scale = grouped.abs().amax(-1).clamp_min(1e-8) / (2 ** (bits - 1) - 1)  # (out, groups)
        codes = (grouped / scale[:, :, None]).round()
        return Quantized.from_codes(codes.view(rows, columns).to(torch.int16), scale, None, bits)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = ((grouped / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, 2**bits - 1)
    return Quantized.from_codes(codes.view(rows, columns).to(torch.int16), scale, zero.to(torch.int16), bits)


def medians(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Seconds for one of the calls that a contestant counts: the median over `rounds` rounds of turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            calls = work()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def cycle(forms: list[Any], x: Tensor) -> Callable[[], int]:
    """Run all `forms` on x once."""

    def work() -> int:
        for form in forms:
            run(form, x)
        return len(forms)

    return work


def products(names: list[str], dtype: torch.dtype, rounds: int) -> None:
    """One table: microseconds of a product, dense and compressed, and how much faster the latter is."""
    print(f"microseconds of one product, {dtype}, {torch.get_num_threads()} threads (x: times dense speed)")
    print(f"{'(out, in)':>14} {'tokens':>6} {'dense':>9}" + "".join(f"{name:>17}" for name in names))
    for rows, columns in SHAPES:
        for tokens in (1, 8, 512) if rows < 49152 else (1,):
            copies = max(2, min(64, CYCLED // (rows * columns * dtype.itemsize))) if tokens == 1 else 4
            weights = [torch.randn(rows, columns) for _ in range(copies)]
            x = torch.randn(tokens, columns).to(dtype)
            contestants = {"dense": cycle([Dense(w.to(dtype)) for w in weights], x)}
            for name in names:
                contestants[name] = cycle([quantize(w, *GRIDS[name]) for w in weights], x)
            seconds = medians(contestants, rounds)
            dense = seconds.pop("dense")
            cells = "".join(f"{1e6 * s:10.0f} ({dense / s:4.2f}x)" for s in seconds.values())
            print(f"{f'({rows}, {columns})':>14} {tokens:6} {1e6 * dense:9.0f}{cells}", flush=True)


def compressed(model: nn.Module, bits: int, symmetric: bool, group: int, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` with every linear and the embedding on a grid, as `attach` runs it.

    Embedding and head are tied where the model ties them, and have eight bits a weight at least.
    """
    replaced: dict[int, nn.Module] = {}
    tables: dict[int, Quantized] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            table = isinstance(module, nn.Embedding) or name.endswith("lm_head")
            form = tables.get(id(module.weight)) or (
                quantize(module.weight, 8, True, 0)
                if table
                else quantize(module.weight, bits, symmetric, group)
            )
            if table:
                tables[id(module.weight)] = form
            if isinstance(module, nn.Embedding):
                replaced[id(module)] = CompressedEmbedding(form, dtype)
            else:
                replaced[id(module)] = CompressedLinear(form, module.bias)
    return attach(copy.deepcopy(model, replaced))  # what the memo holds is taken instead of a copy


@torch.no_grad()
def decode(model: Any, prompt: Tensor, tokens: int) -> tuple[float, list[int]]:
    """Median seconds for one token after `prompt`, (1, length), decoding greedily; and the tokens."""
    out = model(prompt, use_cache=True, logits_to_keep=1)
    times, chosen = [], []
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        chosen.append(int(token))
        start = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times), chosen


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> float:
    """Seconds to read `tokens`, (1, length), and predict one more."""
    start = time.perf_counter()
    model(tokens, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def whole_model(path: str, gguf: str | None, names: list[str], dtype: torch.dtype, rounds: int) -> None:
    """One table: tokens a second of the model, dense and compressed."""
    from transformers import AutoModelForCausalLM

    dense: Any = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf, dtype=dtype).eval()
    models = {"dense": dense} | {name: compressed(dense, *GRIDS[name], dtype) for name in names}
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, dense.config.vocab_size, (1, 512), generator=generator)
    decoding: dict[str, list[float]] = {name: [] for name in models}
    reading: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():  # warm up
        prefill(model, text)
    for done in range(rounds):
        for name, model in models.items():
            decoding[name].append(decode(model, text[:, :128], 64)[0])
            reading[name].append(prefill(model, text))
        print(f"round {done + 1} of {rounds}", file=sys.stderr)
    print(f"tokens a second of {path}, {dtype}, {torch.get_num_threads()} threads (x: times dense speed)")
    print(f"{'weights':>10} {'decode':>16} {'prefill of 512':>18}")
    base = statistics.median(decoding["dense"]), statistics.median(reading["dense"])
    for name in models:
        one, all_ = statistics.median(decoding[name]), statistics.median(reading[name])
        print(
            f"{name:>10} {1 / one:8.1f} ({base[0] / one:4.2f}x) {512 / all_:10.0f} ({base[1] / all_:4.2f}x)",
            flush=True,
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory or hub name of a causal language model")
    parser.add_argument("--gguf", help="GGUF file in it")
    parser.add_argument("--grids", default="int8,int4,int4/64,uint4/64", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names, dtype = arguments.grids.split(","), getattr(torch, arguments.dtype)
    with torch.no_grad():
        if arguments.model:
            whole_model(arguments.model, arguments.gguf, names, dtype, arguments.rounds)
        else:
            products(names, dtype, arguments.rounds)


if __name__ == "__main__":
    main()
