"""Two settings of Wan 2.1 1.3B against the dense run of the same prompt and seed, on a card of 16 GB.

Prints seconds, PSNR, SSIM and LPIPS of each, and draws the frames with five times their difference.
"""

import torch
from diffusers import WanPipeline

import dit_accel

SETTINGS = {
    "cache": [dit_accel.EasyCache(threshold=0.05)],
    "cache-and-sparse": [dit_accel.EasyCache(threshold=0.05), dit_accel.RadialAttention(dense_steps=0.2)],
}
PROMPT = "a red kite with a long tail circles above a rocky coast, waves break below"

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.bfloat16, "vae": torch.float32})
pipe.enable_model_cpu_offload()

for name, methods in SETTINGS.items():
    with dit_accel.attach(pipe, *methods) as attachment:
        check = attachment.check(PROMPT, seed=0, height=480, width=832, num_frames=81)
        check.save(f"{name}.png")
        print(name, check, "", sep="\n")
