"""Equal inputs give equal bytes, today as before: every shipped recipe on small models, by kept hashes."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from tests.pins.make import PINS, found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the hashes were made on x86-64")
@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="the hashes were made by torch 2.13.0")
def test_every_recipe_gives_the_bytes_that_it_gave_before() -> None:
    kept, now = json.loads(PINS.read_text(encoding="utf-8")), found()
    changed = [
        f"{model}/{recipe}"
        for model, pins in now.items()
        for recipe, pin in pins.items()
        if kept[model].get(recipe) != pin
    ]
    assert not changed, "other bytes than before; if they should be: python -m tests.pins.make --write"
    assert {model: set(pins) for model, pins in kept.items()} == {m: set(p) for m, p in now.items()}
