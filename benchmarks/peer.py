"""Is GPTQ here as good as llm-compressor's at the same bits, on the same calibration tokens?

    python benchmarks/peer.py -o DIR --calibration TEXT --text TEXT [--peer-python PATH]

4 bits, symmetric, groups of 64, all linears of the blocks; embeddings and head stay as they are. Both start
from one float32 directory and calibrate on the same 64 x 512 token ids. llm-compressor runs in an environment
of its own, which is made in DIR unless --peer-python names one, in float32, with its defaults (static
activation order, damping 0.01) and with each weight observer of --observers. lmpress runs twice: on equal
terms (float32, all tokens alike), and as `gptq-4bit` does (products in bfloat16 where the machine has it,
positions weighed, a sweep of coordinate descent). The peer's weights are measured as it leaves them, on their
grid, with scales in float32; lmpress stores scales, embeddings and norms in 16 bits.

Prints one table and its protocol. `seconds` is the time of the call alone: of `oneshot` on a model that is in
memory, nothing written; of `compress` from files to files. `process` counts imports, loading and saving too.
What DIR holds of the same tokens is not run again: take one DIR a model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import load_file

from lmpress.api import evaluate_many
from lmpress.api.loading import load_any
from lmpress.corpora import calibration_windows, fingerprint, load_corpus
from lmpress.evaluation import Evaluation
from lmpress.progress import console, note

BITS, GROUP, SEED = 4, 64, 42

PEER = """
import json, resource, shutil, sys, time
from pathlib import Path
import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

dense, ids, observer, bits, group, out, draft = sys.argv[1:]
bits, group = int(bits), int(group)
model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
windows = np.load(ids).tolist()
dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
weights |= {"observer": observer}
modifier = GPTQModifier(
    ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
)
start = time.perf_counter()
oneshot(
    model=model,
    tokenizer=dense,
    dataset=dataset,
    recipe=modifier,
    batch_size=8,  # what lmpress takes for windows of 512
    num_calibration_samples=len(windows),
    max_seq_length=len(windows[0]),
    shuffle_calibration_samples=False,
)
seconds = time.perf_counter() - start

quantized = 0
for name, module in model.named_modules():
    if getattr(module, "weight_scale", None) is None:
        continue
    weight, scale = module.weight.detach(), module.weight_scale.detach()
    codes = weight.unflatten(1, (-1, group)) / scale[..., None]
    assert (codes - codes.round()).abs().max() < 1e-2, f"{name} is not on its grid"
    assert codes.round().min() >= -(2 ** (bits - 1)) and codes.round().max() < 2 ** (bits - 1), name
    quantized += 1

state = model.state_dict()
target = Path(out)
target.mkdir(parents=True)
for path in Path(dense).iterdir():
    if path.suffix != ".safetensors":
        shutil.copy(path, target)
        continue
    with safe_open(path, "pt") as file:
        kept = {name: state[name].detach().cpu().contiguous().clone() for name in file.keys()}
    save_file(kept, target / path.name, metadata={"format": "pt"})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
told = {"seconds": seconds, "peak": peak, "linears": quantized, "order": str(modifier.actorder)}
Path(draft).write_text(json.dumps(told))
"""

OWN = """
import json, sys
from pathlib import Path
import lmpress
dense, recipe, text, out, draft = sys.argv[1:]
done = lmpress.compress(dense, json.loads(recipe), out, calibration=text)
Path(draft).write_text(json.dumps({"seconds": done.seconds, "peak": done.peak_resident_set}))
"""


def recipes(samples: int, seq_len: int) -> dict[str, dict[str, Any]]:
    """lmpress's side: on equal terms, and as `gptq-4bit` does it."""
    step = {
        "targets": "linears",
        "bits": BITS,
        "granularity": f"group:{GROUP}",
        "symmetric": True,
        "solver": "gptq",
        "clip": True,
    }
    size = {"samples": samples, "seq_len": seq_len}
    return {
        "lmpress": {
            "name": "equal-terms",
            "seed": SEED,
            "calibration": size | {"precision": "float32"},
            "steps": [{"quantize": step}],
        },
        "lmpress gptq-4bit": {
            "name": "as-shipped",
            "seed": SEED,
            "calibration": size | {"weighting": "positions"},
            "steps": [{"quantize": step | {"sweeps": 1}}],
        },
    }


