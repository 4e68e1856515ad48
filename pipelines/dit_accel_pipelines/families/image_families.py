"""The adapters of all image models, in the order in which tables show them."""

from dit_accel.adapters import Adapter

from .aura_flow import AURA_FLOW
from .bria_fibo import BRIA_FIBO, BRIA_FIBO_2
from .chroma import CHROMA
from .cogview import COGVIEW, GLM_IMAGE
from .ernie_image import ERNIE_IMAGE
from .flux import FLUX, FLUX_KIN
from .flux2 import FLUX2, FLUX3
from .hidream import HIDREAM
from .hunyuan_image import HUNYUAN_IMAGE
from .ideogram4 import IDEOGRAM4
from .image_queries import NUCLEUS_IMAGE, PRX
from .joyimage import JOY_IMAGE_EDIT, JOY_IMAGE_EDIT_PLUS
from .krea2 import KREA2
from .lumina2 import LUMINA2
from .pixart import HUNYUAN_DIT, LUMINA_NEXT, PIXART
from .qwen_image import QWEN_IMAGE, QWEN_IMAGE_21
from .sd3 import SD3
from .z_image import Z_IMAGE

IMAGE_ADAPTERS: tuple[Adapter, ...] = (
    FLUX, FLUX_KIN, FLUX2, FLUX3, SD3, QWEN_IMAGE, QWEN_IMAGE_21, Z_IMAGE, CHROMA, KREA2, HUNYUAN_IMAGE, HIDREAM,
    COGVIEW, GLM_IMAGE, LUMINA2, IDEOGRAM4, AURA_FLOW, BRIA_FIBO, BRIA_FIBO_2, ERNIE_IMAGE, NUCLEUS_IMAGE, PRX,
    JOY_IMAGE_EDIT, JOY_IMAGE_EDIT_PLUS, PIXART, HUNYUAN_DIT, LUMINA_NEXT,
)  # fmt: skip
"""Adapters of image models."""
