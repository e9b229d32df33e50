"""Is `spq` better than its parts at the same real bytes? Compress with each, measure all in one pass.

    python benchmarks/spq.py -o DIR --calibration TEXT[,TEXT] --text TEXT

Prints one table and its protocol. `svd` and `prune` alone keep 16-bit linears and get 8-bit embeddings (in 16
bits, these alone would take the budget of the smallest models); their ratios are set so that the whole
directory weighs what the one of `spq` does. `spq-paper` runs without its LoRA. Compressing takes a quarter of
an hour on two cores; measuring the whole of WikiText-2's test text takes 70 minutes in float32, and less
in bfloat16 on a processor that multiplies it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lmpress
from lmpress.api import evaluate_many
from lmpress.evaluation import evaluation_table
from lmpress.progress import console
from lmpress.recipes import load_recipe

CALIBRATION = {"samples": 64, "seq_len": 512}
EMBEDDINGS = {"quantize": {"targets": "embeddings", "bits": 8}}


def part(name: str, ratio: float) -> dict[str, Any]:
    """`svd` or `prune` alone at a ratio: the share kept by svd, the share removed by prune."""
    steps: list[dict[str, Any]] = [{"svd": {"targets": "linears", "ratio": ratio}}]
    if name == "prune":
        steps = [{"prune_neurons": {"allocation": "loss", "ratio": ratio, "multiple_of": 32}}]
    return {"name": f"{name}-alone", "calibration": CALIBRATION, "steps": [*steps, EMBEDDINGS]}


def matched(name: str, model: str, target: int) -> dict[str, Any]:
    """The recipe of a part whose predicted weights are nearest to `target` bytes."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        heavy = lmpress.plan(model, part(name, middle))["predicted"]["bytes"] > target
        if heavy == (name == "svd"):
            high = middle
        else:
            low = middle
    return part(name, low)


def without_recovery(name: str) -> dict[str, Any]:
    """A shipped recipe without its `recover` step, on the calibration of this benchmark."""
    plain = load_recipe(name).resolved()
    steps = [step for step in plain["steps"] if "recover" not in step]
    return plain | {"name": f"{name}-no-lora", "calibration": CALIBRATION, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument(
        "--dtype", default="auto", help="of activations and what is computed in floating point"
    )
    parser.add_argument("--only", nargs="*", help="of: int8 spq spq-paper svd prune")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    only = args.only or ["int8", "spq", "spq-paper", "svd", "prune"]

    def run(name: str, recipe: Any) -> None:
        lmpress.compress(args.model, recipe, args.output / name, calibration=args.calibration, resume=True)

    run("spq", "spq")
    weights = json.loads((args.output / "spq" / "lmpress.json").read_text())["sizes"]["weight_bytes"]
    recipes: dict[str, Any] = {"int8": lambda: "int8", "spq": lambda: "spq"}
    recipes["spq-paper"] = lambda: without_recovery("spq-paper")
    recipes["svd"] = lambda: matched("svd", args.model, weights)
    recipes["prune"] = lambda: matched("prune", args.model, weights)
    for name in only:
        run(name, recipes[name]())
    results = evaluate_many(
        {"dense": args.model} | {name: args.output / name for name in only},
        text=args.text,
        reference="dense",
        max_tokens=args.max_tokens,
        dtype=args.dtype,
    )
    console.print(evaluation_table(results, title=f"{args.model}: the parts and the whole"))
    first = results["dense"].texts[0]
    print(json.dumps({name: result.to_json() | {"reference": None} for name, result in results.items()}))
    console.print(
        f"calibration {args.calibration}, {CALIBRATION['samples']} x {CALIBRATION['seq_len']} tokens; "
        f"evaluation {first.protocol.corpus}, sha256 {first.protocol.corpus_sha256[:16]}, "
        f"{first.score.tokens} tokens predicted, windows of {first.protocol.window} without overlap, "
        f"BOS {first.protocol.bos}, {first.score.dtype}; bytes: all files of the directory"
    )


if __name__ == "__main__":
    main()
