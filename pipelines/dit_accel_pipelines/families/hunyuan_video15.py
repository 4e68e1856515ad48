"""HunyuanVideo 1.5, text to video and image to video: one attention over video, then image, glyph and prompt tokens.

The mask pairs valid queries with valid keys, with the padded tokens sorted to the end; the text refiner is left out.
"""

from functools import partial

from dit_accel.adapters import JOINT, Adapter, BlockList, latents_grid

from .hunyuan_video import HUNYUAN_ROPE
from .released import released

HUNYUAN_VIDEO15 = Adapter(
    name="hunyuan-video-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    grid=partial(
        latents_grid, text="after", joined=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    ),
    outer_masks=True,
    rope=HUNYUAN_ROPE,
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=released("hunyuan-video-1.5", patch=(1, 1, 1), trained_frames=31),
)
