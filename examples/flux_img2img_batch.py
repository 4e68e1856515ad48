"""A folder of pictures redrawn in one style by FLUX.1-dev, four at a time, on a card of 48 GB.

A step cache decides for the whole batch; a run that starts in the middle (strength) counts its own steps.
"""

from pathlib import Path

import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.utils import load_image

import dit_accel

BATCH = 4
pipe = FluxImg2ImgPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()

files = sorted(Path("pictures").glob("*.png"))
Path("redrawn").mkdir(exist_ok=True)
with dit_accel.attach(pipe, dit_accel.EasyCache(threshold=0.1)) as attachment:
    for first in range(0, len(files), BATCH):
        some = files[first : first + BATCH]
        made = pipe(
            ["a watercolour painting"] * len(some),
            image=[load_image(str(file)).resize((1024, 1024)) for file in some],
            height=1024,
            width=1024,
            strength=0.7,
            num_inference_steps=40,
            generator=torch.Generator().manual_seed(first),
        ).images
        for file, picture in zip(some, made, strict=True):
            picture.save(Path("redrawn") / file.name)
    print(attachment.report())
