"""YAML of plain values: mappings, lists, text, numbers, true and false, null; each key once.

Dates, binary data, merge keys and Python's own tags are no part of it, nor is what refers to itself.
"""

from __future__ import annotations

from typing import Any

import yaml

TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
MOST_VALUES = 10_000
"""Values in a text, counted as often as they are referred to: nine lists of nine references grow to 9^9."""
DEEPEST = 32


def plain_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: no YAML, or YAML that is more than plain; it names the line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Plain().value(node, DEEPEST)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Plain:
    """Nodes into values, counted."""

    def __init__(self) -> None:
        self._scalars = yaml.SafeLoader("")
        self._left = MOST_VALUES

    def value(self, node: yaml.Node, depth: int) -> Any:
        """The value of a node that may be `depth` levels deep."""
        self._left -= 1
        if not depth or self._left < 0:
            raise self._fault(node, "too deep, or too many values")
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.value(part, depth - 1) for part in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._mapping(node, depth - 1)
        if isinstance(node, yaml.ScalarNode) and node.tag in TAGS:
            try:
                return self._scalars.construct_object(node)
            except (ValueError, TypeError, KeyError, yaml.YAMLError):
                raise self._fault(
                    node, f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
                ) from None
        raise self._fault(node, f"a value of the kind {node.tag.rpartition(':')[2]}")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, part in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._fault(key_node, "a key that is no word")
            key = self.value(key_node, 1)
            if key in found:
                raise self._fault(key_node, f"the key {str(key)[:40]!r} stands twice")
            found[key] = self.value(part, depth)
        return found

    def _fault(self, node: yaml.Node, what: str) -> ValueError:
        return ValueError(f"line {node.start_mark.line + 1}: {what}")
