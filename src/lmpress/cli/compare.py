"""`lmpress compare`: several recipes, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import parse_bytes, print_json, print_table, say
from lmpress.evaluation import evaluation_table


def compare(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, a .gguf file, or `demo`.")],
    recipe: Annotated[list[str], typer.Option("--recipe", "-r", help="A recipe; to be repeated.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where checkpoints and tables go.")],
    calibration: Annotated[str, typer.Option(help="As for compress; the same for all.")] = "self",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file (text, JSON, CSV), python-docs, wikitext2, c4; may be repeated."),
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window; min(2048, context).")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text; all of them.")] = None,
    throughput: Annotated[bool, typer.Option("--throughput", help="Time prefill and decoding too.")] = False,
    memory: Annotated[str | None, typer.Option(help="Memory for hidden states, such as 6GB.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compress MODEL with several recipes, and measure all of them and the dense model in one run.

    An interrupted comparison goes on where it stopped. The tables are also in OUTPUT, as JSON and CSV, with a
    plot of perplexity against real bytes (SVG and PNG).
    """
    result = api.compare(
        model,
        recipe,
        output,
        calibration=calibration,
        text=text or ["python-docs"],
        window=window,
        max_tokens=max_tokens,
        throughput=throughput,
        memory=parse_bytes(memory),
        dtype=dtype,
        device=device,
    )
    if json:
        print_json(result.to_json())
        return
    print_table(evaluation_table(result.evaluations, title=f"{model}: recipes at real bytes"))
    say(f"also in {output}: comparison.json, .csv, .svg, .png")
