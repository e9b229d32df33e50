"""The README's picture: what `lmpress demo --json` told, drawn as the terminal shows it.

lmpress demo --json > demo.json && python benchmarks/picture.py demo.json docs/images/demo.svg
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmpress.evaluation import human_bytes


def row(models: dict[str, Any], label: str, cell: Any) -> tuple[str, ...]:
    """One line of the table: a label and a cell for every model."""
    return (label, *(cell(told) for told in models.values()))


def speed(told: dict[str, Any], kind: str) -> str:
    """Tokens a second, and how that compares with the dense model."""
    timing = told["throughput"]
    return f"{timing[kind + '_tokens_per_s']:,.0f} ({timing[kind + '_ratio']:.2f}x)"


def perplexity(told: dict[str, Any]) -> str:
    """The perplexity, and by how much it differs from the dense model's, with the error of that."""
    ratio, shown = math.exp(told["excess_loss"]), f"{told['perplexity']:.3f}"
    error = 100 * ratio * (told["errors"]["excess_loss"] or 0.0)
    return f"{shown} ({100 * (ratio - 1):+.1f} ± {error:.1f} %)" if ratio != 1 else shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    demo = json.loads(args.demo.read_text())
    models = demo["models"]
    table = Table(title="SmolLM2-135M, before and after")
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    table.add_row(*row(models, "on disk", lambda t: human_bytes(t["bytes_on_disk"])))
    table.add_row(*row(models, "of 16-bit", lambda t: f"{t['ratio']:.1%}"))
    table.add_row(*row(models, "bits a weight (linears)", lambda t: f"{t['bpw']:.2f}"))
    table.add_row(*row(models, "in memory", lambda t: human_bytes(t["resident_bytes"])))
    table.add_row(*row(models, "perplexity", perplexity))
    table.add_row(*row(models, "KL to dense, nats", lambda t: f"{t['kl']:.4f}"))
    table.add_row(*row(models, "same top token", lambda t: f"{t['top1_agreement']:.1%}"))
    table.add_row(*row(models, "prefill, tokens/s", lambda t: speed(t, "prefill")))
    table.add_row(*row(models, "decode, tokens/s", lambda t: speed(t, "decode")))
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text("$ lmpress demo", style="bold"))
    console.print(table)
    console.print(Text(demo["prompt"], style="bold"))
    for name, text in demo["samples"].items():
        console.print(f"{name:>6}: {' '.join(text.split())}", markup=False, highlight=False)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="lmpress"), flags=re.DOTALL)
    args.picture.write_text(svg.replace("Fira Code", "ui-monospace"))  # no font is fetched from anywhere


if __name__ == "__main__":
    main()
