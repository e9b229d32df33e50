"""`EntropyCoded(payload, ...)`: a matrix of whole numbers between two diagonals, stored by an entropy coder.

What is stored is near the entropy of the codes, whatever their range; what runs is `resident()`, the codes in
whole bytes. `lmpress.forms.ans` tells of the coding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmpress.forms.base import Form, Run, shape_of, whole
from lmpress.forms.scaled_codes import (
    ScaledCodes,
    check_scales,
    describe_scales,
    empty_scales,
)

if TYPE_CHECKING:
    from lmpress.forms.ans import Coded

CHUNK_SIZE = 1 << 16
"""Codes in a chunk: what a corruption costs, and what a look-up of a row decodes."""

PART = 1 << 22
"""Codes that are checked at a time."""

SHARE = 1 << 23
"""Codes that make it worth starting another process to decode a part of them."""


@dataclass(frozen=True, repr=False)
class EntropyCoded(Form):
    """A matrix `row_scale * codes * column_scale` whose codes are entropy-coded.

    Attributes:
        payload: uint8 (bytes,), the coded chunks.
        chunks: int32 (chunks, 3): words, raw codes and checksum of every chunk.
        model: uint8 (bytes,): contexts and their tables.
        row_scale: floating point, (out, 1) or (1, 1).
        column_scale: floating point, (1, in) or (1, 1).
        size: (out, in).
        rows_per_chunk: rows in every chunk but the last.
        itemsize: bytes of a decoded code, 1, 2 or 4.
    """

    payload: Tensor
    chunks: Tensor
    model: Tensor
    row_scale: Tensor
    column_scale: Tensor
    size: tuple[int, int]
    rows_per_chunk: int
    itemsize: int
    kind = "entropy_coded"

    def __post_init__(self) -> None:
        check_scales(self.size, self.row_scale, self.column_scale)
        if self.rows_per_chunk < 1 or self.itemsize not in (1, 2, 4):
            raise ValueError("an entropy-coded matrix has rows in a chunk, and codes of 1, 2 or 4 bytes")

    @classmethod
    def from_codes(
        cls, codes: Tensor, row_scale: Tensor, column_scale: Tensor, chunk_size: int = CHUNK_SIZE
    ) -> EntropyCoded:
        """Code a matrix.

        Args:
            codes: whole numbers (out, in), of any dtype, within 32 signed bits.
            row_scale: (out, 1) or (1, 1).
            column_scale: (1, in) or (1, 1).
            chunk_size: codes in a chunk, rounded to whole rows.

        Raises:
            ValueError: codes that are no whole numbers of 32 bits, scales that do not fit.
        """
        coded = _ans("ans_encoder").encode(_whole(codes.detach()).numpy(), chunk_size)
        parts = (coded.payload, coded.chunks, coded.model)
        payload, chunks, model = (torch.from_numpy(part.copy()).to(codes.device) for part in parts)
        scales, shape = (row_scale, column_scale), (codes.shape[0], codes.shape[1])
        return cls(payload, chunks, model, *scales, shape, coded.rows_per_chunk, coded.itemsize)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def _coded(self) -> Coded:
        parts = [part.detach().cpu().numpy() for part in (self.payload, self.chunks, self.model)]
        coded: Coded = _ans().Coded(*parts, self.size, self.rows_per_chunk, self.itemsize)
        return coded

    def codes(self) -> Tensor:
        """The decoded codes (out, in), int8, int16 or int32, on the payload's device.

        Raises:
            ValueError: names the chunk that is corrupt; no code of it is ever returned.
        """
        return torch.from_numpy(self._coded().decode()).to(self.payload.device)

    def resident(self) -> ScaledCodes:
        """The form that runs: the same matrix with its codes decoded, a byte each where nearly all fit."""
        return ScaledCodes(self.codes(), self.row_scale, self.column_scale).compact()

    def run_by(self, run: Run, x: Tensor) -> Tensor:
        return run(self.resident(), x)

    def stored(self, resident: Form) -> EntropyCoded:
        """`resident` coded anew. Equal codes give equal bytes, by the same numpy and coder."""
        assert isinstance(resident, ScaledCodes)
        codes = resident.whole_codes(torch.int64)
        chunk_size = self.rows_per_chunk * max(1, self.size[1])
        return EntropyCoded.from_codes(codes, resident.row_scale, resident.column_scale, chunk_size)

    def emptied(self) -> EntropyCoded:
        """Without the streams and what describes them: `stored` makes them anew."""
        coded = ("payload", "chunks", "model")
        named = self.tensors()
        return self.with_tensors(named | {n: torch.empty_like(named[n], device="meta") for n in coded})

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.resident().dense(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.resident().forward(x)

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index` of the matrix; only the chunks that hold them are decoded."""
        flat = index.reshape(-1)
        wanted, place = np.unique(flat.cpu().numpy(), return_inverse=True)
        codes = torch.from_numpy(self._coded().decode_rows(wanted)[place])
        scale = self.row_scale if self.row_scale.shape[0] == 1 else self.row_scale[flat]
        picked = ScaledCodes(codes.to(self.payload.device), scale, self.column_scale)
        return picked.dense().view(*index.shape, self.size[1])

    def tensors(self) -> dict[str, Tensor]:
        return {
            "payload": self.payload,
            "chunks": self.chunks,
            "model": self.model,
            "row_scale": self.row_scale,
            "column_scale": self.column_scale,
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> EntropyCoded:
        payload, chunks, model = tensors["payload"], tensors["chunks"], tensors["model"]
        scales = tensors["row_scale"], tensors["column_scale"]
        return EntropyCoded(payload, chunks, model, *scales, self.size, self.rows_per_chunk, self.itemsize)

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.kind,
            "shape": list(self.size),
            "payload_bytes": self.payload.numel(),
            "model_bytes": self.model.numel(),
            "rows_per_chunk": self.rows_per_chunk,
            "code_bytes": self.itemsize,
            **describe_scales(self.row_scale, self.column_scale),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> EntropyCoded:
        rows, columns = shape = shape_of(description)
        per_chunk, itemsize = whole(description, "rows_per_chunk"), whole(description, "code_bytes")
        count = -(-rows // max(1, per_chunk)) if columns else 0
        payload = torch.empty(whole(description, "payload_bytes"), dtype=torch.uint8, device="meta")
        chunks = torch.empty(count, 3, dtype=torch.int32, device="meta")
        model = torch.empty(whole(description, "model_bytes"), dtype=torch.uint8, device="meta")
        return cls(payload, chunks, model, *empty_scales(shape, description), shape, per_chunk, itemsize)

    @property
    def nominal_bits(self) -> float:
        return self.bits_per_weight

    @property
    def formula(self) -> str:
        return f"ec{self.bits_per_weight:.2f}" if self.payload.numel() else "ec"


def _whole(codes: Tensor) -> Tensor:
    """Codes (out, in) of any dtype as int32 on the CPU, checked a part at a time: tables take gigabytes."""
    whole = torch.empty(codes.shape, dtype=torch.int32)
    part = max(1, PART // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], part):
        wide = codes[start : start + part].to(
            "cpu", torch.float64 if codes.is_floating_point() else torch.int64
        )
        if codes.is_floating_point() and not bool((wide == wide.round()).all()):
            raise ValueError("codes are whole numbers")
        if wide.numel() and float(wide.abs().max()) >= 2**31:
            raise ValueError("codes do not fit into 32 bits")
        whole[start : start + part] = wide
    return whole


def coded_bits(codes: Tensor) -> float:
    """The bits that the payload and the model of `codes` (out, in) will take, within a per mille."""
    bits: float = _ans("ans_encoder").choose_model(codes.to("cpu", torch.int64).numpy())[2]
    return bits


def decode_all(
    forms: Sequence[EntropyCoded], names: Sequence[str] | None = None, processes: int | None = None
) -> list[ScaledCodes]:
    """`[form.resident() for form in forms]`, shared among processes where there is much to decode.

    Args:
        forms: any number.
        names: of the forms, for the message of an error.
        processes: at most this many, this one included; None for one a processor.

    Raises:
        ValueError: names the form and its chunk that is corrupt.
    """
    names = names or [f"an entropy-coded matrix of {f.size[0]} x {f.size[1]}" for f in forms]
    jobs = [replace(f._coded(), name=name) for f, name in zip(forms, names, strict=True)]
    total = sum(f.size[0] * f.size[1] for f in forms)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = _shares(jobs, max(1, min(processes or usable, total // SHARE)))
    decoded: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}" for k in range(1, len(shares))]
        workers = [
            _start([jobs[i] for i in share], path) for share, path in zip(shares[1:], paths, strict=True)
        ]
        try:
            decoded |= {i: jobs[i].decode() for i in shares[0]}
            for worker, share, path in zip(workers, shares[1:], paths, strict=True):
                failed = worker.wait() != 0
                decoded |= {i: jobs[i].decode() for i in share} if failed else _read(path, jobs, share)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    return [
        ScaledCodes(torch.from_numpy(decoded[i]).to(f.payload.device), f.row_scale, f.column_scale).compact()
        for i, f in enumerate(forms)
    ]


def _shares(jobs: Sequence[Coded], count: int) -> list[list[int]]:
    """The numbers of the jobs, dealt out so that every share has about as much to decode."""
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for i in sorted(range(len(jobs)), key=lambda i: -jobs[i].shape[0] * jobs[i].shape[1]):
        least = load.index(min(load))
        shares[least].append(i)
        load[least] += jobs[i].shape[0] * jobs[i].shape[1]
    return shares


def _start(jobs: list[Coded], path: Path) -> subprocess.Popen[bytes]:
    """Another process that decodes `jobs` into `path`.codes; it loads nothing but numpy and the coder."""
    with open(path, "wb") as file:
        _ans().write_jobs(file, jobs)
    command = [sys.executable, "-P", str(_ans().__file__), str(path), f"{path}.codes"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _read(path: Path, jobs: Sequence[Coded], share: Sequence[int]) -> dict[int, Any]:
    """What another process decoded, by the number of the job: each matrix in memory of its own."""
    with open(f"{path}.codes", "rb") as file:
        return {
            i: np.fromfile(file, f"i{jobs[i].itemsize}", jobs[i].shape[0] * jobs[i].shape[1]).reshape(
                jobs[i].shape
            )
            for i in share
        }


def _ans(name: str = "ans") -> ModuleType:
    """The coder, or its encoder, imported where it is used."""
    try:
        return import_module(f"lmpress.forms.{name}")
    except ImportError as missing:
        raise ImportError(
            "entropy-coded weights need the constriction library: pip install constriction"
        ) from missing
