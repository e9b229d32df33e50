"""Everything that is measured of a model, put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lmpress.checkpoint import MANIFEST, is_compressed, read_manifest
from lmpress.errors import RequestError
from lmpress.evaluation.modules import linear_bits_per_weight, stored_bits_per_weight
from lmpress.evaluation.perplexity import BATCH_TOKENS, TextScore, measure
from lmpress.evaluation.protocol import EvaluationText, TextProtocol
from lmpress.evaluation.retention import sr_from_perplexity
from lmpress.evaluation.size import (
    bytes_16bit,
    dense_skeleton,
    disk_bytes,
    peak_resident_set,
    resident_bytes,
    weight_bytes,
)
from lmpress.evaluation.throughput import Throughput, Timing, throughput_many
from lmpress.families import supported
from lmpress.forms.linear import FormHolder


@dataclass(frozen=True)
class TextResult:
    """How a model does on one text, and what text that is."""

    protocol: TextProtocol
    score: TextScore

    def to_json(self) -> dict[str, Any]:
        """Protocol and score in one flat object; what is not finite is null."""
        return {k: _finite(v) for k, v in (self.score.to_json() | self.protocol.to_json()).items()}


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        name: of the model.
        texts: a result a text; the first is the one that is quoted.
        bytes_on_disk: of all files of the checkpoint; None for a compressed model that is in no file.
        weight_bytes_on_disk: of its weight files.
        disk_measured: False where there are no files, and the two above are computed: a dense model, as
            the 16-bit checkpoint that every ratio is relative to.
        bytes_16bit: of the uncompressed model's parameters at 16 bits.
        bpw: bits a weight of the blocks' linears, everything counted, as stored; None for a family that is
            not supported.
        resident_bytes: memory that the loaded model holds.
        peak_resident_set: of the whole process, all models that it has loaded included.
        throughput: None where it was not measured.
        reference: the dense model, measured in the same run; None where there is none.
    """

    name: str
    texts: tuple[TextResult, ...]
    bytes_on_disk: int | None
    weight_bytes_on_disk: int | None
    disk_measured: bool
    bytes_16bit: int
    bpw: float | None
    resident_bytes: int
    peak_resident_set: int
    throughput: Throughput | None = None
    reference: Evaluation | None = None

    @property
    def ratio(self) -> float | None:
        """bytes_on_disk / bytes_16bit."""
        return None if self.bytes_on_disk is None else self.bytes_on_disk / self.bytes_16bit

    @property
    def sr_perplexity(self) -> float | None:
        """Score retention on the first text: the reference's perplexity over this one."""
        if self.reference is None or not self.texts:
            return None
        own, dense = self.texts[0].score.perplexity, self.reference.texts[0].score.perplexity
        return sr_from_perplexity(own, dense)

    def to_json(self) -> dict[str, Any]:
        """One object: the first text's results flat at the top, all texts under `texts`."""
        texts = [text.to_json() for text in self.texts]
        sizes = {
            "bytes_on_disk": self.bytes_on_disk,
            "weight_bytes_on_disk": self.weight_bytes_on_disk,
            "disk_measured": self.disk_measured,
            "bytes_16bit": self.bytes_16bit,
            "ratio": self.ratio,
            "bpw": self.bpw,
            "resident_bytes": self.resident_bytes,
            "peak_resident_set": self.peak_resident_set,
        }
        return {
            "name": self.name,
            **(texts[0] if texts else {}),
            **sizes,
            "sr_perplexity": _finite(self.sr_perplexity),
            "throughput": self.throughput.to_json() if self.throughput else None,
            "texts": texts,
            "reference": self.reference.to_json() if self.reference else None,
        }


def evaluate_models(
    models: Mapping[str, PreTrainedModel],
    texts: Sequence[EvaluationText],
    paths: Mapping[str, str | Path | None] | None = None,
    reference: str | None = None,
    timing: Timing | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Evaluation]:
    """Measure loaded models together: each text once, all models on the same windows.

    Args:
        models: by name.
        texts: what to measure on; the first is the one that is quoted.
        paths: where a model's files are, by its name: a directory or a GGUF file.
        reference: the name of the dense model, which the others are compared with.
        timing: how to time the models; None for not at all.
        batch_tokens: tokens a batch of windows may have.

    Raises:
        RequestError: if the models do not fit the reference or the texts.
    """
    if not models or not texts:
        raise RequestError("an evaluation needs a model and a text")
    scores = [
        measure(models, text.windows, reference, batch_tokens, description=_describe(text, len(models)))
        for text in texts
    ]
    speeds: Mapping[str, Throughput] = throughput_many(models, reference, timing) if timing else {}
    results: dict[str, Evaluation] = {}
    names = sorted(models, key=lambda name: name != reference)  # the reference first; the rest as they are
    for name in names:
        results[name] = _assemble(
            name,
            models[name],
            tuple(TextResult(text.protocol, score[name]) for text, score in zip(texts, scores, strict=True)),
            (paths or {}).get(name),
            speeds.get(name),
            results.get(reference) if reference is not None else None,
        )
    return {name: results[name] for name in models}


def _assemble(
    name: str,
    model: PreTrainedModel,
    texts: tuple[TextResult, ...],
    path: str | Path | None,
    speed: Throughput | None,
    reference: Evaluation | None,
) -> Evaluation:
    full = _bytes_16bit(model, path) if reference is None else reference.bytes_16bit
    compressed = any(isinstance(module, FormHolder) for module in model.modules())
    on_disk = weights = None if compressed else full
    if path is not None:
        on_disk, weights = disk_bytes(path), weight_bytes(path)
    return Evaluation(
        name=name,
        texts=texts,
        bytes_on_disk=on_disk,
        weight_bytes_on_disk=weights,
        disk_measured=path is not None,
        bytes_16bit=full,
        bpw=_bits_per_weight(model, path, compressed),
        resident_bytes=resident_bytes(model),
        peak_resident_set=peak_resident_set(),
        throughput=speed,
        reference=reference,
    )


def _bytes_16bit(model: PreTrainedModel, path: str | Path | None) -> int:
    """Of the model that was compressed, as its manifest tells (its head may have been tied); else of this."""
    if path is not None and (Path(path) / MANIFEST).is_file() and is_compressed(Path(path)):
        return int(read_manifest(Path(path))["sizes"]["bytes_16bit"])
    return bytes_16bit(model.config)


def _bits_per_weight(model: Any, path: str | Path | None, compressed: bool) -> float | None:
    if model.config.model_type not in supported():
        return None
    if path is None and not compressed:
        return 16.0  # as the 16-bit checkpoint that it stands for
    skeleton = dense_skeleton(model.config)
    stored = None if path is None else stored_bits_per_weight(path, model.config, skeleton)
    return linear_bits_per_weight(model, skeleton) if stored is None else stored


def _describe(text: EvaluationText, models: int) -> str:
    return f"measuring {models} model{'s' if models > 1 else ''} on {text.protocol.corpus}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
