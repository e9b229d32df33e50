"""What a model family looks like: its blocks, their input sites, what a neuron is."""

from lmpress.families.base import BlockLayout, Feed, Layout, Neurons, Norm, Rows, Site
from lmpress.families.registry import layout_of, skeleton, supported

__all__ = [
    "BlockLayout",
    "Feed",
    "Layout",
    "Neurons",
    "Norm",
    "Rows",
    "Site",
    "layout_of",
    "skeleton",
    "supported",
]
