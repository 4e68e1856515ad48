"""Model families and the generate command, registered by entry point as a stranger's would be."""

from .cogvideox import COGVIDEOX
from .commands import describe_model, generate_video
from .flux import FLUX, FLUX_KIN
from .hunyuan_video import HUNYUAN_VIDEO
from .ltx import LTX
from .mochi import MOCHI
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import WAN

ADAPTERS = (WAN, HUNYUAN_VIDEO, MOCHI, COGVIDEOX, LTX, FLUX, FLUX_KIN, SD3, QWEN_IMAGE)
COMMANDS = {"generate": generate_video, "describe": describe_model}

__all__ = ["ADAPTERS", "COMMANDS"]
