"""`lmpress evaluate`: perplexity, divergence, size and speed, with the protocol named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import print_json, print_table, say
from lmpress.evaluation import evaluation_table


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint, or any model that compress takes.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file (text, JSON, CSV), python-docs, wikitext2, c4; may be repeated."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The dense model, measured in the same run; gives KL and ratios.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window; min(2048, context).")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text; all of them.")] = None,
    paper_protocol: Annotated[
        str | None, typer.Option(help="`spq`: that paper's one-window measure, under its label.")
    ] = None,
    throughput: Annotated[bool, typer.Option("--throughput", help="Time prefill and decoding too.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    card: Annotated[
        bool, typer.Option("--card", help="Write the numbers into the checkpoint's model card.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure MODEL on text that it has not seen."""
    if card:
        api.check_card(Path(model))
    result = api.evaluate(
        model,
        text=text or ["python-docs"],
        reference=reference,
        window=window,
        max_tokens=max_tokens,
        paper_protocol=paper_protocol,
        throughput=throughput,
        dtype=dtype,
        device=device,
    )
    told = result.to_json()
    if card:
        api.write_card(Path(model), told)
    if json:
        print_json(told)
        return
    print_table(evaluation_table({result.name: result}))
    for measured in told["texts"]:
        say(
            f"{measured['corpus']} ({measured['split']}, sha256 {measured['corpus_sha256'][:12]}): "
            f"{measured['tokens']} tokens predicted, windows of {measured['window']} without overlap, "
            f"BOS: {measured['bos']}, {measured['dtype']}"
        )
