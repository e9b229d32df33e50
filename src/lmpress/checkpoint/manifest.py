"""lmpress.json: what is read of it, checked once. What else it holds is for people, and stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmpress.checkpoint.files import MANIFEST, read_json
from lmpress.errors import RequestError

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class File(_Part):
    """A file as it was written."""

    bytes: Count
    sha256: str


class Text(_Part):
    """Text that was seen: its name, its tokens, and the hashes of the files that it came from."""

    name: str
    sha256: str
    tokens: Count


class Sizes(_Part):
    """What the checkpoint weighs."""

    weight_bytes: Count
    bytes_16bit: Annotated[int, Field(ge=1)]
    linear_bpw: Annotated[Number, Field(ge=0)]


class Step(_Part):
    """What a step did to a module; `reason` where it left the module alone."""

    step: str
    reason: str | None = None


class Report(_Part):
    """What became of a module."""

    steps: list[Step] = []
    relative_weight_error: Number | None = None
    relative_output_error: Number | None = None


class Named(_Part):
    """The recipe, or the model."""

    name: str


class Manifest(_Part):
    """The whole of it."""

    files: dict[str, File]
    modules: dict[str, Report]
    sizes: Sizes
    recipe: Named
    source: Named
    calibration: list[Text]


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it stands in the file.

    Raises:
        RequestError: it is missing, or a part that lmpress reads is not what lmpress writes.
    """
    path = directory / MANIFEST
    manifest = read_json(path)
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:200]
        fault = f"{place}: {first['msg']}" if place else first["msg"]
        raise RequestError(f"{path} is no manifest that lmpress wrote ({fault})") from None
    return dict(manifest)
