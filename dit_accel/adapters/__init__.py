"""What the core must know of a model family, as data, and where it finds the families that are installed."""

from .adapter import IMAGE_REFUSED, NO_STEP, Adapter, Family, Grid, latents_grid, patch_count
from .blocks import BlockList

__all__ = ["IMAGE_REFUSED", "NO_STEP", "Adapter", "BlockList", "Family", "Grid", "latents_grid", "patch_count"]
