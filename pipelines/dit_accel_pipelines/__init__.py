"""Model families and the generate command, registered by entry point as a stranger's would be."""

from .cogvideox import COGVIDEOX
from .commands import describe_model, generate_video
from .hunyuan_video import HUNYUAN_VIDEO
from .image_families import IMAGE_ADAPTERS
from .ltx import LTX
from .mochi import MOCHI
from .wan import WAN

ADAPTERS = (WAN, HUNYUAN_VIDEO, MOCHI, COGVIDEOX, LTX, *IMAGE_ADAPTERS)
COMMANDS = {"generate": generate_video, "describe": describe_model}

__all__ = ["ADAPTERS", "COMMANDS"]
