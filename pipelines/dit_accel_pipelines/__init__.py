"""Model families and the generate command, registered by entry point as a stranger's would be."""

from .allegro import ALLEGRO
from .anyflow import ANYFLOW
from .cogvideox import COGVIDEOX
from .commands import describe_model, generate_video
from .cosmos import COSMOS
from .cosmos3 import COSMOS3
from .easyanimate import EASYANIMATE
from .finetune_command import finetune_model
from .framepack import FRAMEPACK
from .helios import HELIOS
from .hunyuan_video import HUNYUAN_VIDEO
from .hunyuan_video15 import HUNYUAN_VIDEO15
from .image_families import IMAGE_ADAPTERS
from .kandinsky import KANDINSKY5, KANDINSKY6
from .ltx import LTX
from .ltx2 import LTX2
from .minimax_h3 import MINIMAX_H3
from .mochi import MOCHI
from .motif import MOTIF_VIDEO
from .skyreels_v2 import SKYREELS_V2
from .wan import WAN
from .wan_animate import WAN_ANIMATE

VIDEO = (WAN, WAN_ANIMATE, SKYREELS_V2, ANYFLOW, HELIOS, HUNYUAN_VIDEO, HUNYUAN_VIDEO15, FRAMEPACK, LTX, LTX2)
VIDEO += (MINIMAX_H3, KANDINSKY5, KANDINSKY6, COSMOS, COSMOS3, MOTIF_VIDEO, MOCHI, COGVIDEOX, EASYANIMATE, ALLEGRO)
ADAPTERS = VIDEO + IMAGE_ADAPTERS
COMMANDS = {"generate": generate_video, "describe": describe_model, "finetune": finetune_model}

__all__ = ["ADAPTERS", "COMMANDS"]
