"""English prose that every Python installation carries: the chapters of its language reference."""

from __future__ import annotations

import re

from lmpress.errors import RequestError

LONG = 60
"""A paragraph of so many characters that stood before is left out: chapters contain one another."""

UNDERLINE = re.compile(r"\s*([*=\-~^\"])\1{2,}")
EMPHASIS = re.compile(r"(?<![*\w])\*([^\s*]|[^\s*][^*\n]*[^\s*])\*(?![*\w])")


def load_python_docs(split: str = "all") -> tuple[str, ...]:
    """The topics that `help()` knows, in the order of their names, as prose; one document a topic.

    Underlines of headings and grammar rules are left out, the lines of a paragraph are joined, and a
    paragraph that came before does not come again, for repeated text flatters a perplexity. The text
    differs between versions of Python: the hash of the corpus tells them apart.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RequestError(
            "this Python was built without pydoc_data, which python-docs reads; give file:PATH"
        ) from error
    seen: set[str] = set()
    documents = (_prose(topics[name], seen) for name in sorted(topics))
    return tuple(document for document in documents if document)


def _prose(topic: str, seen: set[str]) -> str:
    """The paragraphs of a topic that are not in `seen`, which they are then added to."""
    kept = []
    for block in re.split(r"\n[ \t]*\n", topic.strip("\n")):
        lines = [line for line in block.split("\n") if line and not UNDERLINE.fullmatch(line)]
        if not lines or "::=" in block:
            continue
        indented = any(line.startswith((" ", "\t")) for line in lines)
        paragraph = "\n".join(lines) if indented else " ".join(lines)
        paragraph = EMPHASIS.sub(r"\1", paragraph)
        if len(paragraph) >= LONG:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        kept.append(paragraph)
    return "\n\n".join(kept)
