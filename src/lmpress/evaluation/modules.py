"""What each module became, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lmpress.checkpoint import (
    MANIFEST,
    names_in,
    plan_of,
    read_gguf_header,
    read_header,
    read_manifest,
    shard_paths,
)
from lmpress.errors import RequestError
from lmpress.evaluation.size import dense_skeleton
from lmpress.families import layout_of
from lmpress.forms import Dense, Form
from lmpress.forms.linear import FormHolder


@dataclass(frozen=True)
class ModuleRow:
    """One row of the table of modules.

    Attributes:
        name: the module's path.
        formula: what it is now, such as `LowRank(int8, int8)`; the dtype where it is dense.
        original_shape: (out, in) in the uncompressed model; a table of embeddings is (tokens, width).
        shape: (out, in) now; smaller where neurons were removed.
        bytes: what its weight takes; 0 for a head that is tied to the embedding.
        bits_per_weight: 8 * bytes over the weights of `original_shape`.
        in_block: whether it is a linear of a block; bits per weight are quoted for those.
        report: what the checkpoint's manifest says of the module (its error, ranks, ...), if anything.
    """

    name: str
    formula: str
    original_shape: tuple[int, int]
    shape: tuple[int, int]
    bytes: int
    bits_per_weight: float
    in_block: bool
    report: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


def block_linears(config: Any) -> list[str]:
    """The paths of all linears of all blocks. RequestError for a family that is not supported."""
    layout = layout_of(config)
    return list(layout.linears)


def linear_bits_per_weight(model: PreTrainedModel, skeleton: PreTrainedModel | None = None) -> float:
    """Bits a weight of the blocks' linears, as they are in memory; embedding and head are not counted.

    Everything that stands for a weight counts: codes, scales, zeros, masks, indices, factors, adapters, and
    a bias where the original has none. The weights are the original's, also where neurons were removed.

    Args:
        model: a dense or compressed model of a supported family.
        skeleton: `dense_skeleton(model.config)`, where it is at hand.

    Raises:
        RequestError: if the family is not supported.
    """
    model = _inner(model)
    skeleton = dense_skeleton(model.config) if skeleton is None else skeleton
    bits = weights = 0
    for name in block_linears(model.config):
        original = skeleton.get_submodule(name)
        bits += 8 * _module_bytes(model.get_submodule(name), original)
        weights += original.weight.numel()
    return bits / weights


def stored_bits_per_weight(path: str | Path, config: Any, skeleton: Any = None) -> float | None:
    """The same as the files have it: a directory of safetensors, or a GGUF file.

    Returns:
        None where the files do not hold every linear by its name.

    Raises:
        RequestError: if the family is not supported, or a file is missing or damaged.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return _gguf_bits_per_weight(path)
    skeleton = dense_skeleton(config) if skeleton is None else skeleton
    stored = _sizes(stored_tensors(path, skeleton))
    bits = weights = 0
    for name in block_linears(config):
        original = skeleton.get_submodule(name)
        if f"{name}.weight" not in stored:
            return None
        bits += 8 * _stored_bytes(stored, name, original)
        weights += original.weight.numel()
    return bits / weights


def nominal_compression(directory: str | Path) -> tuple[float, float]:
    """What a checkpoint's linears are on paper, for `tcr` and `srcr`: no scale, mask or index is counted.

    Entropy-coded values have no bits on paper: they count with those that they take, all included.

    Returns:
        the sparsity, which is the share of the dense linears' weights that no value is stored for; and the
        mean bits of the values that are stored.
    """
    path = Path(directory)
    config = AutoConfig.from_pretrained(path)
    skeleton = dense_skeleton(config)
    forms = _plan(path, skeleton)
    dense, values, bits = 0, 0, 0.0
    for name in block_linears(config):
        weight = skeleton.get_submodule(name).weight
        dense += weight.numel()
        for count, each in _nominal_leaves(forms[name]) if name in forms else [(weight.numel(), 16.0)]:
            values += count
            bits += count * each
    return max(0.0, 1 - values / max(1, dense)), bits / max(1, values)


def _nominal_leaves(form: Form) -> list[tuple[int, float]]:
    """(values, bits a value) of every leaf of a form."""
    leaves: list[tuple[int, float]] = []

    def visit(leaf: Form) -> Form:
        rows, columns = leaf.shape
        leaves.append((rows * columns, leaf.nominal_bits))
        return leaf

    form.rewrite(visit)
    return leaves


