"""What the tests of budgets share: small recipes, and the leaves of what they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmpress.forms import Form

SMALL = {"samples": 4, "seq_len": 32}


def recipe(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": "budget", "calibration": SMALL, "steps": list(steps)}


def leaves(form: Form) -> Iterator[Form]:
    found: list[Form] = []

    def visit(leaf: Form) -> Form:
        found.append(leaf)
        return leaf

    form.rewrite(visit)
    return iter(found)