def peer_python(given: Path | None, directory: Path) -> Path:
    """The Python that has llm-compressor: the one that is given, or that of a new environment."""
    python = given or directory / "peer-environment" / "bin" / "python"
    if not python.exists():
        if given:
            sys.exit(f"there is no {given}")
        note("Making an environment for llm-compressor")
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        version = torch.__version__.partition("+")[0]
        packages = ["llmcompressor", f"torch=={version}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """What of note the peer's environment holds."""
    code = (
        "import json; from importlib.metadata import version; print(json.dumps("
        "{n: version(n) for n in ('llmcompressor', 'compressed-tensors', 'torch', 'transformers')}))"
    )
    told: dict[str, str] = json.loads(subprocess.run([python, "-c", code], check=True, stdout=-1).stdout)
    return told


def export(model: str, directory: Path) -> None:
    """The dense model as a plain float32 directory, for both sides."""
    loaded, tokenizer, _ = load_any(model, "float32")
    loaded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def run(command: list[Any], target: Path) -> dict[str, Any]:
    """A process that writes `target`, and its time and memory beside it; what it prints goes to a log."""
    record, draft, log = (target.with_suffix(suffix) for suffix in (".json", ".draft", ".log"))
    if not record.is_file():
        note(f"Running {target.name}")
        shutil.rmtree(target, ignore_errors=True)
        start = time.perf_counter()
        with log.open("w") as file:
            code = subprocess.run([*map(str, command), target, draft], stdout=file, stderr=file).returncode
        if code:
            sys.exit(f"{target.name} ended with code {code}; {log} says why")
        process = time.perf_counter() - start
        record.write_text(json.dumps(json.loads(draft.read_text()) | {"process": process}))
    told: dict[str, Any] = json.loads(record.read_text())
    return told


def print_table(results: dict[str, Evaluation], runs: dict[str, Any], title: str) -> None:
    """A column a model: bits, quality on each text, times and memory."""
    table = Table("", title=title)
    for name in results:
        table.add_column(name, justify="right")
    bits = [runs.get(name, {}).get("bits", e.bpw) for name, e in results.items()]
    table.add_row("bits a weight (linears)", *(f"{b:.3f}" for b in bits))
    for i, text in enumerate(results["dense"].texts):
        scores = [e.texts[i].score for e in results.values()]
        told = text.protocol.corpus.removeprefix("file:")
        table.add_row(f"perplexity, {told}", *(f"{s.perplexity:.3f}" for s in scores))
        table.add_row(f"KL to dense, {told}", *(f"{s.kl:.4f}" for s in scores))
        table.add_row(f"same top token, {told}", *(f"{s.top1_agreement:.1%}" for s in scores))
    for key, label, scale in (
        ("seconds", "seconds", 1),
        ("process", "process, s", 1),
        ("peak", "peak, GB", 1e9),
    ):
        cells = (f"{runs[name][key] / scale:.2f}" if name in runs else "" for name in results)
        table.add_row(label, *cells)
    console.print(table)


def main() -> None:
    """Run both, one after the other, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True, help="one text file")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--observers", nargs="+", default=["memoryless_minmax", "memoryless_mse"])
    parser.add_argument("--peer-python", type=Path, help="a Python that has llm-compressor")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    python = peer_python(args.peer_python, output)
    dense = output / "dense"
    if not (dense / "tokenizer_config.json").is_file():
        export(args.model, dense)
    _, tokenizer, _ = load_any(dense)
    windows = calibration_windows(load_corpus(args.calibration), tokenizer, args.samples, args.seq_len, SEED)
    work = output / fingerprint(windows)[:12]
    work.mkdir(exist_ok=True)
    ids, script = work / "ids.npy", work / "peer.py.txt"
    np.save(ids, windows.numpy())
    script.write_text(PEER)
    targets, runs = {}, {}
    for observer in args.observers:
        name = f"llm-compressor {observer.removeprefix('memoryless_')}"
        targets[name] = work / f"peer-{observer}"
        command = [python, script, dense, ids, observer, BITS, GROUP]
        runs[name] = run(command, targets[name]) | {"bits": BITS + 16 / GROUP}  # with scales of 16 bits
    for name, plan in recipes(args.samples, args.seq_len).items():
        own = targets[name] = work / str(plan["name"])
        runs[name] = run([sys.executable, "-c", OWN, dense, json.dumps(plan), args.calibration], own)
        if not torch.equal(load_file(own / "calibration.safetensors")["input_ids"].long(), windows):
            sys.exit("lmpress calibrated on other tokens: the comparison is void")
    results = evaluate_many(
        {"dense": dense, **targets},
        text=args.text,
        reference="dense",
        max_tokens=args.max_tokens,
        dtype="float32",
    )
    print_table(results, runs, f"{args.model}: GPTQ, {BITS} bits, symmetric, groups of {GROUP}")
    told = {name: e.to_json() | {"reference": None, "run": runs.get(name)} for name, e in results.items()}
    peer = versions(python)
    print(json.dumps({"models": told, "peer": peer}))
    for text in (text.protocol for text in results["dense"].texts):
        console.print(
            f"evaluation {text.corpus}, sha256 {text.corpus_sha256[:16]}, {text.text_tokens} tokens, windows "
            f"of {text.window} without overlap, BOS {text.bos}, float32"
        )
    console.print(
        f"calibration {args.calibration}, the same {args.samples} x {args.seq_len} token ids for all; "
        + ", ".join(f"{name} {version}" for name, version in peer.items())
    )


if __name__ == "__main__":
    main()
