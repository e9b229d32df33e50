"""`lmpress demo`: the whole thing on a real small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import print_json, print_table, say
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
    say(
        f"Text: {first.protocol.corpus}, {first.score.tokens} tokens predicted, windows of "
        f"{first.protocol.window}. Calibration text: written by the model itself.\n"
    )
    say((result.prompt, "bold"))
    for name, text in result.samples.items():
        say(f"{name:>6}: {' '.join(text.split())}")
    spq = result.directories["spq"]
    say("\nThe checkpoints are in ", (str(output), "bold"), ". Next:")
    say(f"  lmpress inspect {spq}")
    say(f'  lmpress generate {spq} "The three laws of motion are"')
    say("  lmpress recipes")
