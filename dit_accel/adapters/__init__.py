"""What the core must know of a model family, as data, and where it finds the families that are installed."""

from .adapter import NO_STEP, Adapter, Family, Grid, latents_grid, patch_count
from .blocks import BlockList
from .cross_attention import CrossAttention
from .guidance import Guidance
from .installed import register
from .joined_text import JoinedText
from .rotary import Rope

__all__ = [
    "NO_STEP", "Adapter", "BlockList", "CrossAttention", "Family", "Grid", "Guidance", "JoinedText",
    "Rope", "latents_grid", "patch_count", "register",
]  # fmt: skip
