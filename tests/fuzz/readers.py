"""Everything that reads files, beside the way in which its files get damaged.

The promise that each reader is held to: what it cannot use it refuses, with one of the errors that it names
and in one line; it never hangs, takes little more memory than the file is large, and changes no file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import lmpress
from lmpress.api import check_card, evaluate, inspect, write_card
from lmpress.checkpoint import read_gguf_header, read_header, read_manifest, shard_paths
from lmpress.errors import LmpressError
from lmpress.evaluation import module_rows_table
from lmpress.forms import (
    Dense,
    EntropyCoded,
    Form,
    LowRank,
    Pivoted,
    Quantized,
    Sparse,
    Sum,
    ans,
    form_from_description,
)
from lmpress.pipeline import WORK, Run
from lmpress.pipeline.journal import Journal
from lmpress.pipeline.journal_line import SEAL, sealed
from lmpress.recipes import load_recipe
from lmpress.source import open_source
from tests.fuzz import damage
from tests.tiny import save_tiny, tiny_model, tiny_text
from tests.tiny_gguf import write_gguf

EVERY_FORM: dict[str, Any] = {
    "name": "every-form",
    "calibration": {"samples": 4, "seq_len": 16},
    "steps": [
        {"svd": {"targets": "*.q_proj", "ratio": 0.5}},
        {"pivot": {"targets": "*.q_proj"}},
        {"svd": {"targets": "*.k_proj", "ratio": 0.5}},
        {"sparsify": {"targets": "*.up_proj", "pattern": "2:4", "bits": 4}},
        {"sparsify": {"targets": "*.gate_proj", "sparsity": 0.5}},
        {"quantize": {"targets": "*.k_proj", "bits": 3, "symmetric": False}},
        {"entropy_quantize": {"targets": "*.down_proj", "bits": 3}},
        {"correct": {"targets": "*.up_proj", "rank": 4, "bits": 8}},
        {"quantize": {"targets": "embeddings", "bits": 8}},
    ],
}

RECIPE = """\
name: all
description: every kind of value
calibration: {samples: 64, seq_len: 512, weighting: positions}
dtype: float16
steps:
  - svd: {targets: attention, keep_variance: 0.96, whiten: true}
  - prune_neurons: {targets: mlp, max_ratio: 0.05, multiple_of: 32}
  - sparsify: {targets: "*.o_proj", pattern: "2:4"}
  - quantize: {targets: linears, bits: 8, granularity: "group:32", symmetric: true}
  - quantize
"""

YAML = (
    "&a [*a]",
    "{a: &a [x, x, x, x, x, x, x, x, x], b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]}",
    "!!timestamp x",
    "!!int x",
    "!!float x",
    "!!binary x",
    "!!python/object/apply:os.system [ls]",
    "2024-13-45",
    "{? [a] : b}",
    "<<: 3",
    ".nan",
    "1e999",
    "0x" + "f" * 5000,
    "9" * 5000,
    "190:20:30",
)
"""What YAML makes of a scalar, and more."""


class Samples:
    """One healthy file of every kind, made once, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_tiny("llama", root / "model")
        self.gguf = root / "gguf" / "model.gguf"
        self.gguf.parent.mkdir()
        write_gguf(tiny_model("llama"), "llama", self.gguf)
        self.numbers = damage.gguf_numbers(self.gguf)
        self.text = root / "text.txt"
        self.text.write_text(tiny_text(6000, seed=1))
        self.other = root / "other.txt"
        self.other.write_text(" ".join(reversed(tiny_text(600, seed=2).split())))
        self.checkpoint = root / "checkpoint"
        lmpress.compress(self.model, EVERY_FORM, self.checkpoint, calibration=str(self.text))
        self.shards = shard_paths(self.checkpoint)
        self.run = self._broken_off()
        self.forms = every_form()

    def _broken_off(self) -> Path:
        """An output directory whose run stopped before it published."""
        output = self.root / "run"
        whole = Run.execute

        def stop(run: Run) -> dict[str, Any]:
            whole(run)
            raise KeyboardInterrupt

        Run.execute = stop  # type: ignore[method-assign]
        try:
            lmpress.compress(self.model, EVERY_FORM, output, calibration=str(self.text))
        except KeyboardInterrupt:
            return output
        finally:
            Run.execute = whole  # type: ignore[method-assign]
        raise AssertionError("the run went through")


