"""The bytes that every shipped recipe makes of small models, as hashes.

    python -m tests.pins.make            # prints what the code gives now
    python -m tests.pins.make --write    # and keeps it: only with a commit that tells why the bytes changed

It runs in a process of its own, in plain instructions and on one thread, so that processors agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINS = Path(__file__).with_name("pins.json")

PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "HF_HUB_OFFLINE": "1",
}
"""The same products and sums on every processor of a kind."""

MORE: dict[str, list[dict[str, Any]]] = {
    "ranks": [
        {
            "svd": {
                "targets": "linears",
                "method": "svd_llm",
                "ratio": 0.7,
                "allocation": "sensitivity",
                "update": 0.5,
            }
        },
        {"pivot": {"targets": "linears"}},
        {"quantize": {"targets": "linears", "bits": 8}},
    ],
    "corrected": [
        {"quantize": {"targets": "linears", "bits": 3, "solver": "gptq"}},
        {"correct": {"targets": "linears", "rank": 8, "bits": 8}},
    ],
    "alps": [{"sparsify": {"targets": "linears", "method": "alps", "sparsity": 0.6, "asymmetry": 0.5}}],
    "pruned-sparse": [
        {"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 32}},
        {"sparsify": {"targets": "mlp", "sparsity": 0.5, "allocation": "sensitivity"}},
        {"quantize": {"targets": "mlp", "bits": 4, "solver": "gptq"}},
    ],
    "searched": [
        {"sparse_low_rank": {"targets": "linears", "sparsity": 0.5, "kappa": None, "factor_bits": 8}}
    ],
    "narrow-coded": [
        {"prune_neurons": {"allocation": "loss", "ratio": 0.25, "multiple_of": 32}},
        {"entropy_quantize": {"targets": "linears", "bits": 4.0}},
        {"entropy_quantize": {"targets": "embeddings", "bits": 5.0}},
    ],
    "merged": [
        {"quantize": {"targets": "linears", "bits": 4, "granularity": "name"}},
        {"recover": {"steps": 4, "seq_len": 32, "learning_rate": 0.01}},
    ],
}
"""Options that no shipped recipe has."""


def found() -> dict[str, dict[str, str]]:
    """What the code gives now, by model and recipe."""
    command = [sys.executable, "-m", "tests.pins.make", "--here"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env={**os.environ, **PLAIN}, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    result: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _models(root: Path) -> dict[str, Path]:
    """Two small models whose widths all recipes divide: gated and tied; and with biases, without a gate."""
    from transformers import LlamaConfig, OPTConfig

    from tests import tiny

    wide = {**tiny._COMMON, "hidden_size": 128}
    configs: dict[str, Any] = {
        "llama": LlamaConfig(**wide, intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        "opt": OPTConfig(**wide, ffn_dim=192, dropout=0.0, tie_word_embeddings=False),
    }
    places = {}
    for name, config in configs.items():
        tiny.TINY[name] = lambda config=config: config
        places[name] = tiny.save_tiny(name, root / name)
    return places


def here() -> dict[str, dict[str, str]]:
    """Compress every model by every shipped recipe, and hash the shards."""
    import torch

    import lmpress
    from tests.tiny import tiny_text

    torch.set_num_threads(1)
    pins: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        text = root / "text.txt"
        text.write_text(tiny_text(40_000, seed=1), encoding="utf-8")
        for model, directory in _models(root).items():
            for name, recipe in _recipes().items():
                small = {"samples": 16, "seq_len": 64, "precision": "float32"}
                recipe["calibration"] = {**recipe["calibration"], **small}
                for step in recipe["steps"]:
                    if "recover" in step:
                        step["recover"] |= {"steps": 4, "seq_len": 32}
                out = root / f"{model}-{name}"
                lmpress.compress(directory, recipe, out, calibration=str(text))
                pins.setdefault(model, {})[name] = _hash(out)
    return pins


def _recipes() -> dict[str, dict[str, Any]]:
    from lmpress.recipes import load_recipe, parse_recipe, shipped_recipes

    shipped = {name: load_recipe(name).resolved() for name in shipped_recipes()}
    return shipped | {name: parse_recipe({"steps": steps}, name).resolved() for name, steps in MORE.items()}


def _hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for shard in sorted(directory.glob("model-*.safetensors")):
        digest.update(shard.name.encode() + shard.read_bytes())
    return digest.hexdigest()[:24]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(here()))
    else:
        pins = found()
        if arguments.write:
            PINS.write_text(json.dumps(pins, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(pins, indent=1))
