"""One clip of Wan 2.1 14B computed by two cards of 80 GB together: torchrun --nproc-per-node 2 two_gpus.py.

Each card has half of the tokens, and inside attention half of the heads (Ulysses); both make the same noise.
"""

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanPipeline
from diffusers.utils import export_to_video

import dit_accel

dist.init_process_group("cpu:gloo,cuda:nccl")
torch.cuda.set_device(dist.get_rank())

MODEL = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.bfloat16, "vae": torch.float32}).to("cuda")
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))

attachment = dit_accel.attach(pipe, dit_accel.RadialAttention(), dit_accel.EasyCache())
video = pipe(
    "a red kite over the sea",
    height=720,
    width=1280,
    num_frames=81,
    generator=torch.Generator().manual_seed(0),
).frames[0]
if dist.get_rank() == 0:
    export_to_video(video, "kite.mp4", fps=16)
    print(attachment.report())
dist.destroy_process_group()
