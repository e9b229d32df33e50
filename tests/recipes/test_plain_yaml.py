"""YAML that is plain is read as ever; anything else is refused with its line."""

from __future__ import annotations

import pytest
import yaml

from lmpress.recipes.plain_yaml import plain_yaml
from lmpress.recipes.schema import shipped_recipes, shipped_text


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipes_mean_what_yaml_says(name: str) -> None:
    assert plain_yaml(shipped_text(name)) == yaml.safe_load(shipped_text(name))


def test_every_kind_of_value() -> None:
    text = "a: [1, -0x1f, 2.5, .inf, yes, null, ~, 'x', \"1\", 1e3]\nb: {c: *d}\n"
    text = text.replace("a: [", "a: &d [")
    assert plain_yaml(text) == yaml.safe_load(text)
    assert plain_yaml("") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}", "line 1: the key 'b' stands twice"),
        ("&a [*a]", "too deep"),
        ("a: 2024-01-01", "a value of the kind timestamp"),
        ("a: !!timestamp x", "timestamp"),
        ("a: !!binary aa", "binary"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!float x", "'x' is no float"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: " + "9" * 5000, "is no int"),
        ("!!python/object/apply:os.system [ls]", "kind"),
        ("!!set {a}", "kind"),
        ("{? [a] : b}", "a key that is no word"),
        ("<<: {a: 1}", "kind merge"),
        ("[" * 2000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "too deep"),
        ("a: [", "expected"),
        ("a: \0", "special characters"),
        ("--- 1\n--- 2", "single document"),
    ],
)
def test_what_is_more_than_plain(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as fault:
        plain_yaml(text)
    assert "\n" not in str(fault.value)


def test_references_do_not_multiply() -> None:
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(ValueError, match="too many values"):
        plain_yaml("\n".join(lists))
