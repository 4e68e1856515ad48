"""Qwen-Image: sizes for `plan`."""

from dit_accel.adapter import Adapter, Family

QWEN_IMAGE_20B = Family(
    name="qwen-image",
    repo="Qwen/Qwen-Image",
    layers=60,
    heads=24,
    head_dim=128,
    ffn_dim=12288,
    patch=(1, 2, 2),
    vae=(1, 8),
    text_tokens=128,  # follows the prompt's length, up to 1024
    height=1328,
    width=1328,
    num_frames=1,
)

QWEN_IMAGE = Adapter(
    name="qwen-image",
    transformers=(),
    self_attention=(),
    families=(QWEN_IMAGE_20B,),
    refused={"radial": "an image is one frame, of which the mask keeps everything"},
)
