"""Recovery: adapters learn, everything else stays; merged costs no byte, kept ones are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.errors import RequestError
from lmpress.forms import Dense, EntropyCoded, Form, LowRank, Quantized, Sum
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.recovery import merged
from lmpress.recovery.merge import as_term


def quantized(weight: torch.Tensor, bits: int = 8) -> Form:
    return round_to_nearest(weight, None, RoundOptions(bits)).form


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def update() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 2, generator=generator), torch.randn(2, 32, generator=generator)


def test_merging_into_dense_is_exact(weight: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor]) -> None:
    form = merged(Dense(weight), *update)
    torch.testing.assert_close(form.dense(), weight + update[0] @ update[1])


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_into_codes_keeps_the_grid(
    bits: int, weight: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor]
) -> None:
    before = quantized(weight, bits)
    form = merged(before, *update)
    assert isinstance(form, Quantized)
    assert form.describe() == before.describe()
    target = before.dense() + update[0] @ update[1]
    step = form.scale.float().abs()
    assert bool(((form.dense() - target).abs() <= 1.001 * step).all())


def test_merging_into_factors_keeps_the_rank(update: tuple[torch.Tensor, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(24, 6, generator=generator), torch.randn(6, 32, generator=generator)
    form = merged(LowRank(Dense(left), Dense(right)), *update)
    assert isinstance(form, LowRank)
    assert form.rank == 6
    target = left @ right + update[0] @ update[1]
    best = torch.linalg.svdvals(target.double())[6:].norm()  # Eckart-Young
    assert float((form.dense().double() - target).norm()) == pytest.approx(float(best), rel=1e-4)


def test_a_kept_term_is_exact_and_counted(
    weight: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor]
) -> None:
    before = quantized(weight)
    form = as_term(before, *update, torch.float32)
    assert isinstance(form, Sum)
    torch.testing.assert_close(form.dense(), before.dense() + update[0] @ update[1])
    assert form.num_bytes == before.num_bytes + 4 * 2 * (24 + 32)


def recipe(keep: str, **options: Any) -> dict[str, Any]:
    step = {"steps": 40, "learning_rate": 5e-3, "seq_len": 32, "batch_size": 4, "rank": 4, "keep": keep}
    return {
        "calibration": {"samples": 4, "seq_len": 32},
        "steps": [
            {
                "prune_neurons": {
                    "allocation": "uniform",
                    "ratio": 0.25,
                    "multiple_of": 8,
                    "compensate": False,
                }
            },
            {"quantize": {"bits": 8}},
            {"recover": step | options},
        ],
    }


@pytest.mark.parametrize("keep", ["merge", "term"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_held_out_loss_falls(
    keep: str, family: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    plain = recipe(keep)
    plain["steps"] = plain["steps"][:-1]
    before = lmpress.compress(tiny(family), plain, tmp_path / "plain", calibration=str(text_file))
    after = lmpress.compress(tiny(family), recipe(keep), tmp_path / "out", calibration=str(text_file))
    report = after.manifest["recovery"]
    assert report["held_out_loss"] < report["held_out_loss_before"] - 0.01
    assert after.manifest["calibration"][1]["name"].endswith("(recovery)")
    sizes = [r.manifest["sizes"]["linear_bpw"] for r in (before, after)]
    if keep == "merge":
        assert sizes[0] == sizes[1]
    else:
        assert sizes[1] > sizes[0]
    # the loss of the checkpoint itself, on the text that was trained on, is lower too
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny(family))(
        text_file.read_text()[:2000], return_tensors="pt"
    ).input_ids
    ids = ids[:, :200]
    with torch.no_grad():
        losses = [float(r.load(dtype=torch.float32)(ids, labels=ids).loss) for r in (before, after)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ("*.1.*.o_proj", ("1.self_attn.o_proj",)),
    ],
)
def test_targets_alone_are_trained(
    targets: str, ends: tuple[str, ...], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    trained = recipe("term", targets=targets, steps=4, learning_rate=1e-2)
    out = lmpress.compress(tiny("llama"), trained, tmp_path / "out", calibration=str(text_file))
    forms = plan_of(out.directory)
    expected = {name for name in forms if name.endswith(ends)}
    assert 0 < len(expected) < len(forms)
    assert {name for name, form in forms.items() if isinstance(form, Sum)} == expected
    assert out.manifest["recovery"]["modules"] == len(expected)


def test_a_step_that_harms_is_not_kept(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    harmful = recipe("merge", learning_rate=0.9, steps=10)
    plain = recipe("merge")
    plain["steps"] = plain["steps"][:-1]
    before = lmpress.compress(tiny("llama"), plain, tmp_path / "plain", calibration=str(text_file))
    after = lmpress.compress(tiny("llama"), harmful, tmp_path / "out", calibration=str(text_file))
    report = after.manifest["recovery"]
    assert report["held_out_loss"] <= report["held_out_loss_before"]
    if report["best_step"] == 0:
        for one, two in zip(before.load().parameters(), after.load().parameters(), strict=True):
            assert torch.equal(one, two)


def test_text_that_recovery_saw_is_refused(
    tiny: Callable[[str], Path], text_file: Path, other_text: Path, tmp_path: Path
) -> None:
    result = lmpress.compress(tiny("llama"), recipe("merge"), tmp_path / "out", calibration=str(text_file))
    changed = tmp_path / "changed.txt"
    changed.write_text("x " + text_file.read_text())
    with pytest.raises(RequestError, match="recovery"):
        lmpress.evaluate(result.directory, text=str(changed), window=64)
    backwards = tmp_path / "backwards.txt"  # bytes are tokens here: 13 letters of English recur
    backwards.write_text(other_text.read_text()[::-1])
    assert lmpress.evaluate(result.directory, text=str(backwards), window=64).texts[0].score.tokens
    (result.directory / "calibration.safetensors").unlink()
    with pytest.raises(RequestError, match=r"calibration\.safetensors is missing"):
        lmpress.evaluate(result.directory, text=str(backwards), window=64)


def test_recovery_stores_in_the_type_that_the_recipe_names(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    wide = recipe("merge") | {"dtype": "float32"}
    wide["steps"][1]["quantize"]["targets"] = "attention"
    result = lmpress.compress(tiny("llama"), wide, tmp_path / "out", calibration=str(text_file))
    state = result.load().state_dict()
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    stored = load_file(result.directory / "model-00002-of-00003.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_recovery_of_windows_that_the_model_wrote(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plain = {
        "calibration": {"samples": 4, "seq_len": 32},
        "steps": [{"quantize": {"bits": 8}}, {"recover": {"steps": 2, "seq_len": 32}}],
    }
    assert lmpress.compress(tiny("llama"), plain, tmp_path / "out").manifest["recovery"]["history"]


def test_recovery_needs_text(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    steps = {"steps": [{"quantize": {"bits": 8}}, {"recover": {"seq_len": 32}}]}
    with pytest.raises(RequestError, match="at least two windows"):
        lmpress.compress(tiny("llama"), steps, tmp_path / "out", calibration=str(short))


def test_an_update_beside_sparse_weights_leaves_their_pattern(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    steps: list[dict[str, Any]] = [{"sparsify": {"pattern": "2:4", "bits": 4}}]
    common = {"calibration": {"samples": 4, "seq_len": 32}}
    train = {"recover": {"steps": 3, "seq_len": 32, "rank": 2, "learning_rate": 1e-2, "keep": "term"}}
    told = {"calibration": str(text_file)}
    plain = lmpress.compress(tiny("llama"), common | {"steps": steps}, tmp_path / "plain", **told)
    trained = lmpress.compress(tiny("llama"), common | {"steps": [*steps, train]}, tmp_path / "out", **told)
    before, after = plan_of(plain.directory), plan_of(trained.directory)
    old = {k: v for p in plain.directory.glob("model-*") for k, v in load_file(p).items()}
    new = {k: v for p in trained.directory.glob("model-*") for k, v in load_file(p).items()}
    for name, form in after.items():
        assert isinstance(form, Sum)
        assert form.terms[0].describe() == before[name].describe()
        assert torch.equal(new[f"{name}.weight"], old[f"{name}.weight"])  # the pattern
        assert torch.equal(new[f"{name}.term0_values_codes"], old[f"{name}.values_codes"])


def test_an_update_beside_entropy_coded_weights_leaves_their_codes(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    steps: list[dict[str, Any]] = [{"entropy_quantize": {"bits": 2.5}}]
    common = {"calibration": {"samples": 4, "seq_len": 32}}
    train = {
        "recover": {
            "steps": 30,
            "seq_len": 32,
            "batch_size": 4,
            "rank": 4,
            "learning_rate": 5e-3,
            "keep": "term",
        }
    }
    told = {"calibration": str(text_file)}
    plain = lmpress.compress(tiny("llama"), common | {"steps": steps}, tmp_path / "plain", **told)
    trained = lmpress.compress(tiny("llama"), common | {"steps": [*steps, train]}, tmp_path / "out", **told)
    report = trained.manifest["recovery"]
    assert report["held_out_loss"] < report["held_out_loss_before"] - 0.01
    before, after = plan_of(plain.directory), plan_of(trained.directory)
    old = {k: v for p in plain.directory.glob("model-*") for k, v in load_file(p).items()}
    new = {k: v for p in trained.directory.glob("model-*") for k, v in load_file(p).items()}
    for name, form in after.items():
        assert isinstance(form, Sum)
        assert isinstance(form.terms[0], EntropyCoded)
        assert isinstance(form.terms[1], LowRank)
        assert form.terms[0].describe() == before[name].describe()
        kept = {key.removeprefix(f"{name}.") for key in old if key.startswith(f"{name}.")} - {"weight"}
        assert kept
        assert torch.equal(new[f"{name}.weight"], old[f"{name}.weight"])
        assert all(torch.equal(new[f"{name}.term0_{key}"], old[f"{name}.{key}"]) for key in kept)
    ids = torch.randint(0, 250, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = trained.load(dtype=torch.float32)(ids).logits
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, plain.load(dtype=torch.float32)(ids).logits)
