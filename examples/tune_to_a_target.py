"""The cheapest setting of Wan 2.1 1.3B within 30 dB of its converged run, searched once and then attached; 16 GB.

It takes four prompts or more in prompts.txt, half of which are held out. A search that was stopped goes on.
"""

import subprocess
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video
from dit_accel_pipelines.generation.solvers import make_scheduler

import dit_accel
from dit_accel.methods.toml import from_toml, run_table

MODEL, SETTING = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", Path("fast.toml")
TUNE = "dit-accel tune pipeline --target psnr=30 --height 480 --width 832 --num-frames 81 --prompt-file prompts.txt"

if not SETTING.exists():
    subprocess.run([*TUNE.split(), "--model", MODEL, "-o", str(SETTING)], check=True)
text = SETTING.read_text(encoding="utf-8")

pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.bfloat16, "vae": torch.float32})
pipe.enable_model_cpu_offload()
run = run_table(text)  # solver, noise shift and steps of the setting
if "solver" in run:
    pipe.scheduler = make_scheduler(pipe.scheduler, run.pop("solver"), run.pop("flow_shift", None))
attachment = dit_accel.attach(pipe, *from_toml(text), preset="none")
video = pipe("a red kite over the sea", height=480, width=832, num_frames=81, **run).frames[0]
export_to_video(video, "kite.mp4", fps=16)
print(attachment.report())
