"""Text through the model, one block in memory at a time."""

from lmpress.stream.activations import Activations, Spooled
from lmpress.stream.stream import IN_FLIGHT, BlockStream, StreamBlock, replaced_blocks
from lmpress.stream.walk import Gathered, Walk

__all__ = [
    "IN_FLIGHT",
    "Activations",
    "BlockStream",
    "Gathered",
    "Spooled",
    "StreamBlock",
    "Walk",
    "replaced_blocks",
]