def every_form() -> list[Form]:
    """A small form of every kind."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    def quantized(rows: int, columns: int, bits: int, groups: int, symmetric: bool) -> Quantized:
        low = -(1 << bits - 1) if symmetric else 0
        codes = torch.randint(low, low + (1 << bits), (rows, columns), generator=generator)
        zero = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=generator)
        return Quantized.from_codes(codes, torch.rand(rows, groups), zero, bits)

    mask = torch.rand(6, 16, generator=generator) < 0.5
    pair = torch.tensor([True, False, True, False]).repeat(6, 4)
    coded = EntropyCoded.from_codes((normal(6, 16) * 9).round(), torch.rand(6, 1), torch.rand(1, 16), 40)
    wide = EntropyCoded.from_codes((normal(6, 16) * 9000).round(), torch.rand(1, 1), torch.rand(1, 1), 16)
    pivots = torch.tensor([True, False, True, False, False, True])
    bitmap = Sparse.from_dense(normal(6, 16), mask)
    return [
        Dense(normal(6, 16).half()),
        quantized(6, 16, 8, 1, True),
        quantized(6, 16, 3, 4, False),
        LowRank(quantized(6, 3, 5, 1, True), Dense(normal(3, 16))),
        Sum((bitmap, LowRank(Dense(normal(6, 2)), Dense(normal(2, 16))))),
        Sparse.from_dense(normal(6, 16), pair, (2, 4)),
        Sparse(bitmap.pattern, bitmap.values, torch.rand(6, 2, generator=generator)),
        Pivoted.from_parts(Dense(normal(3, 16)), Dense(normal(3, 3)), pivots),
        coded,
        wide,
        coded.resident(),
        Sparse(
            bitmap.pattern,
            EntropyCoded.from_codes(torch.ones(1, int(mask.sum())), torch.rand(1, 1), torch.rand(1, 1)),
        ),
    ]


@dataclass(frozen=True)
class Reader:
    """One thing that reads.

    Attributes:
        name: of it.
        make: (samples, an empty folder, randomness) -> what it shall read, damaged.
        read: reads it, and uses what it got as its callers do.
        refusals: the errors by which it may refuse.
        share: how many of the inputs it gets, relative to the others.
        writes: whether it may change its folder.
    """

    name: str
    make: Callable[[Samples, Path, Random], Any]
    read: Callable[[Any], None]
    refusals: tuple[type[Exception], ...] = field(default=(LmpressError,))
    share: int = 1
    writes: bool = False


def outcome(reader: Reader, samples: Samples, folder: Path, rng: Random) -> str:
    """`refused` or `accepted`; whatever else the reader raises or does is a fault, and raised."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = reader.make(samples, folder, rng)
    before = digest(folder)
    try:
        reader.read(made)
        told, words = "accepted", "accepted"
    except reader.refusals as refusal:
        told, words = "refused", str(refusal)
    assert words.strip(), "a refusal that says nothing"
    assert "\n" not in words, f"more than one line: {words}"
    assert len(words) < 2000, f"a refusal of {len(words)} characters"
    assert reader.writes or digest(folder) == before, f"{reader.name} changed its files"
    return told


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _used(form: Form) -> None:
    rebuilt = form_from_description(json.loads(json.dumps(form.describe())))
    assert rebuilt.describe() == form.describe()
    assert all(tensor.is_meta for tensor in form.tensors().values())
    assert form.num_bytes >= 0
    assert form.shape == rebuilt.shape
    assert repr(form)
    assert form.with_tensors(form.tensors()).shape == form.shape


