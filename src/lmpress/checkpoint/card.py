"""The model card: what the checkpoint is, what it costs, how to load it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def model_card(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """Markdown for the checkpoint's README.md.

    Args:
        manifest: as in lmpress.json.
        evaluation: what `lmpress evaluate --json` printed, if it was run.
    """
    sizes, source = manifest["sizes"], manifest["source"]["name"]
    recipe = manifest["recipe"]
    share = 100 * sizes["weight_bytes"] / sizes["bytes_16bit"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [lmpress, compressed]",
        "---",
        "",
        f"# {source.rstrip('/').rpartition('/')[2]}, compressed with lmpress ({recipe['name']})",
        "",
        f"Weights: **{_mb(sizes['weight_bytes'])}**, {share:.1f} % of "
        f"the {_mb(sizes['bytes_16bit'])} that the dense model takes in 16 bits. Linears of the blocks: "
        f"**{sizes['linear_bpw']:.2f} bits per weight**, everything stored counted.",
        "",
        "```python",
        "import lmpress  # registers the format",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/DIRECTORY")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/DIRECTORY")',
        "```",
        "",
    ]
    lines += _measured(evaluation) if evaluation else _unmeasured()
    lines += ["## Recipe", "", "```yaml", yaml.safe_dump(dict(recipe), sort_keys=False).rstrip(), "```", ""]
    calibration = manifest.get("calibration") or []
    if calibration:
        lines += [
            "Text that was seen: " + "; ".join(f"{c['name']} ({c['tokens']} tokens)" for c in calibration),
            "",
        ]
    return "\n".join(lines)


def _measured(evaluation: Mapping[str, Any]) -> list[str]:
    reference = evaluation.get("reference") or {}
    lines = ["## Measured", "", "| | dense | this checkpoint |", "|---|---|---|"]
    for label, key, style in (
        ("perplexity", "perplexity", ".3f"),
        ("KL to dense (nats a token)", "kl", ".5f"),
        ("same first choice as dense", "top1_agreement", ".4f"),
    ):
        if key == "perplexity" or reference:
            lines.append(f"| {label} | {_cell(reference, key, style)} | {_cell(evaluation, key, style)} |")
    lines += [
        "",
        f"Text: {evaluation['corpus']} ({evaluation['split']}), sha256 {evaluation['corpus_sha256'][:16]}, "
        f"{evaluation['tokens']} tokens predicted, windows of {evaluation['window']}, {evaluation['dtype']}.",
        "",
    ]
    return lines


def _cell(evaluation: Mapping[str, Any], key: str, style: str) -> str:
    """A number; what was measured and is null is not finite; nothing where nothing was measured."""
    value = evaluation.get(key)
    if value is not None:
        return format(value, style)
    return "not finite" if evaluation else ""


def _unmeasured() -> list[str]:
    return [
        "## Measured",
        "",
        "Nothing yet: `lmpress evaluate DIRECTORY --reference MODEL --card` writes the numbers here.",
        "",
    ]


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
