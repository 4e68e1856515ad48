"""The methods, found by entry point, and what one is made of; `docs/adding-a-method.md` tells how to write one."""

from .base import AttentionHandler, Handler, Model, Phase, Place
from .config import MethodConfig
from .saving import Saving, TileSaving
from .site import Block, ForwardContext, Site, Streams, sample_of, with_sample

__all__ = [
    "AttentionHandler",
    "Block",
    "ForwardContext",
    "Handler",
    "MethodConfig",
    "Model",
    "Phase",
    "Place",
    "Saving",
    "Site",
    "Streams",
    "TileSaving",
    "sample_of",
    "with_sample",
]
