"""The manual names what the code has: links, recipes, options with their defaults, keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lmpress.cli.app import app
from lmpress.families import supported
from lmpress.recipes import STEPS, Calibration, Recipe, load_recipe, shipped_recipes, shipped_text

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def named(word: str, text: str) -> bool:
    """Whether `word` stands in the text as code."""
    return f"`{word}`" in text


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    start = re.search(rf"^(#+) +{re.escape(heading)}$", page, re.MULTILINE)
    assert start is not None, f"there is no section {heading!r}"
    rest = page[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> dict[str, list[str]]:
    """The table rows of a text: the first cell, without its backticks -> the other cells."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first.strip("`"): others for first, *others in cells}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = HEADING.findall(prose)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert {page.resolve() for page in DOCS.rglob("*.md")} - {index.resolve()} <= linked


def test_every_supported_type_is_named() -> None:
    assert all(named(kind, (DOCS / "index.md").read_text()) for kind in supported())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_explained(name: str) -> None:
    shipped = section((DOCS / "recipes.md").read_text(), "Recipes that ship")
    explained = section(shipped, f"`{name}`")
    assert f"```yaml\n{shipped_text(name)}```" in explained
    listed = (DOCS / "commands" / "recipes.md").read_text()
    assert f"│ {name} " in listed
    assert load_recipe(name).description in listed


def options() -> Iterator[tuple[str, type[Any]]]:
    yield "The recipe", Recipe
    yield "`calibration`", Calibration
    for kind, step in STEPS.items():
        yield f"`{kind}`", step


@pytest.mark.parametrize(("heading", "model"), list(options()))
def test_every_option_is_there_with_its_default(heading: str, model: type[Any]) -> None:
    page = (DOCS / "recipes.md").read_text()
    text = section(page, heading)
    table = rows(text.split("\n#")[0])
    assert set(model.model_fields) == set(table) - {"option", "key", "---"}
    for name, field in model.model_fields.items():
        if name in ("calibration", "steps"):
            continue
        shown = table[name][0].strip("`")
        assert _value(shown) == field.default, f"{heading}: the default of {name} is shown as {shown}"


def _value(shown: str) -> Any:
    """YAML, but for numbers such as 5e-05, which YAML 1.1 takes for text."""
    value = yaml.safe_load(shown)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def commands() -> Iterator[tuple[str, set[str]]]:
    root = get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        parts = [command, *getattr(command, "commands", {}).values()]
        opts = {opt for part in parts for parameter in part.params for opt in parameter.opts}
        yield name, {opt for opt in opts if opt.startswith("-")} | {"--help"}


@pytest.mark.parametrize(("name", "opts"), list(commands()))
def test_every_command_has_a_page_with_its_options(name: str, opts: set[str]) -> None:
    page = (DOCS / "commands" / f"{name}.md").read_text()
    shown = {word for cell in rows(page) for word in re.findall(r"(?<!\w)--?[a-z][a-z-]*", cell)}
    assert shown == opts


def test_the_options_of_all_commands_are_on_the_index() -> None:
    page = (DOCS / "index.md").read_text()
    for parameter in get_command(app).params:
        assert any(opt in page for opt in parameter.opts)


def test_every_key_of_the_manifest_is_explained(compressed: Callable[[str], Path]) -> None:
    manifest = json.loads((compressed("llama") / "lmpress.json").read_text())
    text = section((DOCS / "checkpoint.md").read_text(), "`lmpress.json`")
    assert set(manifest) <= set(rows(text))


def test_every_key_of_an_evaluation_is_explained(compressed: Callable[[str], Path], other_text: Path) -> None:
    import lmpress

    told = lmpress.evaluate(compressed("llama"), text=str(other_text), window=64, throughput=True).to_json()
    text = section((DOCS / "evaluation.md").read_text(), "JSON")
    assert all(named(key, text) for key in [*told, *told["throughput"]])
