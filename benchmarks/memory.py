"""Does the memory of `compress` grow with the number of blocks? Random models of 8 and 32 equal blocks.

    python benchmarks/memory.py [--recipe RECIPE]

Each run is a process of its own; prints its peak resident set, its size and the size of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
CODE = """
import json, sys
import lmpress
from lmpress.evaluation import current_resident_set
before = current_resident_set()
done = lmpress.compress(sys.argv[1], sys.argv[2], sys.argv[3], calibration=sys.argv[4], memory=200_000_000)
print(json.dumps({"before": before, "peak": done.peak_resident_set, "seconds": done.seconds}))
"""


def make(directory: Path, blocks: int) -> int:
    """A random model; its bytes in 16 bits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**CONFIG, num_hidden_layers=blocks), dtype=torch.bfloat16
    )
    model.save_pretrained(directory)
    return sum(p.numel() * 2 for p in model.parameters())


def tokenizer(directory: Path) -> None:
    """A byte tokenizer beside the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="spq")
    parser.add_argument("--blocks", type=int, nargs="*", default=[8, 32])
    args = parser.parse_args()
    print(f"recipe {args.recipe}, 16 x 512 tokens of calibration, hidden states beyond 50 MB on disk")
    print(f"{'blocks':>7} {'model, 16 bit':>14} {'after imports':>14} {'peak':>9} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        from lmpress.recipes import load_recipe

        recipe = load_recipe(args.recipe).resolved()
        recipe["calibration"] = {"samples": 16, "seq_len": 512}
        (root / "recipe.yaml").write_text(json.dumps(recipe))
        (root / "text.txt").write_text(" ".join(str(i * 7919 % 10007) for i in range(20_000)))
        for blocks in args.blocks:
            model = root / f"model-{blocks}"
            size = make(model, blocks)
            tokenizer(model)
            command = [
                sys.executable,
                "-c",
                CODE,
                model,
                root / "recipe.yaml",
                root / f"out-{blocks}",
                root / "text.txt",
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            told = json.loads(done.stdout)
            print(
                f"{blocks:>7} {size / 1e6:>11.0f} MB {told['before'] / 1e6:>11.0f} MB "
                f"{told['peak'] / 1e6:>6.0f} MB {told['seconds']:>8.1f}"
            )


if __name__ == "__main__":
    main()