def stored_tensors(directory: str | Path, skeleton: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What the headers of a checkpoint's safetensors files tell of every tensor.

    Args:
        skeleton: the causal language model, by whose names tensors are called: a bare model is saved without
            its prefix.

    Raises:
        RequestError: if there are none, or one is damaged.
    """
    headers = {
        name: entry for file in shard_paths(Path(directory)) for name, entry in read_header(file).items()
    }
    modules = names_in(skeleton, {name.rpartition(".")[0] for name in headers})
    named: dict[str, dict[str, Any]] = {}
    for name, entry in headers.items():
        module, dot, own = name.rpartition(".")
        named[modules.get(module, module) + dot + own] = entry
    return named


def _plan(directory: Path, skeleton: PreTrainedModel) -> dict[str, Form]:
    """The forms of a checkpoint, by the names of the modules in a causal language model."""
    forms = plan_of(directory)
    return {own: forms[name] for name, own in names_in(skeleton, forms).items()}


def _sizes(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes by name."""
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in stored.items()}


def module_table(what: PreTrainedModel | str | Path) -> list[ModuleRow]:
    """A row for the embedding, for every linear of every block, and for the head, in this order.

    Args:
        what: a loaded model, or the directory of a checkpoint, whose weights are then not read. Bytes are
            those in memory or those on disk; dense leaves may differ in dtype between the two.

    Raises:
        RequestError: if the family is not supported, or the checkpoint is damaged.
    """
    return _directory_table(Path(what)) if isinstance(what, str | Path) else _model_table(_inner(what))


def _model_table(model: Any) -> list[ModuleRow]:
    layout, skeleton = layout_of(model.config), dense_skeleton(model.config)
    in_block = block_linears(model.config)
    counted: set[int] = set()
    rows = []
    for name in [layout.embedding, *in_block, layout.head]:
        module, original = model.get_submodule(name), skeleton.get_submodule(name)
        form = module.form if isinstance(module, FormHolder) else Dense(module.weight)
        size = 0 if id(module.weight) in counted else _module_bytes(module, original)
        counted.add(id(module.weight))
        rows.append(_row(name, form.formula, form.shape, original, size, name in in_block, {}))
    return rows


def _directory_table(directory: Path) -> list[ModuleRow]:
    if not (directory / "config.json").is_file():
        raise RequestError(f"{directory} has no config.json: it is no model directory")
    config = AutoConfig.from_pretrained(directory)
    layout, skeleton = layout_of(config), dense_skeleton(config)
    headers = stored_tensors(directory, skeleton)
    stored = _sizes(headers)
    reports = read_manifest(directory)["modules"] if (directory / MANIFEST).is_file() else {}
    forms, in_block = _plan(directory, skeleton), block_linears(config)
    rows: list[ModuleRow] = []
    for name in [layout.embedding, *in_block, layout.head]:
        original = skeleton.get_submodule(name)
        if f"{name}.weight" not in stored:
            if name != layout.head or not layout.tied:
                raise RequestError(f"{directory} lacks the tensor {name}.weight; fetch the checkpoint again")
            rows.append(_row(name, rows[0].formula, rows[0].shape, original, 0, False, {}))
            continue
        if name in forms:
            formula, shape = forms[name].formula, forms[name].shape
        else:
            entry = headers[f"{name}.weight"]
            formula, shape = str(entry["dtype"]).lower(), (entry["shape"][0], entry["shape"][1])
        size = _stored_bytes(stored, name, original)
        rows.append(_row(name, formula, shape, original, size, name in in_block, reports.get(name, {})))
    return rows


def _row(
    name: str,
    formula: str,
    shape: tuple[int, int],
    original: Any,
    size: int,
    in_block: bool,
    report: Mapping[str, Any],
) -> ModuleRow:
    tied = size == 0 and not in_block
    return ModuleRow(
        name=name,
        formula=f"{formula}, tied" if tied and not formula.endswith(", tied") else formula,
        original_shape=(original.weight.shape[0], original.weight.shape[1]),
        shape=shape,
        bytes=size,
        bits_per_weight=8 * size / original.weight.numel(),
        in_block=in_block,
        report=dict(report),
    )


def _stored_bytes(stored: Mapping[str, int], name: str, original: Any) -> int:
    """Bytes of everything stored for a module; of its bias only where the original has none."""
    own = {key: size for key, size in stored.items() if key.startswith(name + ".")}
    if getattr(original, "bias", None) is not None:
        own.pop(f"{name}.bias", None)
    return sum(own.values())


def _gguf_bits_per_weight(file: Path) -> float | None:
    """Of the matrices of the blocks in a GGUF file, which calls them blk.N.*.weight."""
    tensors = read_gguf_header(file).tensors
    linears = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    weights = sum(math.prod(t.shape) for t in linears)
    return 8 * sum(t.stop - t.start for t in linears) / weights if weights else None


def _module_bytes(module: nn.Module, original: Any) -> int:
    """Bytes of everything that stands for the weight; of the bias only where the original has none."""
    held: Mapping[str, Any] = module.state_dict()
    if getattr(original, "bias", None) is not None:
        held = {name: tensor for name, tensor in held.items() if name.rpartition(".")[2] != "bias"}
    beside = module.kept_beside() if isinstance(module, FormHolder) else []
    return sum(tensor.numel() * tensor.element_size() for tensor in [*held.values(), *beside])


def _inner(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