def make_description(samples: Samples, folder: Path, rng: Random) -> Any:
    return damage.damaged_json(rng.choice(samples.forms).describe(), rng)


def read_description(description: Any) -> None:
    _used(form_from_description(description))


def make_tensors(samples: Samples, folder: Path, rng: Random) -> tuple[Form, dict[str, Tensor]]:
    """A form, and tensors for it of which one is not what it was."""
    form = rng.choice(samples.forms)
    tensors = {name: tensor.clone() for name, tensor in form.tensors().items()}
    name = rng.choice(list(tensors))
    old, kind = tensors[name], rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = old.to(rng.choice((torch.float32, torch.int64, torch.uint8, torch.bool)))
    elif kind == 2:
        tensors[name] = old.reshape(-1)[: rng.randrange(old.numel() + 1)]
    elif kind == 3:
        tensors[name] = torch.cat([old, old])
    else:
        flat = old.contiguous().view(-1).view(torch.uint8)
        for _ in range(rng.choice((1, 4, 40)) if flat.numel() else 0):
            flat[rng.randrange(flat.numel())] ^= 1 << rng.randrange(8)
    return form, tensors


def read_tensors(made: tuple[Form, dict[str, Tensor]]) -> None:
    form = made[0].loaded(made[1])
    assert tuple(form.dense().shape) == form.shape
    form.forward(torch.ones(2, form.shape[1]))
    form.resident()
    form.rows(torch.tensor([0, form.shape[0] - 1]))


def make_stream(samples: Samples, folder: Path, rng: Random) -> ans.Coded:
    """A coded matrix with a part damaged, or of a size that its chunks do not have."""
    form = rng.choice([form for form in samples.forms if isinstance(form, EntropyCoded)])
    coded = form._coded()
    parts = {name: getattr(coded, name).copy() for name in ("payload", "chunks", "model")}
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(list(parts))
        flat = parts[name].view("u1").reshape(-1)
        if len(flat):
            flat[rng.randrange(len(flat))] = rng.randrange(256)
        if rng.random() < 0.2:
            parts[name] = parts[name][: rng.randrange(len(parts[name]) + 1)]
    shape, per_chunk, itemsize = coded.shape, coded.rows_per_chunk, coded.itemsize
    if rng.random() < 0.3:
        shape = (rng.choice((0, 1, shape[0], 1 << 20)), rng.choice((0, 1, shape[1], 1 << 20)))
        per_chunk, itemsize = rng.choice((1, per_chunk, 1 << 40)), rng.choice((1, 2, 4))
    return ans.Coded(**parts, shape=shape, rows_per_chunk=per_chunk, itemsize=itemsize)


def read_stream(coded: ans.Coded) -> None:
    assert coded.decode().shape == coded.shape


def make_header(samples: Samples, folder: Path, rng: Random) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(damage.damaged_safetensors(rng.choice(samples.shards).read_bytes(), rng))
    return path


def read_safetensors(path: Path) -> None:
    header = read_header(path)
    tensors = load_file(path)  # nothing that was let through may be refused here
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: entry["shape"] for name, entry in header.items()
    }


def make_model(samples: Samples, folder: Path, rng: Random) -> Path:
    shutil.copytree(samples.model, folder, dirs_exist_ok=True)
    if rng.random() < 0.5:
        keys = json.loads((folder / "config.json").read_text())
        damage.damaged_json_file(folder / "config.json", rng, rng.choice(((), (rng.choice(list(keys)),))))
    else:
        path = folder / "model.safetensors"
        path.write_bytes(damage.damaged_safetensors(path.read_bytes(), rng))
    if rng.random() < 0.2:
        names = {"model.norm.weight": rng.choice((*damage.NAMES, "model.safetensors", 3, None))}
        (folder / "model.safetensors.index.json").write_text(damage.json_text({"weight_map": names}))
    return folder


