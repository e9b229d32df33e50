"""Corpora of the Hugging Face hub, read through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lmpress.errors import RequestError

WIKITEXT_SPLITS = ("train", "validation", "test")
C4_SHARDS = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
C4_DOCUMENTS = 4096
"""Documents taken from the beginning of a shard: about two million tokens, seven times 128 x 2048."""

PROBE_SECONDS = 5
"""How long the hub may take to answer before it counts as out of reach."""


def load_wikitext2(split: str) -> tuple[str, ...]:
    """WikiText-2, raw (arXiv 1609.07843), as one document equal to the file `wiki.SPLIT.raw`.

    The hub's copy has one line a row and leaves empty lines blank, which the file writes as " \\n".
    """
    _check_split("wikitext2", split, WIKITEXT_SPLITS)
    with _reading("wikitext2") as datasets:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return ("".join(row or " \n" for row in rows["text"]),)


def load_c4(split: str) -> tuple[str, ...]:
    """The first documents of the first English shard of C4 (arXiv 1910.10683), streamed."""
    _check_split("c4", split, tuple(C4_SHARDS))
    with _reading("c4") as datasets:
        rows = datasets.load_dataset(
            "allenai/c4", data_files={split: C4_SHARDS[split]}, split=split, streaming=True
        )
        return tuple(row["text"] for row in islice(rows, C4_DOCUMENTS))


def _check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise RequestError(f"{name} has no split {split!r}; it has {', '.join(splits)}")


@contextmanager
def _reading(name: str) -> Iterator[Any]:
    """The `datasets` library, made to give up soon; whatever goes wrong is one RequestError.

    Where the hub does not answer, only what an earlier run has stored on this machine is looked at: the
    library's own way is to try again for half a minute and more.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise RequestError(f"the corpus {name} needs the package `datasets`: pip install datasets") from error
    retries = ("STREAMING_OPEN_MAX_RETRIES", "STREAMING_READ_MAX_RETRIES")
    settings: dict[tuple[Any, str], Any] = {(datasets.config, key): 1 for key in retries}
    if not _hub_answers():
        settings[datasets.config, "HF_HUB_OFFLINE"] = True
        settings[huggingface_hub.constants, "HF_HUB_OFFLINE"] = True
    before = {(module, key): getattr(module, key) for module, key in settings if hasattr(module, key)}
    try:
        for module, key in before:
            setattr(module, key, settings[module, key])
        yield datasets
    except Exception as error:  # the library raises some twenty kinds, and more with every version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"the corpus {name} is out of reach ({reason}); without a network, use `self`"
            " (text that the model writes) or file:PATH (text that you have)"
        ) from error
    finally:
        for (module, key), value in before.items():
            setattr(module, key, value)


def _hub_answers() -> bool:
    """Whether the hub answers at all: one request, with the proxies and certificates of the hub's client."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:
        return False
    return True
