"""Sizes, from real files and real memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from lmpress.errors import LmpressError, RequestError
from lmpress.families import skeleton


def disk_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files below a directory (each once, however many names it has)."""
    return _total(_files(Path(path)))


def weight_bytes(path: str | Path) -> int:
    """Bytes of the safetensors files below a directory (headers included), or of one weight file."""
    path = Path(path)
    return _total([path] if path.is_file() else [f for f in _files(path) if f.suffix == ".safetensors"])


def bytes_16bit(config: Any) -> int:
    """Bytes of the model's parameters at 16 bits each, tied weights once: what every ratio is relative to."""
    return 2 * sum(int(p.numel()) for p in dense_skeleton(config).parameters())


def dense_skeleton(config: Any) -> PreTrainedModel:
    """The uncompressed model of a config on the meta device; the config may be a compressed checkpoint's."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return skeleton(config)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of memory that a model holds: parameters, buffers and what its modules keep beside them.

    A storage counts once and whole, however many tensors view it: tied weights are one. Packed weights that
    a kernel keeps for itself are counted too. Weights on the meta device take nothing.
    """
    storages: dict[tuple[str, int], int] = {}
    for tensor in held_tensors(model):
        if tensor.device.type == "meta":
            continue
        if tensor.layout != torch.strided:  # an opaque tensor, such as oneDNN's, has no storage to ask
            storages["opaque", id(tensor)] = tensor.numel() * tensor.element_size()
            continue
        storage = tensor.untyped_storage()
        storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


_REGISTERED = frozenset(("_parameters", "_buffers", "_modules"))


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model keeps alive, registered or not; one may come more than once."""
    seen: set[int] = set()
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        for name, value in vars(module).items():
            if name not in _REGISTERED:
                yield from _held(value, seen)


def _held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors inside containers, forms, closures and this project's own objects."""
    if is_traceable_wrapper_subclass(value):  # packed for a device: what it wraps is what takes memory
        names, _ = value.__tensor_flatten__()
        yield from (getattr(value, name) for name in names)
        return
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, str | bytes | int | float | type | nn.Module | None) or id(value) in seen:
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    elif type(value).__module__.startswith("lmpress."):
        inside = [getattr(value, name) for name in _attributes(value)]
    elif hasattr(value, "__self__"):  # a bound method
        inside = [value.__self__]
    for part in inside:
        yield from _held(part, seen)


def _attributes(value: Any) -> list[str]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [name for name in [*getattr(value, "__dict__", {}), *slots] if hasattr(value, name)]


def peak_resident_set() -> int:
    """The largest resident set that this process has had, in bytes: all that it ever loaded is in it."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes


def current_resident_set() -> int:
    """The resident set of this process now, in bytes."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    answer = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True)
    if answer.returncode:
        raise LmpressError("the resident set of this process cannot be read: neither /proc nor ps tells it")
    return 1024 * int(answer.stdout)


def _files(path: Path) -> list[Path]:
    """The regular files at or below a path; links to files are followed, links to directories are not."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RequestError(f"{path} is neither a file nor a directory")
    return [
        Path(root) / name
        for root, _, names in os.walk(path)
        for name in names
        if (Path(root) / name).is_file()
    ]


def _total(files: list[Path]) -> int:
    stats = [file.stat() for file in files]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in stats}.values())
