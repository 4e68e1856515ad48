"""What the core must know of a model family, as data, and where it finds the families that are installed."""

from .adapter import NO_STEP, Adapter, Family, Grid, latents_grid, patch_count
from .blocks import JOINT, BlockList
from .cross_attention import CrossAttention
from .guidance import Guidance
from .installed import register
from .joined_text import JoinedText
from .rope_axes import by_config
from .rotary import VISUAL_AXES, Axis, Rope
from .sizes import Sizes, read_sizes

__all__ = [
    "JOINT", "NO_STEP", "VISUAL_AXES", "Adapter", "Axis", "BlockList", "CrossAttention", "Family", "Grid", "Guidance",
    "JoinedText", "Rope", "Sizes", "by_config", "latents_grid", "patch_count", "read_sizes", "register",
]  # fmt: skip
