"""HunyuanVideo 1.5, text to video and image to video: one attention over video, then image, glyph and prompt tokens.

The mask pairs valid queries with valid keys, with the padded tokens sorted to the end; the text refiner is left out.
"""

from dataclasses import replace
from functools import partial

from dit_accel.adapters.adapter import Adapter, Family, latents_grid
from dit_accel.adapters.blocks import JOINT, BlockList
from dit_accel.adapters.rope_axes import by_config
from dit_accel.adapters.rotary import VISUAL_AXES, Rope

HUNYUAN_VIDEO15_480P = Family(
    name="hunyuan-video-1.5-480p",
    repo="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
    layers=54,
    heads=16,
    head_dim=128,
    ffn_dim=8192,
    patch=(1, 1, 1),
    vae=(4, 16),
    text_tokens=1000 + 256 + 729,  # prompt, glyphs, image
    height=480,
    width=848,
    num_frames=121,
    trained_frames=31,
)
HUNYUAN_VIDEO15_720P = replace(
    HUNYUAN_VIDEO15_480P,
    name="hunyuan-video-1.5-720p",
    repo="hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v",
    height=720,
    width=1280,
)

HUNYUAN_VIDEO15 = Adapter(
    name="hunyuan-video-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    grid=partial(
        latents_grid, text="after", joined=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    ),
    outer_masks=True,
    rope=Rope(
        owner="rope",
        form="theta",
        axes=by_config("rope_axes_dim", VISUAL_AXES, 256.0, theta_key="rope_theta", default=(16, 56, 56)),
    ),
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=(HUNYUAN_VIDEO15_480P, HUNYUAN_VIDEO15_720P),
)
