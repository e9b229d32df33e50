"""A model by the name that the user gives: a directory, a GGUF file, `demo`, or a hub id."""

from __future__ import annotations

from pathlib import Path

from lmpress.corpora.demo_model import demo_gguf
from lmpress.errors import RequestError
from lmpress.source.companions import TERMS
from lmpress.source.gguf_file import is_gguf
from lmpress.source.gguf_source import GgufSource
from lmpress.source.model import ModelSource
from lmpress.source.safetensors_source import SafetensorsSource

WEIGHTS_AND_WORDS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched from a hub, beside the terms of use."""


def open_source(model: str | Path) -> ModelSource:
    """A model by directory, .gguf file, `demo`, or hub id.

    Raises:
        RequestError: nothing is there, it has no weights, or its family is not supported.
    """
    name = str(model)
    if name == "demo":
        return GgufSource(demo_gguf(), "demo")
    path = Path(model).expanduser()
    if path.is_file():
        if not is_gguf(path):
            raise RequestError(f"{path} is a file, but no .gguf; name a model directory or a .gguf file")
        return GgufSource(path)
    if path.is_dir():
        return SafetensorsSource(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return SafetensorsSource(_from_hub(name), name)
    raise RequestError(f"there is no model at {name}: give a directory, a .gguf file, a hub id, or `demo`")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*WEIGHTS_AND_WORDS, *TERMS]))
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"cannot fetch {name} from the hub, and no such directory exists ({reason}); "
            "give a model directory, a .gguf file, or `demo`"
        ) from None
