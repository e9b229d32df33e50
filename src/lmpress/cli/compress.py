"""`lmpress compress`: a model in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import parse_bytes, print_json, say
from lmpress.errors import RequestError
from lmpress.evaluation import human_bytes


def compress(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, a .gguf file, or `demo`.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A shipped recipe's name, or a YAML file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the checkpoint goes.")] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="`self` (the model writes it), a file (text, JSON, CSV), wikitext2, c4; or several, a,b."
        ),
    ] = "self",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Memory to use, such as 6GB; hidden states beyond it go to disk.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (JSON), and do nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compress MODEL with a recipe into a checkpoint that from_pretrained loads."""
    if dry_run:
        print_json(api.plan(model, recipe, calibration=calibration))
        return
    if output is None:
        raise RequestError("say where the checkpoint goes: -o DIRECTORY")
    result = api.compress(
        model,
        recipe,
        output,
        calibration=calibration,
        device=device,
        memory=parse_bytes(memory),
        resume=resume,
        force=force,
    )
    told = result.to_json()
    if json:
        print_json(told)
        return
    say(
        (str(output), "bold"),
        f": {human_bytes(told['bytes_on_disk'])} on disk, "
        f"{told['ratio']:.1%} of 16 bits; {told['linear_bpw']:.2f} bits a weight in the linears; "
        f"{told['seconds']:.0f} s, {human_bytes(told['peak_resident_set'])} at the peak",
    )
    recovery = told["recovery"]
    if recovery:
        say(
            f"recovery: held-out loss {recovery['held_out_loss_before']:.4f} -> "
            f"{recovery['held_out_loss']:.4f} (best at step {recovery['best_step']})"
        )
    say(f"look into it: lmpress inspect {output}")