def read_model(path: Path) -> None:
    source = open_source(path)
    assert all(file.resolve().parent in (path.resolve(), path.parent.resolve()) for file in source.files)
    source.read(source.names)
    assert source.dtype.is_floating_point
    assert source.fingerprint


def make_gguf(samples: Samples, folder: Path, rng: Random) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(damage.damaged_gguf(samples.gguf.read_bytes(), samples.numbers, rng))
    return path


def read_gguf(path: Path) -> None:
    header = read_gguf_header(path)
    assert all(0 < tensor.start <= tensor.stop <= path.stat().st_size for tensor in header.tensors.values())


def make_plan(samples: Samples, folder: Path, rng: Random) -> Path:
    """A checkpoint whose plan, or the rest of what config.json says, is damaged."""
    shutil.copytree(samples.checkpoint, folder, dirs_exist_ok=True)
    keys = [key for key in json.loads((folder / "config.json").read_text()) if key != "quantization_config"]
    plan = ("quantization_config", "plan")
    inside = rng.choice(((), ("quantization_config",), plan, plan, (rng.choice(keys),), (rng.choice(keys),)))
    damage.damaged_json_file(folder / "config.json", rng, inside)
    return folder


def make_weights(samples: Samples, folder: Path, rng: Random) -> Path:
    """A checkpoint with a damaged shard, which its manifest may call healthy."""
    shutil.copytree(samples.checkpoint, folder, dirs_exist_ok=True)
    path = folder / rng.choice(samples.shards).name
    path.write_bytes(damage.damaged_safetensors(path.read_bytes(), rng))
    _forge(path, rng)
    return folder


def _forge(path: Path, rng: Random) -> None:
    """Let the manifest call a file healthy, or not."""
    if rng.random() < 0.5:
        return
    manifest = json.loads((path.parent / "lmpress.json").read_text())
    told = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest["files"][path.name] = told
    (path.parent / "lmpress.json").write_text(json.dumps(manifest))


def make_manifest(samples: Samples, folder: Path, rng: Random) -> Path:
    shutil.copytree(samples.checkpoint, folder, dirs_exist_ok=True)
    if rng.random() < 0.2:
        damage.damaged_json_file(folder / "model.safetensors.index.json", rng)
    else:
        damage.damaged_json_file(folder / "lmpress.json", rng)
    return folder


def read_checkpoint(path: Path) -> None:
    model = lmpress.load(path)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


def read_inspected(path: Path) -> None:
    told, rows = inspect(path)
    assert json.dumps(told)
    assert module_rows_table(rows).row_count == len(rows)
    assert f"{told['sizes']['weight_bytes'] / told['sizes']['bytes_16bit']:.1%}"
    assert f"{told['sizes']['linear_bpw']:.2f}"


def read_carded(path: Path) -> None:
    read_manifest(path)
    check_card(path)
    told = {"corpus": "a", "split": "b", "corpus_sha256": "c", "tokens": 1, "window": 1, "dtype": "d"}
    write_card(path, told)


def make_calibration(samples: Samples, folder: Path, rng: Random) -> tuple[Path, Path]:
    target = folder / "checkpoint"
    shutil.copytree(samples.checkpoint, target)
    path = target / "calibration.safetensors"
    path.write_bytes(damage.damaged_safetensors(path.read_bytes(), rng))
    _forge(path, rng)
    return target, samples.other


def read_calibration(made: tuple[Path, Path]) -> None:
    evaluate(made[0], text=str(made[1]), window=32, max_tokens=32)


def make_run(samples: Samples, folder: Path, rng: Random) -> tuple[Samples, Path]:
    """A run that was broken off, its journal damaged in bytes or in what its lines say."""
    return make_journal(samples, folder, rng, forged=False)


