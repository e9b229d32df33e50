"""`lmpress recipes`: list, show and copy the recipes that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lmpress.checkpoint import write_bytes
from lmpress.cli.output import print_json, print_table, print_text, say
from lmpress.errors import RequestError, writing
from lmpress.recipes import STEPS, load_recipe, shipped_recipes, shipped_text

app = typer.Typer(invoke_without_command=True, help="List, show and copy the recipes that ship.")

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def recipes(context: typer.Context, json: JsonOption = False) -> None:
    """List the recipes that ship."""
    if context.invoked_subcommand is not None:
        return
    loaded = [load_recipe(name) for name in shipped_recipes()]
    if json:
        print_json(
            {
                "recipes": [{"name": r.name, "description": r.description} for r in loaded],
                "steps": list(STEPS),
            }
        )
        return
    table = Table()
    for label in ("recipe", "what it does", "steps"):
        table.add_column(label)
    for recipe in loaded:
        table.add_row(recipe.name, recipe.description, ", ".join(step.kind for step in recipe.steps))
    print_table(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    json: JsonOption = False,
) -> None:
    """Print a recipe: as it is written, or with every default as JSON."""
    recipe = load_recipe(name)
    if json:
        print_json(recipe.resolved())
        return
    text = shipped_text(name) if name in shipped_recipes() else Path(name).read_text(encoding="utf-8")
    print_text(text)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    json: JsonOption = False,
) -> None:
    """Copy a shipped recipe into FILE, to change it."""
    load_recipe(name)
    if name not in shipped_recipes():
        raise RequestError(f"{name} is no shipped recipe; shipped: {', '.join(shipped_recipes())}")
    with writing(file, "run it again"):
        if file.exists():
            raise RequestError(f"{file} exists already: name another file")
        write_bytes(file, shipped_text(name).encode())
    if json:
        print_json({"recipe": name, "file": str(file)})
        return
    say(f"wrote {file}; use it with -r {file}")
