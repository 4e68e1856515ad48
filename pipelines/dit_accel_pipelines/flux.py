"""FLUX.1: sizes for `plan`."""

from dataclasses import replace

from dit_accel.adapter import Adapter, Family

FLUX_DEV = Family(
    name="flux.1-dev",
    repo="black-forest-labs/FLUX.1-dev",
    layers=19 + 38,  # double and single blocks
    heads=24,
    head_dim=128,
    ffn_dim=12288,
    patch=(1, 2, 2),
    vae=(1, 8),
    text_tokens=512,
    height=1024,
    width=1024,
    num_frames=1,
    num_inference_steps=28,
    forwards_per_step=1,  # guidance is distilled into the model
)
FLUX_SCHNELL = replace(
    FLUX_DEV, name="flux.1-schnell", repo="black-forest-labs/FLUX.1-schnell", text_tokens=256, num_inference_steps=4
)

FLUX = Adapter(
    name="flux",
    transformers=(),
    self_attention=(),
    families=(FLUX_DEV, FLUX_SCHNELL),
    refused={"radial": "an image is one frame, of which the mask keeps everything"},
)
