"""A recipe: a strict YAML file. A wrong key or value is one clear line, with a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from lmpress.errors import RequestError
from lmpress.recipes.plain_yaml import plain_yaml
from lmpress.recipes.steps import GROUPS, STEPS, Recover, SiteStep, Step, Strict, options_of

T = TypeVar("T", bound=Strict)

LARGEST = 1 << 18
"""Bytes of a recipe."""


class Calibration(Strict):
    """How much text the methods look at: `samples` windows of `seq_len` tokens.

    Attributes:
        precision: what the blocks' products are computed in while the text runs through them; hidden states,
            moments and solvers stay in float32. `auto` is bfloat16 where the device is made for it.
        weighting: how much a token counts in the moments that solvers minimize errors by: all alike with
            `none`; with `positions` as much as errors at its position in the window cost the model, by the
            squared gradients of a few windows. The first token of a text, which heads attend to when they
            attend to nothing, may count a hundredfold.
    """

    samples: Annotated[int, Field(ge=1)] = 64
    seq_len: Annotated[int, Field(ge=2)] = 512
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    weighting: Literal["none", "positions"] = "none"


class Recipe(Strict):
    """Steps that are rewritten in this order, block by block.

    Attributes:
        dtype: how floating-point weights are stored: `auto` keeps 16-bit sources as they are and stores
            float32 sources in float16.
        seed: of everything that is drawn.
    """

    name: str = "unnamed"
    description: str = ""
    calibration: Calibration = Calibration()
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    seed: int = 42
    steps: tuple[Step, ...] = ()

    @property
    def recovery(self) -> Recover | None:
        """The step that trains; None where there is none."""
        return next((step for step in self.steps if isinstance(step, Recover)), None)

    @property
    def site_steps(self) -> tuple[tuple[int, SiteStep], ...]:
        """The steps over whole sites, with their places in the recipe."""
        return tuple((i, step) for i, step in enumerate(self.steps) if isinstance(step, SiteStep))

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain JSON with every default written out; `parse_recipe` reads it back."""
        plain = self.model_dump(mode="json", exclude={"steps"})
        return plain | {"steps": [options_of(step) for step in self.steps]}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return str(yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True))


def load_recipe(name_or_path: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
    """A shipped recipe by name, or a YAML file by path.

    Raises:
        RequestError: no such recipe, no YAML, or a wrong key or value.
    """
    if isinstance(name_or_path, Recipe):
        return name_or_path
    if isinstance(name_or_path, Mapping):
        return parse_recipe(name_or_path, "recipe")
    path = Path(name_or_path)
    if path.is_file():
        try:
            if path.stat().st_size > LARGEST:
                raise RequestError(f"{path} is no recipe: it has {path.stat().st_size} bytes")
            return parse_recipe(plain_yaml(path.read_text(encoding="utf-8")), str(path))
        except ValueError as error:
            raise RequestError(f"{path} is no YAML file that a recipe can be: {error}") from None
        except OSError as error:
            raise RequestError(f"cannot read the recipe {path}: {error.strerror}") from None
    name = str(name_or_path)
    if name not in shipped_recipes():
        raise RequestError(
            f"no recipe is called {name!r}, and no such file exists{_suggest(name, shipped_recipes())}; "
            f"shipped: {', '.join(shipped_recipes())}"
        )
    return parse_recipe(plain_yaml(shipped_text(name)), name)


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with lmpress."""
    files = resources.files("lmpress.recipes").joinpath("shipped").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """The YAML text of a shipped recipe, comments included."""
    return resources.files("lmpress.recipes").joinpath("shipped", f"{name}.yaml").read_text(encoding="utf-8")


def parse_recipe(data: Any, where: str) -> Recipe:
    """A recipe from plain data. RequestError names the place, the fault, and the likely meaning."""
    if not isinstance(data, Mapping):
        raise RequestError(f"{where}: a recipe is a mapping with `steps`, not {type(data).__name__}")
    _check_keys(data, Recipe, where)
    calibration = data.get("calibration", {})
    if isinstance(calibration, Mapping):
        _check_keys(calibration, Calibration, f"{where}: calibration")
    steps = data.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RequestError(f"{where}: `steps` is a list with at least one step ({', '.join(STEPS)})")
    parsed = tuple(_parse_step(step, f"{where}: step {i + 1}") for i, step in enumerate(steps))
    rest = {key: value for key, value in data.items() if key != "steps"}
    recipe = _validated(Recipe, rest | {"steps": parsed}, where)
    _check_order(recipe, where)
    return recipe


def _parse_step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RequestError(f"{where}: a step is one key with its options, such as `- quantize: {{bits: 8}}`")
    kind, options = next(iter(entry.items()))
    if kind not in STEPS:
        raise RequestError(
            f"{where}: no step is called {short(kind)}{_suggest(str(kind), STEPS)}; steps: {', '.join(STEPS)}"
        )
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise RequestError(f"{where} ({kind}): options are a mapping, such as {{targets: linears}}")
    where = f"{where} ({kind})"
    _check_keys(options, STEPS[kind], where)
    return _validated(STEPS[kind], options, where)


def _validated(model: type[T], data: Mapping[str, Any], where: str) -> T:
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = "" if not place else f" (given: {short(first['input'])})"
        raise RequestError(f"{where}{': ' + place if place else ''}: {message}{given}") from None


def _check_keys(data: Mapping[str, Any], model: type[Strict], where: str) -> None:
    known = list(model.model_fields)
    for key in data:
        if key not in known:
            raise RequestError(
                f"{where}: unknown key {short(key)}{_suggest(str(key), known)}; known: {', '.join(known)}"
            )


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_order(recipe: Recipe, where: str) -> None:
    """What cannot work whatever the model is refused here; a plan looks at every module again."""
    for i, step in enumerate(recipe.steps):
        place = f"{where}: step {i + 1} ({step.kind})"
        earlier = recipe.steps[:i]
        if any(s.trains for s in earlier):
            raise RequestError(f"{place}: recover comes last, after every step that compresses")
        if step.once and any(s.kind == step.kind for s in earlier):
            raise RequestError(f"{place}: {step.once}")
        if step.targets == "embeddings" and step.blocks_only:
            raise RequestError(f"{place}: {step.kind} works on the linears of the blocks, not on embeddings")
        fault = step.conflict([s for s in earlier if step.overlaps(s)])
        if fault is not None and not (step.needs_another and _by_glob(step, earlier)):
            raise RequestError(f"{place}: {fault}")


def _by_glob(step: Step, earlier: Sequence[Step]) -> bool:
    """Whether names have to be looked at to know which earlier steps touch the modules of `step`."""
    return any(s.targets not in GROUPS for s in (step, *earlier))
