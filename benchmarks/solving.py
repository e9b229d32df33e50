"""Where does the time of a compression go, and does it grow with more than the number of blocks?

    python benchmarks/solving.py [--width 4096]

First a square weight of WIDTH inputs is solved alone, by every solver that takes a Hessian. Then random
models of 4 and 8 equal blocks are compressed by `gptq-4bit` and `ec-4bit` under Python's profiler: seconds a
block, and the functions that take most of the time by themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import make, tokenizer

from lmpress.methods.entropy_quantization import EntropyOptions, entropy_quantize
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.sparsegpt import SparseGptOptions, sparsegpt
from lmpress.recipes import load_recipe
from lmpress.statistics import InputStatistics

ALGEBRA = ("mm", "linear", "addr", "matmul", "cholesky", "triangular", "attention", "eigh", "svd")
"""What counts as matrix algebra, by parts of the names of torch's functions."""

CODE = """
import cProfile, json, pstats, sys
import lmpress
found = cProfile.Profile()
done = found.runcall(lmpress.compress, sys.argv[1], sys.argv[2], sys.argv[3], calibration=sys.argv[4])
rows = [(f"{place[0]} {place[2]}", own) for place, (_, _, own, _, _) in pstats.Stats(found).stats.items()]
print(json.dumps({"seconds": done.seconds, "rows": sorted(rows, key=lambda row: -row[1])}))
"""


def alone(width: int) -> None:
    """Seconds of each solver on a (width, width) weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * width, width, generator=generator) * torch.rand(width, generator=generator)
    hessian = x.T @ x / len(x)
    statistics = InputStatistics(len(x), x.mean(0), hessian.diagonal().clone(), x.abs().mean(0), hessian)
    weight = torch.randn(width, width, generator=generator) * 0.02
    four = {"bits": 4, "granularity": "group:64"}
    solvers = {
        "gptq, 4 bits": lambda: gptq(weight, statistics, GptqOptions(**four)),
        "gptq, 4 bits, clip": lambda: gptq(weight, statistics, GptqOptions(**four, clip=True)),
        "entropy-coded": lambda: entropy_quantize(weight, statistics, 0.01, EntropyOptions()),
        "sparsegpt, half": lambda: sparsegpt(weight, statistics, SparseGptOptions(sparsity=0.5)),
    }
    print(f"a weight of {width} x {width}, a Hessian of {width}, {torch.get_num_threads()} threads")
    for name, solve in solvers.items():
        start = time.perf_counter()
        solve()
        print(f"{name:24} {time.perf_counter() - start:7.1f} s", flush=True)


def whole(recipe: str, root: Path) -> None:
    """Seconds a block of two depths, and the profile of the deeper model."""
    plain = load_recipe(recipe).resolved() | {"calibration": {"samples": 16, "seq_len": 512}}
    (root / "recipe.yaml").write_text(json.dumps(plain))
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 10007) for i in range(20_000)))
    for blocks in (4, 8):
        model = root / f"model-{blocks}"
        if not model.exists():
            make(model, blocks)
            tokenizer(model)
        places = [str(root / part) for part in (model.name, "recipe.yaml", f"{recipe}-{blocks}", "text.txt")]
        command = [sys.executable, "-c", CODE, *places]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{recipe}, {blocks} blocks: {told['seconds']:.1f} s, {told['seconds'] / blocks:.2f} s a block")
    total = sum(seconds for _, seconds in told["rows"])
    algebra = sum(s for name, s in told["rows"] if name[0] == "~" and any(part in name for part in ALGEBRA))
    print(
        f"of {total:.1f} s in torch's operations, matrix algebra takes {100 * algebra / total:.0f} %; most:"
    )
    for name, seconds in told["rows"][:8]:
        print(f"    {seconds:7.2f} s  {name[-80:]}")


def main() -> None:
    """Solve one weight, then whole models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    args = parser.parse_args()
    alone(args.width)
    with tempfile.TemporaryDirectory() as temporary:
        for recipe in ("gptq-4bit", "ec-4bit"):
            whole(recipe, Path(temporary))


if __name__ == "__main__":
    main()
