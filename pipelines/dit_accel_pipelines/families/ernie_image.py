"""Ernie-Image: the image first, then text; padded text is masked."""

from functools import partial

from dit_accel.adapters import Adapter, BlockList, Guidance, Rope, by_config, latents_grid, read_sizes

ERNIE_IMAGE = Adapter(
    name="ernie-image",
    transformers=("ErnieImageTransformer2DModel",),
    guidance=Guidance(together=("ErnieImagePipeline",)),
    self_attention=("layers.*.self_attention",),
    blocks=(BlockList(pattern="layers.*", takes=("x",), joined=True, token_axis=0),),
    sizes=partial(
        read_sizes, head_dim=None, width="hidden_size", ffn_dim="ffn_hidden_size", gated=True, patch=(1, 2, 2)
    ),
    grid=partial(latents_grid, frames_axis=None, text="after", joined=("text_bth",)),
    joined_text="the lengths of its texts come as an input of their own",
    makes_images=True,
    rope=Rope(owner="pos_embed", values="angles", axes=by_config("rope_axes_dim", ("text", "height", "width"), 256.0)),
)
