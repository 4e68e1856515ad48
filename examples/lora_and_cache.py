"""A LoRA's style with a step cache, Wan 2.1 14B at 480p on a card of 48 GB.

LoRAs may be loaded before or after attaching, and their scale changed between runs; the cache measures what runs.
"""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import dit_accel

MODEL = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.bfloat16, "vae": torch.float32})
pipe.load_lora_weights("benjamin-paine/steamboat-willie-14b", adapter_name="style")
pipe.enable_model_cpu_offload()

attachment = dit_accel.attach(pipe, dit_accel.EasyCache(threshold=0.05, predictor="heun"))
for scale in (0.5, 1.0):
    pipe.set_adapters("style", scale)
    video = pipe(
        "steamboat willie style, golden era animation, a dog in a top hat rows a boat across a lake",
        height=480,
        width=832,
        num_frames=81,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    export_to_video(video, f"boat-{scale}.mp4", fps=16)
    print(f"LoRA at {scale}", attachment.report(), sep="\n")
