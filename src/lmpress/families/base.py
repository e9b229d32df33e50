"""What the pipeline asks about a model family, and the answer for one config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """Linears that share one input; a block computes its sites in the order of `Layout.sites`.

    Attributes:
        name: "qkv", "o", "gate_up" or "down"; "gate_up" of an MLP without a gate is its first linear alone.
        linears: names relative to the block, such as "self_attn.q_proj"; the first of them is called first.
    """

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Neurons:
    """What one neuron of the MLP is: a row (and bias) of each of `inputs`, a column of `output`.

    Attributes:
        inputs: the linears whose rows make a neuron.
        signal: the one of them whose output counts as the neuron's activation (SPQ, arXiv 2602.18420).
        output: the linear whose columns carry the neurons on.
    """

    inputs: tuple[str, ...]
    signal: str
    output: str


@dataclass(frozen=True)
class Layout:
    """The answers of a family for one config. All names of linears are relative to a block.

    Attributes:
        family: the family's name, such as "llama-like".
        blocks: the path of the list of blocks, such as "model.layers".
        num_blocks: how many there are.
        sites: the input sites of a block, in the order of execution.
        neurons: what one neuron of the MLP is.
        attention: the linears of the attention.
        mlp: the linears of the MLP.
        embedding: the path of the token embedding.
        head: the path of the linear that gives the logits.
        tied: whether the head's weight is the embedding's.
    """

    family: str
    blocks: str
    num_blocks: int
    sites: tuple[Site, ...]
    neurons: Neurons
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embedding: str
    head: str
    tied: bool

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block, in the order of the sites."""
        return tuple(linear for site in self.sites for linear in site.linears)

    def block_name(self, index: int) -> str:
        """The path of block `index`: 3 -> "model.layers.3". IndexError where there is no such block."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"no block {index}: there are {self.num_blocks}, counted from 0")
        return f"{self.blocks}.{index}"

    def site_of(self, linear: str) -> Site:
        """The site whose input `linear` reads. KeyError where a block has no such linear."""
        for site in self.sites:
            if linear in site.linears:
                return site
        raise KeyError(f"a block has no linear {linear!r}; it has {', '.join(self.linears)}")


class Family(ABC):
    """Answers for the configs of one family. To add a family: write one, and list it in `registry.py`."""

    name: str
    """What a layout and a message call the family."""

    model_types: tuple[str, ...]
    """The `model_type`s of the configs that it answers for."""

    @abstractmethod
    def layout(self, config: Any) -> Layout:
        """The layout of a model with this config."""
