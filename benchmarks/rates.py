"""What does a bit buy? Recipes of one kind, by one calibration and one evaluation.

    python benchmarks/rates.py -o DIR --c4 FILE --text FILE [--kind bits] [--max-tokens N] [--only NAME ...]

Kinds: `bits`, every way of quantizing at every rate; `both`, structure and bits together at these rates;
`all`, these two; `structure`, what sparsity and low rank keep at half of the parameters, and at equal bytes;
`calibration`, GPTQ at 4 bits by what its moments are gathered with; `equal`, 4 bits behind scales (AWQ) and
rotations that leave the dense model as it is.

FILE of C4 has a document a line: the last fifth is held back and evaluated on, the rest is calibrated on.
Prints one table (block bits per weight and bytes of the whole directory, perplexity on both texts relative to
the dense model of the same run, KL divergence), how the coder does against the entropy, how long the model
takes to load, and the protocol. A recipe takes one to ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lmpress
from lmpress.api import compare
from lmpress.progress import console
from lmpress.recipes import load_recipe

KINDS = ("bits", "structure", "both", "all", "calibration", "equal")
WEIGHTED = {"weighting": "positions"}
GUIDED = {"allocation": "sensitivity", "asymmetry": 0.5}
COARSE = {"quantize": {"targets": "embeddings", "bits": 8, "granularity": "channel"}}


def coded(bits: float) -> dict[str, Any]:
    """Entropy-coded linears at a rate that no shipped recipe has, embeddings as all the others have them."""
    steps = [{"entropy_quantize": {"targets": "linears", "bits": bits, "asymmetry": 0.5}}, COARSE]
    return {"name": f"ec-{bits}", "calibration": WEIGHTED, "steps": steps}


def alone(name: str, step: dict[str, Any]) -> dict[str, Any]:
    """One step on the linears, 16 bits, embeddings untouched."""
    return {"name": name, "steps": [step]}


def chosen(kind: str) -> list[Any]:
    """The recipes of a table. Those of `bits` have the same embeddings, 8 bits a row."""
    if kind == "all":
        return [*chosen("bits"), *chosen("both")]
    if kind == "calibration":
        return by_calibration()
    if kind == "equal":
        return [*in_front("group:64"), *in_front("channel")]
    if kind == "bits":
        fixed = ["gptq-8bit", "gptq-4bit", "mixed-4bit", "mixed-3bit"]
        coded_ones = map(coded, (8.0, 6.0, 4.25, 4.0, 3.25, 2.5))
        return [*map(load_recipe, fixed), mixed(6.0), mixed(2.5), *coded_ones]
    if kind == "both":
        shipped = ("spq", "spq-4bit", "joint-25-4bit", "joint-50-4bit", "sslc-50-4bit")
        return [*map(load_recipe, shipped), narrow(), joint(40, 8), joint(60, 3)]
    fixed = ["sslc-50", "sparsegpt-50", "wanda-50", "sslc-2of4", "sparsegpt-2of4", "wanda-2of4"]
    # with its closed-form update, as the paper advises where much is removed
    low_rank = {"targets": "linears", "method": "svd_llm", "update": 1.0}
    return [
        *map(load_recipe, fixed),
        # published methods take all tokens alike, as their recipes do; `sslc` weighs them, and so does this
        alone("sparsegpt-50-weighted", {"sparsify": {"sparsity": 0.5}}) | {"calibration": WEIGHTED},
        alone("sparsegpt-50-guided", {"sparsify": {"sparsity": 0.5} | GUIDED}) | {"calibration": WEIGHTED},
        alone("magnitude-50", {"sparsify": {"method": "magnitude", "sparsity": 0.5}}),
        alone("magnitude-2of4", {"sparsify": {"method": "magnitude", "pattern": "2:4"}}),
        alone("svd-llm-50", {"svd": low_rank | {"ratio": 0.5}}),
        # half of the weights and a bitmap are 9 bits a weight: what low rank may keep at these bytes
        alone("svd-llm-9-bits", {"svd": low_rank | {"ratio": 0.5625}}),
        alone("svd-llm-9-bits-shared", {"svd": low_rank | {"ratio": 0.5625, "allocation": "sensitivity"}}),
    ]


def by_calibration() -> list[dict[str, Any]]:
    """One scheme, embeddings as they are, and one more means in each."""
    gptq = {"bits": 4, "granularity": "group:64", "symmetric": True, "solver": "gptq", "clip": True}
    sweep = gptq | {"sweeps": 1}
    return [
        alone("float32", {"quantize": gptq}) | {"calibration": {"precision": "float32"}},
        alone("bfloat16", {"quantize": gptq}) | {"calibration": {"precision": "bfloat16"}},
        alone("positions", {"quantize": gptq}) | {"calibration": WEIGHTED},
        alone("sweep", {"quantize": sweep}) | {"calibration": WEIGHTED},
        alone("asymmetry", {"quantize": sweep | {"asymmetry": 0.5}}) | {"calibration": WEIGHTED},
    ]


def in_front(granularity: str) -> list[dict[str, Any]]:
    """Rounding and GPTQ at 4 bits, embeddings as they are, behind what leaves the dense model as it is."""
    fronts: dict[str, list[dict[str, Any]]] = {"": [], "awq-": [{"awq": {}}], "rotate-": [{"rotate": {}}]}
    solvers = {"round": {"solver": "round"}, "gptq": {"solver": "gptq", "sweeps": 1}}
    grid = {"bits": 4, "granularity": granularity, "clip": True}
    return [
        {
            "name": f"{front}{solver}-{granularity.replace(':', '')}",
            "calibration": WEIGHTED | {"samples": 16},  # a quarter of the text of the other tables
            "steps": [*steps, {"quantize": grid | how}],
        }
        for front, steps in fronts.items()
        for solver, how in solvers.items()
    ]


def mixed(bits: float) -> dict[str, Any]:
    """Whole bits by module at a rate that no shipped recipe has."""
    shared = load_recipe("mixed-4bit").steps[0].model_dump() | {"bits": bits}
    return {"name": f"mixed-{bits}", "calibration": WEIGHTED, "steps": [{"quantize": shared}, COARSE]}


def joint(percent: int, bits: int) -> dict[str, Any]:
    """So many weights of a hundred removed, the others at so many bits, and a bitmap."""
    grid = "channel" if bits == 8 else "group:64"
    one_pass = {"sparsity": percent / 100, "bits": bits, "granularity": grid, "sweeps": 1} | GUIDED
    plan = {"name": f"joint-{percent}-{bits}bit", "calibration": WEIGHTED}
    return plan | {"steps": [{"sparsify": one_pass}, COARSE]}


def narrow() -> dict[str, Any]:
    """A third of the neurons removed, 8 bits: 6 bits a weight of the dense model, and as much less work."""
    prune = {"allocation": "loss", "ratio": 0.335, "multiple_of": 32}
    eight = {"targets": "linears", "bits": 8, "solver": "gptq"}
    plan = {"name": "narrow-8bit", "calibration": WEIGHTED}
    return plan | {"steps": [{"prune_neurons": prune}, {"quantize": eight}, COARSE]}


def split(path: Path, directory: Path) -> tuple[Path, Path]:
    """The documents to calibrate on and the held-back ones, as files."""
    documents = path.read_text(encoding="utf-8").splitlines()
    cut = len(documents) * 4 // 5
    directory.mkdir(parents=True, exist_ok=True)
    parts = directory / "c4-calibration.txt", directory / "c4-held-back.txt"
    for part, lines in zip(parts, (documents[:cut], documents[cut:]), strict=True):
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return parts


def seconds_to_load(directory: Path) -> float:
    """From the files to a model that is ready to run, decoding included; the second time of two."""
    for _ in range(2):
        start = time.perf_counter()
        lmpress.load(directory, verify=False)
        took = time.perf_counter() - start
    return took


def main() -> None:
    """Compress, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--c4", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--kind", choices=KINDS, default="bits")
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--dtype", default="float32", help="that the models are evaluated in")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    calibration, held = split(args.c4, args.output)
    recipes = [r for r in map(load_recipe, chosen(args.kind)) if not args.only or r.name in args.only]
    result = compare(
        args.model,
        recipes,
        args.output,
        calibration=f"file:{calibration}",
        text=[f"file:{args.text}", f"file:{held}"],
        max_tokens=args.max_tokens,
        throughput=args.throughput,
        dtype=args.dtype,
    )
    dense = result.rows[0].evaluation
    heads = f"{'wiki':>8} {'c4':>9} {'KL':>7} {'KL c4':>7} {'RAM, MB':>8} {'prefill':>7} {'decode':>7}"
    print(f"{'recipe':21} {'bpw':>6} {'bytes':>11} {'ratio':>6} {heads} {'load':>6} {'made in':>8}")
    for row in result.rows:
        told = row.evaluation
        change = [
            100 * (own.score.perplexity / ref.score.perplexity - 1)
            for own, ref in zip(told.texts, dense.texts, strict=True)
        ]
        kl = [f"{text.score.kl:7.4f}" if text.score.kl is not None else " " * 7 for text in told.texts]
        speed = told.throughput
        speeds = (None, None) if speed is None else (speed.prefill_ratio, speed.decode_ratio)
        ratios = " ".join(f"{'':>7}" if x is None else f"{x:6.2f}x" for x in speeds)
        load = "" if row.name == "dense" else f"{seconds_to_load(args.output / row.name):5.1f}s"
        print(
            f"{row.name:21} {told.bpw:6.3f} {told.bytes_on_disk:11,} {told.ratio:6.3f} "
            f"{change[0]:+7.2f}% {change[1]:+8.2f}% {' '.join(kl)} {told.resident_bytes / 1e6:8.1f} {ratios} "
            f"{load:>6} {row.seconds or 0:7.0f}s"
        )
    for text in dense.texts:
        console.print(
            f"{text.protocol.corpus}, sha256 {text.protocol.corpus_sha256[:16]}: "
            f"dense {text.score.perplexity:.4f}, "
            f"{text.score.tokens} tokens predicted, windows of {text.protocol.window}, {text.score.dtype}"
        )
    print(json.dumps({row.name: row.to_json() for row in result.rows}))


if __name__ == "__main__":
    main()
