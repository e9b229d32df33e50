"""Some five hundred damaged inputs: a reader refuses in one line what it cannot use, and does nothing else.

It mirrors no file of src/. `python -m benchmarks.fuzz` tries more of them, and measures time and memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lmpress.forms import EntropyCoded
from tests.fuzz import readers
from tests.fuzz.readers import READERS, Reader, Samples, outcome

INPUTS = 8
"""For a share of one; 61 shares in all."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_input_is_refused_or_used(reader: Reader, samples: Samples) -> None:
    @settings(
        max_examples=INPUTS * reader.share,
        derandomize=True,
        database=None,
        deadline=5000,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def tried(seed: int) -> None:
        assert outcome(reader, samples, samples.root / "tried", Random(seed)) in ("refused", "accepted")

    tried()


def test_what_is_healthy_is_accepted(samples: Samples, tmp_path: Path) -> None:
    """Else the refusals would tell nothing."""
    for form in samples.forms:
        readers.read_description(form.describe())
        readers.read_tensors((form, form.tensors()))
        if isinstance(form, EntropyCoded):
            readers.read_stream(form._coded())
    readers.read_safetensors(samples.shards[0])
    readers.read_gguf(samples.gguf)
    readers.read_model(samples.gguf)
    readers.read_model(samples.model)
    readers.read_checkpoint(samples.checkpoint)
    readers.read_inspected(samples.checkpoint)
    readers.read_calibration((samples.checkpoint, samples.other))
    readers.read_carded(shutil.copytree(samples.checkpoint, tmp_path / "carded"))
    readers.read_journal((samples, shutil.copytree(samples.run, tmp_path / "journal")))
    readers.resume((samples, shutil.copytree(samples.run, tmp_path / "resumed")))
    (tmp_path / "recipe.yaml").write_text(readers.RECIPE)
    readers.read_recipe(tmp_path / "recipe.yaml")
