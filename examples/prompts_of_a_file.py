"""Every line of prompts.txt as a clip of Wan 2.1 1.3B on a card of 16 GB, loaded and attached once.

Each run counts its own steps and forgets the one before. `dit-accel generate --prompt-file` does the same, and resumes.
"""

from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import dit_accel

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.bfloat16, "vae": torch.float32})
pipe.enable_model_cpu_offload()

prompts = [line.strip() for line in Path("prompts.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
attachment = dit_accel.attach(pipe, preset="balanced")
for number, prompt in enumerate(prompts, 1):
    video = pipe(prompt, height=480, width=832, num_frames=81, generator=torch.Generator().manual_seed(number)).frames[
        0
    ]
    export_to_video(video, f"{number:03d}.mp4", fps=16)
    timing = attachment.report().timing
    print(f"{number:03d}.mp4", prompt, f"{timing.speedup:.2f} times as fast" if timing and timing.speedup else "")
