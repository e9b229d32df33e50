"""Every tensor of a source is used, told of, or refused; nothing stands in for one that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmpress.errors import RequestError
from lmpress.progress import note

SHOWN = 3
"""How many names a message shows before it counts the rest."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file tells of it.

    Attributes:
        name: its name in the file.
        path: the file.
        kind: the type of its values, by the name that the file gives it, such as "BF16" or "Q4_1".
        dense: whether this type is one that weights are read from.
        shape: (out, in) of a matrix.
        start: its first byte in the file.
        length: its bytes.
    """

    name: str
    path: Path
    kind: str
    dense: bool
    shape: tuple[int, ...]
    start: int
    length: int


def some(names: Sequence[str]) -> str:
    """A few names and how many more there are: "a, b, c and 4 more"."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def settle(
    where: object,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    aliases: Callable[[str], Iterable[str]],
) -> dict[str, Stored]:
    """Find each tensor of the model among the stored ones.

    Args:
        where: the model as the user named it, for messages.
        expected: the shapes of the model's tensors, by their names in transformers.
        stored: what the files hold, by the names there.
        aliases: the names that a tensor may have in the files, the likeliest first.

    Raises:
        RequestError: a tensor is missing, holds something else than floating-point weights, or has another
            shape than the config asks for; the first such tensor is named.
    """
    found: dict[str, Stored] = {}
    missing = []
    for name in expected:
        alias = next((alias for alias in aliases(name) if alias in stored), None)
        if alias is None:
            missing.append(name)
        else:
            found[name] = stored[alias]
    for name, tensor in found.items():
        if not tensor.dense:
            raise RequestError(
                f"{where}: {name} is of type {tensor.kind}, not a dense weight that lmpress reads: it is"
                " quantized already; compress the dense model"
            )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RequestError(
            f"{where} lacks the weight {missing[0]}{more}{_instead(missing[0], found, stored)}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise RequestError(
                f"{where}: {name} has shape {tensor.shape}, and the config asks for {expected[name]}"
            )
    return found


def _instead(missing: str, found: Mapping[str, Stored], stored: Mapping[str, Stored]) -> str:
    """What the files hold that nobody asked for, the closest to `missing` first."""
    used = {tensor.name for tensor in found.values()}
    spare = [name for name in stored if name not in used]
    module = missing.rpartition(".")[0].rpartition(".")[2]
    spare.sort(key=lambda name: module not in name.split("."))
    return f"; it holds {some(spare)}" if spare else ""


def account_for_rest(where: object, rest: Sequence[str], belongs: Callable[[str], bool]) -> None:
    """Refuse tensors that no part of the model reads but that belong to one; tell of the others.

    Args:
        where: the model as the user named it, for messages.
        rest: the names of the tensors that are not used.
        belongs: whether the model has the part that a tensor is named after, so that it would compute
            something else without the tensor.

    Raises:
        RequestError: a tensor belongs to a part of the model.
    """
    belonging = [name for name in rest if belongs(name)]
    if belonging:
        raise RequestError(
            f"{where} holds {some(belonging)}, which the model of its config has no place for: without it, it"
            " computes something else; mend the config, merge the adapter, or compress the dense model"
        )
    if rest:
        note(f"{where} holds what the model has no place for, which is not used: {some(rest)}")
