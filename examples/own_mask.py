"""A sparse mask of your own in seven lines, on Wan 2.1 1.3B and a card of 16 GB: a token sees the frames near its own.

It takes the options and the report of the methods that ship, and goes together with them, here with a step cache.
"""

from dataclasses import dataclass

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import dit_accel
from dit_accel.methods import MaskHandler, SparseConfig, register


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(SparseConfig):
    name = "my-window"
    frames: int = 4  # latent frames to either side


@register
class WindowHandler(MaskHandler):
    config_type = Window

    def mask(self, q, k, layout):
        return (q.frame - k.frame).abs() <= self.settings.frames


MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.bfloat16, "vae": torch.float32})
pipe.enable_model_cpu_offload()
attachment = dit_accel.attach(pipe, Window(frames=4, dense_steps=0.2), dit_accel.EasyCache())
video = pipe("a red kite over the sea", num_frames=81, generator=torch.Generator().manual_seed(0)).frames[0]
export_to_video(video, "window.mp4", fps=16)
print(attachment.report())
