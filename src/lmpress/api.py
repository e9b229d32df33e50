"""The public API: what every command calls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmpress.checkpoint import (
    MANIFEST,
    is_compressed,
    model_card,
    read_json,
    shard_paths,
    verify_checkpoint,
    write_bytes,
)
from lmpress.corpora import Corpus, evaluation_windows, load_corpus
from lmpress.errors import LmpressError, RequestError
from lmpress.evaluation import (
    Evaluation,
    EvaluationText,
    ModuleRow,
    TextProtocol,
    Timing,
    default_window,
    disk_bytes,
    evaluate_models,
    module_table,
    peak_resident_set,
    refuse_seen_text,
    spq_text,
)
from lmpress.pipeline import (
    CALIBRATION,
    Run,
    RunOptions,
    discard,
    load_dense,
    make_plan,
    open_source,
    publish,
    remove_stale,
)
from lmpress.progress import note
from lmpress.recipes import Calibration, Recipe, Recover, load_recipe
from lmpress.recovery import recover_checkpoint

DEMO_SAMPLES = 16
DEMO_TOKENS = 16_384
DEMO_PROMPT = "The water cycle has three main steps. First,"

RECOVERED = "recovered"
"""Below the work directory: the checkpoint after training, until it is published."""


@dataclass(frozen=True)
class Compressed:
    """A finished compression.

    Attributes:
        directory: the checkpoint.
        manifest: what lmpress.json says.
        seconds: wall time of this call; of a resumed run, the last part of it.
        peak_resident_set: of the process, bytes.
    """

    directory: Path
    manifest: Mapping[str, Any]
    seconds: float
    peak_resident_set: int

    def load(self, **options: Any) -> Any:
        """The model, as `lmpress.load` gives it."""
        return load(self.directory, **options)

    def to_json(self) -> dict[str, Any]:
        """Sizes and what it took."""
        total = disk_bytes(self.directory)
        sizes = dict(self.manifest["sizes"])
        return {
            "directory": str(self.directory),
            "recipe": self.manifest["recipe"]["name"],
            "bytes_on_disk": total,
            **sizes,
            "ratio": total / sizes["bytes_16bit"],
            "seconds": round(self.seconds, 3),
            "peak_resident_set": self.peak_resident_set,
            "recovery": self.manifest.get("recovery"),
        }


def compress(
    model: str | Path,
    recipe: str | Path | Recipe | Mapping[str, Any],
    output: str | Path,
    *,
    calibration: str = "self",
    device: str = "auto",
    memory: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> Compressed:
    """Compress a model, and write a checkpoint that `from_pretrained` loads.

    Args:
        model: a directory, a .gguf file, a hub id, or `demo`.
        recipe: a shipped recipe's name, a YAML file, a mapping, or a `Recipe`.
        output: a directory that is empty or does not exist.
        calibration: `self` (the model writes it), a file, `wikitext2`, `c4`, or several joined by commas.
        device: `auto`, `cpu`, `cuda`, ...
        memory: bytes that the run may use for hidden states; larger ones are spooled to disk.
        resume: go on where an interrupted run stopped.
        force: overwrite an earlier checkpoint in `output`.

    Raises:
        RequestError: what was asked for cannot be done; nothing was changed.
        LmpressError: the work failed.
    """
    start = time.perf_counter()
    target = Path(output).expanduser()
    options = RunOptions(calibration, _device(device), memory, resume, force)
    wanted = load_recipe(recipe)  # before the model is looked for: that may take a download
    run = Run(open_source(model), wanted, target, options)
    fresh = not target.exists()
    if run.prepare():  # a refusal leaves what it found as it was
        try:
            _execute(run)
        except LmpressError:
            if not run.journal.blocks():  # nothing that a resumed run could go on from
                run.abandon(fresh)
            raise
    manifest = read_json(target / MANIFEST)
    return Compressed(target, manifest, time.perf_counter() - start, peak_resident_set())


def _execute(run: Run) -> None:
    """Compress, recover, publish; each part is skipped where a resumed run has it behind itself."""
    output, work = run.output, run.work
    marker = run.journal.find("publishing")
    if marker is None:
        manifest = run.execute()
        staged = run.staging
        step = next((s for s in run.recipe.steps if isinstance(s, Recover)), None)
        if step is not None:
            recovered = work / RECOVERED
            discard(recovered)
            manifest = recover_checkpoint(
                run.source,
                staged,
                recovered,
                manifest,
                step,
                run.options.calibration,
                run.recipe.seed,
                run.options.device,
            )
            staged = recovered
        run.journal.append({"publishing": staged.name, "files": sorted(p.name for p in staged.iterdir())})
        marker = run.journal.find("publishing")
    assert marker is not None
    publish(work / str(marker["publishing"]), output)
    remove_stale(output, set(marker["files"]))
    discard(work)


def plan(model: str | Path, recipe: str | Path | Recipe | Mapping[str, Any]) -> dict[str, Any]:
    """What `compress` would do, as JSON, with the bytes to expect; nothing is computed or written."""
    wanted = load_recipe(recipe)
    source = open_source(model)
    resolved = make_plan(wanted, source)
    predicted = resolved.predicted["bytes"]
    full = 2 * sum(source.skeleton.state_dict(keep_vars=True)[name].numel() for name in source.names)
    told = resolved.to_json()
    told["predicted"] = told["predicted"] | {"bytes_16bit": full, "ratio": predicted / full}
    return told


def load(directory: str | Path, *, verify: bool = True, **options: Any) -> Any:
    """Load a checkpoint: `AutoModelForCausalLM.from_pretrained` behind a check of its files.

    Args:
        directory: a checkpoint that lmpress wrote, or any dense model directory.
        verify: compare the files' hashes with the manifest.
        options: passed on (`dtype`, `device_map`, ...).

    Raises:
        RequestError: a missing, truncated or changed file.
    """
    path = Path(directory)
    if not path.is_dir():
        raise RequestError(f"there is no checkpoint at {path}")
    if is_compressed(path):
        verify_checkpoint(path, full=verify)
    else:
        shard_paths(path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LmpressError(f"{path} does not load: {lines[0] if lines else error!r}") from error


def load_any(model: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any, Path | None]:
    """A model of any kind that commands take: (model, tokenizer, the path whose bytes it is measured by)."""
    path = Path(model).expanduser()
    chosen = _device(device)
    if path.is_dir() and is_compressed(path):
        loaded = load(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        return loaded.to(chosen), AutoTokenizer.from_pretrained(path, trust_remote_code=False), path
    source = open_source(model)
    kind = torch.float32 if dtype == "auto" and source.dtype == torch.float64 else None
    wanted = kind or (source.dtype if dtype == "auto" else getattr(torch, dtype))
    directory, gguf = source.location
    return load_dense(source, wanted, chosen), source.tokenizer(), None if gguf else directory


def evaluate(
    model: str | Path,
    *,
    text: str | Sequence[str] = "python-docs",
    reference: str | Path | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    paper_protocol: str | None = None,
    throughput: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Evaluation:
    """Measure a model: perplexity on text that it has not seen, divergence from a reference, size, speed.

    Args:
        model: a checkpoint, or any model that `compress` takes.
        text: one corpus or several: a file, `python-docs`, `wikitext2`, `c4`.
        reference: the dense model, measured in the same run on the same windows.
        window: tokens a window; min(2048, context) by default.
        max_tokens: of each text, None for all.
        paper_protocol: `spq` repeats that paper's one-window measure, under its label.
        throughput: also time prefill and decoding.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16`, ...

    Raises:
        RequestError: text that the checkpoint was made with, among others.
    """
    names: dict[str, str | Path] = {} if reference is None else {"dense": reference}
    own = Path(model).name or str(model)
    own = own if own != "dense" else "compressed"
    results = evaluate_many(
        names | {own: model},
        text=text,
        reference="dense" if reference is not None else None,
        window=window,
        max_tokens=max_tokens,
        paper_protocol=paper_protocol,
        throughput=throughput,
        dtype=dtype,
        device=device,
    )
    return results[own]


def evaluate_many(
    models: Mapping[str, str | Path],
    *,
    text: str | Sequence[str] = "python-docs",
    reference: str | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    paper_protocol: str | None = None,
    throughput: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Evaluation]:
    """Measure several models in one pass over each text; `evaluate` says what the arguments mean."""
    if paper_protocol not in (None, "spq"):
        raise RequestError(f"there is no paper protocol {paper_protocol!r}; there is spq")
    loaded = {name: load_any(model, dtype, device) for name, model in models.items()}
    specs = [text] if isinstance(text, str) else text
    return _evaluate_loaded(
        loaded, models, specs, reference, window, max_tokens, paper_protocol, throughput=throughput
    )


def _evaluate_loaded(
    loaded: Mapping[str, tuple[Any, Any, Path | None]],
    models: Mapping[str, str | Path],
    specs: Sequence[str],
    reference: str | None,
    window: int | None,
    max_tokens: int | None,
    paper_protocol: str | None,
    *,
    throughput: bool,
) -> dict[str, Evaluation]:
    corpora = [load_corpus(spec, split="test") for spec in specs]
    model, tokenizer, _ = next(iter(loaded.values()))
    texts = [
        _evaluation_text(corpus, tokenizer, model.config, window, max_tokens, paper_protocol)
        for corpus in corpora
    ]
    for path in (Path(model) for model in models.values()):
        if path.is_dir() and is_compressed(path):
            _refuse_seen(path, corpora, texts)
    return evaluate_models(
        {name: parts[0] for name, parts in loaded.items()},
        texts,
        {name: parts[2] for name, parts in loaded.items()},
        reference,
        Timing() if throughput else None,
    )


def _evaluation_text(
    corpus: Corpus,
    tokenizer: Any,
    config: Any,
    window: int | None,
    max_tokens: int | None,
    protocol: str | None,
) -> EvaluationText:
    if protocol == "spq":
        return spq_text(corpus, tokenizer, tokenizer.bos_token_id)
    size = window or default_window(config)
    windows = evaluation_windows(corpus, tokenizer, size, max_tokens)
    if not windows:
        raise RequestError(f"{corpus.name} has fewer than two tokens: nothing to evaluate on")
    return EvaluationText(TextProtocol.of(corpus, windows, size, tokenizer.bos_token_id), windows)


def _refuse_seen(checkpoint: Path, corpora: Sequence[Corpus], texts: Sequence[EvaluationText]) -> None:
    manifest = read_json(checkpoint / MANIFEST)
    record = manifest.get("calibration") or []
    seen = {}
    if record and (checkpoint / CALIBRATION).is_file():
        seen[str(record[0]["name"])] = load_file(checkpoint / CALIBRATION)["input_ids"].long()
    spread = [entry | {"sha256": sha} for entry in record for sha in str(entry.get("sha256")).split(", ")]
    for corpus, text in zip(corpora, texts, strict=True):
        shared = refuse_seen_text(spread, corpus, text.windows, seen)
        found = max(shared.values(), default=0)
        if found:
            note(f"{found} 13-grams of {corpus.name} are in the text that {checkpoint} was made with")


def inspect(directory: str | Path) -> tuple[dict[str, Any], list[ModuleRow]]:
    """What each module of a checkpoint became: (everything as JSON, the rows of the table).

    Raises:
        RequestError: no checkpoint that lmpress wrote, or one that is damaged.
    """
    path = Path(directory)
    if not path.is_dir() or not is_compressed(path):
        raise RequestError(f"{path} is no checkpoint that lmpress wrote")
    manifest = verify_checkpoint(path, full=False)
    rows = module_table(path)
    unchanged: dict[str, int] = {}
    for report in manifest["modules"].values():
        for step in report.get("steps", []):
            if step.get("reason"):
                kind = f"{step['step']}: factors would take more than the weight"
                unchanged[kind] = unchanged.get(kind, 0) + 1
    told = {
        key: manifest.get(key) for key in ("source", "recipe", "sizes", "calibration", "survey", "recovery")
    }
    return told | {"unchanged": unchanged, "modules": manifest["modules"]}, rows


def write_card(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Write what was measured into a checkpoint's model card."""
    if not is_compressed(directory):
        raise RequestError(f"{directory} is no checkpoint that lmpress wrote: it has no card to write into")
    card = model_card(read_json(directory / MANIFEST), evaluation)
    write_bytes(directory / "README.md", card.encode())


@dataclass(frozen=True)
class Demo:
    """What `demo` made and measured.

    Attributes:
        evaluations: of `dense`, `int8` and `spq`.
        directories: where the checkpoints are, by recipe.
        prompt: what the samples go on from.
        samples: greedy continuations by model.
    """

    evaluations: Mapping[str, Evaluation]
    directories: Mapping[str, Path]
    prompt: str
    samples: Mapping[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything as one object."""
        return {
            "models": {name: e.to_json() | {"reference": None} for name, e in self.evaluations.items()},
            "directories": {name: str(path) for name, path in self.directories.items()},
            "prompt": self.prompt,
            "samples": dict(self.samples),
            "seconds": round(self.seconds, 1),
        }


def demo(output: str | Path) -> Demo:
    """Compress the demo model with `int8` and `spq`, load both back, and compare them with the dense model.

    The calibration text is written by the model itself; the evaluation text is the language reference
    that comes with Python. An interrupted demo goes on where it stopped.
    """
    start = time.perf_counter()
    target = Path(output).expanduser()
    directories = {}
    for name in ("int8", "spq"):
        recipe = load_recipe(name)
        recipe = recipe.model_copy(update={"calibration": Calibration(samples=DEMO_SAMPLES, seq_len=512)})
        compress("demo", recipe, target / name, calibration="self", resume=True)
        directories[name] = target / name
    models: dict[str, str | Path] = {"dense": "demo", **directories}
    loaded = {name: load_any(model) for name, model in models.items()}
    evaluations = _evaluate_loaded(
        loaded, models, ["python-docs"], "dense", None, DEMO_TOKENS, None, throughput=True
    )
    samples = {
        name: continuation(model, tokenizer, DEMO_PROMPT, 40)
        for name, (model, tokenizer, _) in loaded.items()
    }
    return Demo(evaluations, directories, DEMO_PROMPT, samples, time.perf_counter() - start)


def generate(
    model: str | Path, prompt: str, *, max_new_tokens: int = 64, dtype: str = "auto", device: str = "auto"
) -> str:
    """Continue a prompt, greedily: the new text alone."""
    loaded, tokenizer, _ = load_any(model, dtype, device)
    return continuation(loaded, tokenizer, prompt, max_new_tokens)


def continuation(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of a prompt by a loaded model."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise RequestError("the prompt is empty: give a few words to go on from")
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"device {device!r} is not to be had ({reason}); try --device cpu") from None
    return device
