"""The three hybrids on a layer of a known model."""

from __future__ import annotations

import pytest

from lmpress.methods.granularity import hybrid_granularities

BLOCK = {
    "model.layers.0.self_attn.q_proj": (576, 576),
    "model.layers.0.self_attn.k_proj": (192, 576),
    "model.layers.0.self_attn.v_proj": (192, 576),
    "model.layers.0.self_attn.o_proj": (576, 576),
    "model.layers.0.mlp.gate_proj": (1536, 576),
    "model.layers.0.mlp.up_proj": (1536, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}


def channels(chosen: dict[str, str]) -> set[str]:
    assert set(chosen.values()) <= {"tensor", "channel"}
    return {name.rsplit(".", 1)[1] for name, kind in chosen.items() if kind == "channel"}


def test_percentile() -> None:
    # out-dims 192 192 576 576 576 1536 1536: the median is 576
    assert channels(hybrid_granularities(BLOCK, "percentile")) == {
        "q_proj", "o_proj", "down_proj", "gate_proj", "up_proj"
    }  # fmt: skip
    assert channels(hybrid_granularities(BLOCK, "percentile", percentile=100)) == {"gate_proj", "up_proj"}
    assert len(channels(hybrid_granularities(BLOCK, "percentile", percentile=0))) == 7


def test_percentile_is_interpolated() -> None:
    shapes = {"x.a": (100, 1), "x.b": (200, 1), "x.c": (300, 1), "x.d": (400, 1)}  # the median is 250
    assert channels(hybrid_granularities(shapes, "percentile")) == {"c", "d"}


def test_mean_and_standard_deviation() -> None:
    # mean 740.57, standard deviation 525.98 (population)
    assert channels(hybrid_granularities(BLOCK, "meanstd")) == {"gate_proj", "up_proj"}
    assert channels(hybrid_granularities(BLOCK, "meanstd", k=-0.32)) == {
        "q_proj", "o_proj", "down_proj", "gate_proj", "up_proj"
    }  # fmt: skip
    assert channels(hybrid_granularities(BLOCK, "meanstd", k=1.52)) == set()


def test_name() -> None:
    shapes = BLOCK | {
        "model.embed_tokens": (49152, 576),
        "lm_head": (49152, 576),
        "model.decoder.layers.0.fc1": (3072, 768),
        "model.decoder.layers.0.self_attn.out_proj": (768, 768),
    }
    assert channels(hybrid_granularities(shapes, "name")) == {"gate_proj", "up_proj", "down_proj", "fc1"}
    assert channels(hybrid_granularities(shapes, "name", channel_patterns=["*.q_proj"])) == {"q_proj"}


def test_order_and_emptiness() -> None:
    for rule in ("percentile", "name", "meanstd"):
        assert list(hybrid_granularities(BLOCK, rule)) == list(BLOCK)
        assert hybrid_granularities({}, rule) == {}


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown hybrid 'median'; known: percentile, name, meanstd"):
        hybrid_granularities(BLOCK, "median")
    with pytest.raises(ValueError, match="between 0 and 100"):
        hybrid_granularities(BLOCK, "percentile", percentile=101)


def test_what_holds_where_nothing_is_said() -> None:
    """The median, and half a standard deviation of the population."""
    many = {f"x.{i}": (1000 + i, 1) for i in range(101)}
    chosen = hybrid_granularities(many, "percentile")
    assert [name for name, kind in chosen.items() if kind == "channel"] == [f"x.{i}" for i in range(50, 101)]
    few = {"x.a": (100, 1), "x.b": (100, 1), "x.c": (100, 1), "x.d": (300, 1), "x.e": (400, 1)}
    assert channels(hybrid_granularities(few, "meanstd")) == {"d", "e"}  # mean 200, deviation 126.5
    assert channels(hybrid_granularities(BLOCK, "meanstd", k=1.5)) == {
        "gate_proj",
        "up_proj",
    }  # 568 if sampled


@pytest.mark.parametrize("percentile", [-1, 100.5])
def test_percentiles_out_of_range(percentile: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        hybrid_granularities(BLOCK, "percentile", percentile=percentile)


@pytest.mark.parametrize(
    "name", ["a.mlp.x", "h.gate_proj", "h.up_proj", "h.down_proj.0", "layers.1.fc1", "layers.1.fc2"]
)
def test_every_name_of_an_mlp(name: str) -> None:
    assert hybrid_granularities({name: (1, 1), "h.fc3": (9, 9)}, "name") == {
        name: "channel",
        "h.fc3": "tensor",
    }
