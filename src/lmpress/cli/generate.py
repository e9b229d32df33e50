"""`lmpress generate`: the model goes on from a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import print_json, print_text


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint, or any model that compress takes.")],
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How far.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue PROMPT with MODEL, with the likeliest token each time."""
    text = api.generate(model, prompt, max_new_tokens=max_new_tokens, dtype=dtype, device=device)
    if json:
        print_json({"model": model, "prompt": prompt, "continuation": text})
        return
    print_text(f"{prompt}{text}\n")
