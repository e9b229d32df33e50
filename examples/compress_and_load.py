"""A recipe written in Python, from compression to generation.

    python examples/compress_and_load.py                          # the demo model; fetched once, 98 MB
    python examples/compress_and_load.py MODEL OUTPUT --calibration file:notes.txt

MODEL is a directory, a .gguf file, a hub id, or `demo`. OUTPUT has to be empty or not there yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmpress
from lmpress.checkpoint import forms_of

RECIPE = {
    "name": "example",
    "calibration": {"samples": 16, "seq_len": 128},
    "steps": [
        # the smallest rank that keeps the relative output error of a projection at 5 %
        {"svd": {"targets": "attention", "max_error": 0.05}},
        {"quantize": {"targets": "attention", "bits": 8}},
        {"quantize": {"targets": "mlp", "bits": 4, "granularity": "group:32", "clip": True}},
        {"quantize": {"targets": "embeddings", "bits": 8}},
    ],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress, load, generate, and show what the weights have become."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("output", nargs="?", default="compressed")
    parser.add_argument(
        "--calibration", default="self", help="text for the methods; `self`: the model writes it"
    )
    parser.add_argument("--prompt", default="The river")
    options = parser.parse_args(arguments)

    result = lmpress.compress(options.model, RECIPE, options.output, calibration=options.calibration)
    told = result.to_json()
    print(f"{told['bytes_on_disk']} bytes on disk, {told['ratio']:.1%} of the dense model at 16 bits")

    # `import lmpress` has registered the format: transformers loads it like any other checkpoint
    model = AutoModelForCausalLM.from_pretrained(options.output)
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    inputs = tokenizer(options.prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    print(repr(tokenizer.decode(output[0], skip_special_tokens=True)))

    for name, form in forms_of(model).items():
        print(f"{name:40} {form.formula:28} {form.bits_per_weight:5.2f} bits a weight")


if __name__ == "__main__":
    main()