def make_journal(samples: Samples, folder: Path, rng: Random, forged: bool = True) -> tuple[Samples, Path]:
    """The same; with `forged`, now and then under checksums that are right."""
    shutil.copytree(samples.run, folder, dirs_exist_ok=True)
    path = folder / WORK / "journal.jsonl"
    if rng.random() < 0.4:
        path.write_bytes(damage.damaged_bytes(path.read_bytes(), rng))
        return samples, folder
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if rng.random() < 0.3:
        lines.append({"publishing": rng.choice(damage.NAMES), "stale": [rng.choice(damage.NAMES)]})
    number = rng.randrange(len(lines))
    lines[number] = damage.damaged_json(lines[number], rng)
    texts = [damage.json_text(line) + "\n" for line in lines]
    if forged and rng.random() < 0.5:
        texts, seal = [], 0
        for line in lines:
            entry = {k: v for k, v in line.items() if k != SEAL} if isinstance(line, dict) else {}
            text, seal = sealed(entry, seal)
            texts.append(text)
    path.write_text("".join(texts), encoding="utf-8")
    return samples, folder


def read_journal(made: tuple[Samples, Path]) -> None:
    journal = Journal(made[1] / WORK)
    if journal.open() is None:
        return
    for entry in journal.entries:
        for key in ("file", "publishing"):
            assert (journal.staging / entry.get(key, "x")).resolve().parent == journal.staging.resolve()
    if journal.find("publishing") is None:
        assert all((journal.staging / entry["file"]).is_file() for entry in journal.blocks())


def resume(made: tuple[Samples, Path]) -> None:
    samples, output = made
    lmpress.compress(samples.model, EVERY_FORM, output, calibration=str(samples.text), resume=True)
    assert digest(output)["model.safetensors.index.json"]


def make_recipe(samples: Samples, folder: Path, rng: Random) -> Path:
    path, kind = folder / "recipe.yaml", rng.randrange(3)
    if kind == 0:
        path.write_bytes(damage.damaged_text(RECIPE, rng))
    elif kind == 1:
        lines = RECIPE.splitlines()
        at = rng.randrange(len(lines))
        key, colon, value = lines[at].partition(": ")
        odd = rng.choice(YAML)
        lines[at] = rng.choice(
            (f"{key}: {odd}", f"{odd}{colon}{value}", lines[at] + odd, f"{lines[at]}\n{lines[at]}")
        )
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        plain = damage.damaged_json(yaml.safe_load(RECIPE), rng)
        path.write_text(damage.json_text(plain), encoding="utf-8")
    return path


def read_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(recipe.resolved()) == recipe
    assert recipe.to_yaml()


READERS = (
    Reader("descriptions of forms", make_description, read_description, (ValueError,), share=8),
    Reader("tensors of forms", make_tensors, read_tensors, (ValueError,), share=6),
    Reader("entropy streams", make_stream, read_stream, (ValueError,), share=6),
    Reader("safetensors headers", make_header, read_safetensors, share=6),
    Reader("safetensors models", make_model, read_model, share=3),
    Reader("GGUF headers", make_gguf, read_gguf, share=6),
    Reader("GGUF models", make_gguf, read_model, share=2),
    Reader("plans", make_plan, read_checkpoint, share=4),
    Reader("plans, inspected", make_plan, read_inspected, share=2),
    Reader("weights of checkpoints", make_weights, read_checkpoint, share=3),
    Reader("manifests", make_manifest, read_inspected, share=3),
    Reader("manifests for a card", make_manifest, read_carded, share=1, writes=True),
    Reader("calibration texts", make_calibration, read_calibration, share=1),
    Reader("journals", make_journal, read_journal, share=4, writes=True),
    Reader("resumed runs", make_run, resume, share=1, writes=True),
    Reader("recipes", make_recipe, read_recipe, share=6),
)
"""Every reader."""
