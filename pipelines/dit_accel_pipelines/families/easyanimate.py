"""EasyAnimate 5.1, text, image and control: text first, then the video, in one attention."""

from functools import partial

from dit_accel.adapters import JOINT, Adapter, BlockList, Guidance, Rope, latents_grid, read_sizes

from .cogvideox import eighths
from .released import released

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
    families=released("easyanimate", trained_frames=13),
)
