"""EasyAnimate 5.1, text, image and control: text first, then the video, in one attention."""

from functools import partial

from dit_accel.adapters.adapter import Adapter, Family, latents_grid
from dit_accel.adapters.blocks import JOINT, BlockList
from dit_accel.adapters.guidance import Guidance
from dit_accel.adapters.rotary import Rope
from dit_accel.adapters.sizes import read_sizes

from .cogvideox import eighths

EASYANIMATE_12B = Family(
    name="easyanimate-5.1-12b",
    repo="alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
    layers=48,
    heads=48,
    head_dim=64,
    ffn_dim=12288,
    patch=(1, 2, 2),
    vae=(4, 8),
    text_tokens=256,
    height=512,
    width=512,
    num_frames=49,
    trained_frames=13,
)

EASYANIMATE = Adapter(
    name="easyanimate",
    transformers=("EasyAnimateTransformer3DModel",),
    guidance=Guidance(together=("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline")),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=partial(latents_grid, text="before", joined=("encoder_hidden_states", "encoder_hidden_states_t5")),
    rope=Rope(owner="rope_embedding", form="theta of a function", parts=("get_3d_rotary_pos_embed",), axes=eighths),
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=(EASYANIMATE_12B,),
)
