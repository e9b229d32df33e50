"""What a model family looks like: its blocks, their input sites, what a neuron is."""

from lmpress.families.base import Layout, Neurons, Site
from lmpress.families.registry import layout_of, skeleton, supported

__all__ = ["Layout", "Neurons", "Site", "layout_of", "skeleton", "supported"]
