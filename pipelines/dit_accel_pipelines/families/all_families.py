"""Every model family: video, then images, in the order in which tables show them."""

from .allegro import ALLEGRO
from .aura_flow import AURA_FLOW
from .bria_fibo import BRIA_FIBO, BRIA_FIBO_2
from .cogvideox import COGVIDEOX, EASYANIMATE
from .cogview import COGVIEW, GLM_IMAGE
from .cosmos import COSMOS
from .cosmos3 import COSMOS3
from .ernie_image import ERNIE_IMAGE
from .flux import CHROMA, FLUX, FLUX_KIN
from .flux2 import FLUX2, FLUX3
from .hidream import HIDREAM
from .hunyuan_image import HUNYUAN_IMAGE
from .hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO, HUNYUAN_VIDEO15
from .ideogram4 import IDEOGRAM4
from .image_queries import NUCLEUS_IMAGE, PRX
from .joyimage import JOY_IMAGE_EDIT, JOY_IMAGE_EDIT_PLUS
from .kandinsky import KANDINSKY5, KANDINSKY6
from .krea2 import KREA2
from .ltx import LTX, LTX2
from .lumina2 import LUMINA2
from .minimax_h3 import MINIMAX_H3
from .mochi import MOCHI
from .motif import MOTIF_VIDEO
from .pixart import HUNYUAN_DIT, LUMINA_NEXT, PIXART
from .qwen_image import QWEN_IMAGE, QWEN_IMAGE_21
from .sd3 import SD3
from .wan import WAN
from .wan_kin import ANYFLOW, HELIOS, SKYREELS_V2, WAN_ANIMATE
from .z_image import Z_IMAGE

VIDEO = (WAN, WAN_ANIMATE, SKYREELS_V2, ANYFLOW, HELIOS, HUNYUAN_VIDEO, HUNYUAN_VIDEO15, FRAMEPACK, LTX, LTX2)
VIDEO += (MINIMAX_H3, KANDINSKY5, KANDINSKY6, COSMOS, COSMOS3, MOTIF_VIDEO, MOCHI, COGVIDEOX, EASYANIMATE, ALLEGRO)
IMAGES = (FLUX, FLUX_KIN, FLUX2, FLUX3, SD3, QWEN_IMAGE, QWEN_IMAGE_21, Z_IMAGE, CHROMA, KREA2, HUNYUAN_IMAGE, HIDREAM)
IMAGES += (COGVIEW, GLM_IMAGE, LUMINA2, IDEOGRAM4, AURA_FLOW, BRIA_FIBO, BRIA_FIBO_2, ERNIE_IMAGE, NUCLEUS_IMAGE, PRX)
IMAGES += (JOY_IMAGE_EDIT, JOY_IMAGE_EDIT_PLUS, PIXART, HUNYUAN_DIT, LUMINA_NEXT)
ADAPTERS = VIDEO + IMAGES
