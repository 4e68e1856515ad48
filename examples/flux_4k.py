"""A picture of 4096 x 4096 by FLUX.1-dev, four times the side it was trained on, on a card of 48 GB.

UltraImage makes the picture at the trained size first and finishes it large, so that no object appears twice.
"""

import torch
from diffusers import FluxPipeline

import dit_accel

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()

attachment = dit_accel.attach(pipe, dit_accel.UltraImage(guided=True))
picture = attachment.call(  # two calls of the pipeline, small and large, as one
    "an old harbour town at dusk seen from a hill, fishing boats, lit windows, photograph",
    height=4096,
    width=4096,
    num_inference_steps=28,
    guidance_scale=3.5,
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save("harbour.png")
print(attachment.report())
