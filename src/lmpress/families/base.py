"""What the pipeline asks about a model family, and the answer for one config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """Some of the outputs of a linear: all of them, or a part where several projections are fused into one.

    Attributes:
        linear: its name, relative to the block.
        start, stop, of: from start/of to stop/of of its rows: (1, 2, 2) is the second half.
    """

    linear: str
    start: int = 0
    stop: int = 1
    of: int = 1

    def within(self, count: int) -> slice:
        """These rows among `count`. ValueError where the parts do not come out even."""
        if count % self.of:
            raise ValueError(f"the {count} rows of {self.linear} are no {self.of} equal parts")
        return slice(count * self.start // self.of, count * self.stop // self.of)


@dataclass(frozen=True)
class Norm:
    """A normalization of the residual stream with a gain for each channel.

    Attributes:
        name: of the module, relative to the block (of the last norm: its path in the model).
        offset: what is added to the stored weight to give the gain: 1 for Gemma.
        centred: whether the mean is subtracted first (LayerNorm).
    """

    name: str
    offset: float = 0.0
    centred: bool = False


@dataclass(frozen=True)
class Feed:
    """What makes the input of a site, such that scaling one scales the other: a norm, or rows of a linear.

    Attributes:
        norm: the norm whose output is the input.
        rows: rows that the channels are proportional to.
        heads: (groups, repeats) where every group of rows feeds several heads: row (g, d) feeds the channels
            (g * repeats + r, d) for all r < repeats.
    """

    norm: Norm | None = None
    rows: Rows | None = None
    heads: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Site:
    """Linears that share one input; a block computes its sites in the order of `BlockLayout.sites`.

    Attributes:
        name: "qkv", "o", "gate_up" or "down"; "gate_up" of an MLP without a gate is its first linear alone.
        linears: names relative to the block, such as "self_attn.q_proj"; the first of them is called first.
        feed: what makes its input; None where nothing can be scaled instead of it.
    """

    name: str
    linears: tuple[str, ...]
    feed: Feed | None = None


@dataclass(frozen=True)
class Neurons:
    """What one neuron of the MLP is: a row (and bias) of each of `inputs`, a column of `output`.

    Attributes:
        inputs: the rows that make a neuron: row i of each.
        signal: the one of them whose output counts as the neuron's activation (SPQ, arXiv 2602.18420).
        output: the linear whose columns carry the neurons on.
    """

    inputs: tuple[Rows, ...]
    signal: Rows
    output: str

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears whose rows make a neuron, each once."""
        return tuple(dict.fromkeys(rows.linear for rows in self.inputs))

    def parts(self, linear: str) -> int:
        """How many rows of `linear` one neuron has; 0 for a linear that is none of its inputs."""
        return sum(rows.linear == linear for rows in self.inputs)


@dataclass(frozen=True)
class BlockLayout:
    """One block. All names are relative to it.

    Attributes:
        sites: its input sites, in the order of execution.
        neurons: what one neuron of its MLP is.
        attention: the linears of the attention.
        mlp: the linears of the MLP.
        writers: the linears whose outputs are added to the residual stream.
        norms_behind: norms between a writer and the residual stream (Gemma).
    """

    sites: tuple[Site, ...]
    neurons: Neurons
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    writers: tuple[str, ...]
    norms_behind: tuple[Norm, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of the block, in the order of the sites."""
        return tuple(linear for site in self.sites for linear in site.linears)

    def group(self, name: str) -> tuple[str, ...]:
        """The linears that a target such as `attention` means. KeyError for what is no group."""
        return {"attention": self.attention, "mlp": self.mlp, "linears": self.linears}[name]

    def site_of(self, linear: str) -> Site:
        """The site whose input `linear` reads. KeyError where the block has no such linear."""
        for site in self.sites:
            if linear in site.linears:
                return site
        raise KeyError(f"a block has no linear {linear!r}; it has {', '.join(self.linears)}")


@dataclass(frozen=True)
class Layout:
    """The answers of a family for one config.

    Attributes:
        family: the family's name, such as "llama-like".
        blocks: the path of the list of blocks, such as "model.layers".
        each: the layout of every block.
        embedding: the path of the token embedding.
        head: the path of the linear that gives the logits.
        tied: whether the head's weight is the embedding's.
        last_norm: between the last block and the head; None where there is none, or more than a norm.
    """

    family: str
    blocks: str
    each: tuple[BlockLayout, ...]
    embedding: str
    head: str
    tied: bool
    last_norm: Norm | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.each)

    def block(self, index: int) -> BlockLayout:
        """The layout of block `index`, counted from 0."""
        return self.each[index]

    def block_name(self, index: int) -> str:
        """The path of block `index`: 3 -> "model.layers.3". IndexError where there is no such block."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"no block {index}: there are {self.num_blocks}, counted from 0")
        return f"{self.blocks}.{index}"

    def linears_of(self, index: int) -> tuple[str, ...]:
        """The full names of the linears of block `index`."""
        return tuple(f"{self.block_name(index)}.{linear}" for linear in self.block(index).linears)

    @property
    def linears(self) -> Iterator[str]:
        """The full names of the linears of all blocks."""
        return (name for index in range(self.num_blocks) for name in self.linears_of(index))


class Family(ABC):
    """Answers for the configs of one family. To add a family: write one, and list it in `registry.py`."""

    name: str
    """What a layout and a message call the family."""

    model_types: tuple[str, ...]
    """The `model_type`s of the configs that it answers for."""

    @abstractmethod
    def layout(self, config: Any) -> Layout:
        """The layout of a model with this config."""
