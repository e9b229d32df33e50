"""`lmpress inspect`: what each module became, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmpress import api
from lmpress.cli.output import print_json, print_table, say
from lmpress.evaluation import human_bytes, module_rows_table


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that lmpress wrote.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what each module of CHECKPOINT became, its bytes and its error."""
    told, rows = api.inspect(checkpoint)
    if json:
        print_json(told)
        return
    print_table(module_rows_table(rows, title=str(checkpoint)))
    sizes = told["sizes"]
    say(
        f"weights {human_bytes(sizes['weight_bytes'])}, "
        f"{sizes['weight_bytes'] / sizes['bytes_16bit']:.1%} of 16 bits; "
        f"linears {sizes['linear_bpw']:.2f} bits a weight"
    )
    for reason, count in told["unchanged"].items():
        say(f"{count} modules stayed as they were: {reason}")
