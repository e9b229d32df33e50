"""A model to compress, read tensor by tensor: a safetensors directory, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lmpress.checkpoint import (
    check_bounds,
    copy_file,
    read_gguf_header,
    read_header,
    read_json,
    shard_paths,
    write_bytes,
)
from lmpress.corpora.demo_model import demo_gguf
from lmpress.errors import RequestError
from lmpress.families import Layout, layout_of, skeleton

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What is copied beside the weights: text that a tokenizer or a generation reads, and no code."""


GGUF_NAMES = {"gemma3_text": "gemma3", "mistral": "llama"}
"""What llama.cpp calls an architecture, where transformers calls it otherwise; it decides how tensors are
stored: Gemma's norms with one added, Llama's queries and keys permuted."""


class ModelSource(ABC):
    """A dense model on disk.

    Attributes:
        name: what the user called it.
        config: its transformers config, without a quantization of its own.
        layout: its family's answers.
    """

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.config = config
        self.layout: Layout = layout_of(config)

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device."""
        return skeleton(self.config)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors of the model, by their names in transformers; of tied ones the first."""
        seen: set[int] = set()
        kept = []
        for name, tensor in self.skeleton.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                kept.append(name)
        return tuple(kept)

    def block_names(self, index: int) -> tuple[str, ...]:
        """The tensors of block `index`."""
        start = self.layout.block_name(index) + "."
        return tuple(name for name in self.names if name.startswith(start))

    @cached_property
    def outer_names(self) -> tuple[str, ...]:
        """The tensors outside the blocks: embeddings, last norm, head."""
        return tuple(name for name in self.names if not name.startswith(self.layout.blocks + "."))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as stored, on the CPU, each in memory of its own.

        Raises:
            RequestError: a tensor that is missing, of a wrong shape, or not finite; it is named.
        """
        expected = self.skeleton.state_dict(keep_vars=True)
        tensors = self._read(tuple(names))
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise RequestError(
                    f"{self.name}: {name} has shape {tuple(tensor.shape)}, and the config asks for "
                    f"{tuple(expected[name].shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "an infinity"
                raise RequestError(
                    f"{self.name}: the weight {name} holds {kind}; compress a healthy checkpoint"
                )
        return tensors

    @abstractmethod
    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point type that most of the weights are stored in."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The weight files."""

    @property
    @abstractmethod
    def location(self) -> tuple[Path, str | None]:
        """The directory that transformers loads from, and the GGUF file's name in it where it is one."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer. RequestError where the model has none."""

    @abstractmethod
    def copy_tokenizer(self, directory: Path) -> None:
        """Put the tokenizer's files into `directory`."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config and, of every weight file, its size, its head and its tail.

        The head holds the safetensors header; the whole file is not read, for that would take as long
        as compressing it.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True, default=str).encode())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size};".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 22))
                file.seek(max(0, size - (1 << 22)))
                digest.update(file.read())
        return digest.hexdigest()


class SafetensorsSource(ModelSource):
    """A Hugging Face directory with safetensors weights, in one file or in shards."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        check_bounds(directory)
        super().__init__(name or str(directory), _config(directory, None))
        self._shards = shard_paths(directory)
        self._headers = {path: read_header(path) for path in self._shards}
        self._where = self._locate()

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Where each tensor lies; checkpoints of a base model lack its prefix."""
        stored = {name: path for path, header in self._headers.items() for name in header}
        prefix = self.skeleton.base_model_prefix + "."
        found, missing = {}, []
        for name in self.names:
            aliases = [name, name.removeprefix(prefix), prefix + name]
            aliases += [self.layout.head + ".weight"] if name == f"{self.layout.embedding}.weight" else []
            alias = next((alias for alias in aliases if alias in stored), None)
            if alias is None:
                missing.append(name)
            else:
                found[name] = (stored[alias], alias)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RequestError(f"{self.directory} lacks the weight {missing[0]}{more}")
        return found

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._where[name][0], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:  # closed again, so that its pages are let go
                for name in wanted:
                    tensors[name] = file.get_tensor(self._where[name][1]).clone()
        return tensors

    @cached_property
    def dtype(self) -> torch.dtype:
        bytes_of: dict[str, int] = {}
        for header in self._headers.values():
            for entry in header.values():
                low, high = entry["data_offsets"]
                bytes_of[entry["dtype"]] = bytes_of.get(entry["dtype"], 0) + high - low
        most = max(bytes_of, key=lambda name: bytes_of[name])
        known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
        if most not in known:
            raise RequestError(
                f"{self.directory} holds weights of type {most}; lmpress compresses dense models"
            )
        return known[most]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._shards)

    @property
    def location(self) -> tuple[Path, str | None]:
        return self.directory, None

    def tokenizer(self) -> Any:
        return _tokenizer(self.directory, None, self.name)

    def copy_tokenizer(self, directory: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.directory / name).is_file():
                copy_file(self.directory / name, directory / name)


class GgufSource(ModelSource):
    """A GGUF file; its tensors are dequantized one by one as they are read."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        read_gguf_header(path)  # before anything else reads it, and believes its counts
        super().__init__(name or str(path), _config(path.parent, path.name))
        self._tensors, self._map, self._processor = self._open()

    def _open(self) -> tuple[dict[str, Any], dict[str, str], Any]:
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        try:
            reader = GGUFReader(self.path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise RequestError(f"{self.path} is no GGUF file, or it is truncated: {error}") from None
        architecture = GGUF_NAMES.get(self.config.model_type, self.config.model_type)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self.config.to_dict())
        mapping = get_gguf_hf_weights_map(self.skeleton, processor, model_type=architecture)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        found = {hf: gguf for gguf, hf in mapping.items() if gguf in tensors}
        missing = [name for name in self.names if name not in found]
        if missing:
            raise RequestError(f"{self.path} lacks the weight {missing[0]} ({len(missing)} missing)")
        return tensors, found, processor

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        from gguf import dequantize

        result = {}
        for name in names:
            tensor = self._tensors[self._map[name]]
            weights = dequantize(tensor.data, tensor.tensor_type)
            parsed = self._processor.process(weights=weights, name=tensor.name, parsed_parameters={})
            result[name] = torch.from_numpy(parsed.weights.copy())
        return result

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def location(self) -> tuple[Path, str | None]:
        return self.path.parent, self.path.name

    def tokenizer(self) -> Any:
        return _tokenizer(self.path.parent, self.path.name, self.name)

    def copy_tokenizer(self, directory: Path) -> None:
        self.tokenizer().save_pretrained(directory)
        path = directory / "tokenizer.json"
        if path.is_file():  # the same content without its white space: 3.5 MB become 2
            compact = json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":"))
            write_bytes(path, compact.encode())


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
        if path.suffix != ".gguf":
            raise RequestError(f"{path} is a file, but no .gguf; name a model directory or a .gguf file")
        return GgufSource(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RequestError(f"{path} has no config.json: it is no model directory")
        return SafetensorsSource(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return SafetensorsSource(_from_hub(name), name)
    raise RequestError(f"there is no model at {name}: give a directory, a .gguf file, a hub id, or `demo`")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"cannot fetch {name} from the hub, and no such directory exists ({reason}); "
            "give a model directory, a .gguf file, or `demo`"
        ) from None


def _config(directory: Path, gguf: str | None) -> Any:
    if gguf is None:
        raw = read_json(directory / "config.json")
        method = (raw.get("quantization_config") or {}).get("quant_method") if isinstance(raw, dict) else None
        if method:
            raise RequestError(f"{directory} is already quantized ({method}); compress the dense model")
    try:
        extra = {} if gguf is None else {"gguf_file": gguf}
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **extra)
    except Exception as error:  # transformers raises whatever the file made it raise
        told = (str(error).strip().splitlines() or [repr(error)])[0]
        where = directory / (gguf or "config.json")
        raise RequestError(f"{where} is no config that transformers reads: {told}") from None
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _tokenizer(directory: Path, gguf: str | None, name: str) -> Any:
    extra = {} if gguf is None else {"gguf_file": gguf}
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **extra)
    except Exception as error:
        told = " ".join(str(error).split()) or repr(error)
        raise RequestError(
            f"{name} has no tokenizer that transformers reads: put the tokenizer's files (tokenizer.json and"
            f" tokenizer_config.json) beside its weights ({told[:200]})"
        ) from None
