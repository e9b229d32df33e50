"""`lmpress demo`: the whole thing on a real small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import print_json, print_table, stdout
from lmpress.evaluation import evaluation_table


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the checkpoints go.")] = Path(
        "lmpress-demo"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compress SmolLM2-135M with two recipes, load both back, and compare them with the dense model."""
    result = api.demo(output)
    if json:
        print_json(result.to_json())
        return
    print_table(evaluation_table(result.evaluations, title="SmolLM2-135M, before and after"))
    first = next(iter(result.evaluations.values())).texts[0]
    stdout.print(
        f"Text: {first.protocol.corpus}, {first.score.tokens} tokens predicted, windows of "
        f"{first.protocol.window}. Calibration text: written by the model itself.\n",
        highlight=False,
    )
    stdout.print(f"[bold]{result.prompt}[/bold]", highlight=False)
    for name, text in result.samples.items():
        stdout.print(f"{name:>6}: {' '.join(text.split())}", highlight=False, markup=False)
    spq = result.directories["spq"]
    stdout.print(
        f"\nThe checkpoints are in [bold]{output}[/bold]. Next:\n"
        f"  lmpress inspect {spq}\n"
        f'  lmpress generate {spq} "The three laws of motion are"\n'
        f"  lmpress recipes",
        highlight=False,
    )
