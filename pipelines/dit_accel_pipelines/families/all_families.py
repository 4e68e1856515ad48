"""Every model family: video, then images."""

from .allegro import ALLEGRO
from .anyflow import ANYFLOW
from .cogvideox import COGVIDEOX
from .cosmos import COSMOS
from .cosmos3 import COSMOS3
from .easyanimate import EASYANIMATE
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
