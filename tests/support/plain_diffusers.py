"""A script of another library's user, run alone: clips of a Wan model by diffusers, and what each is and took as JSON.

Its arguments are the model's folder, and the folder to which clips are written.
"""

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import FirstBlockCacheConfig, WanPipeline
from diffusers.utils import export_to_video

PROMPTS = ["a red circle moving left", "a blue circle moving right"]
RUNS = {"own": (5, False), "steps 1": (1, False), "steps 3": (3, False), "fbc": (5, True)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(sys.argv[1])
    for name, (steps, cached) in RUNS.items():
        if cached:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
        for seed, prompt in enumerate(PROMPTS):
            path = Path(sys.argv[2], name, f"clip{seed}.mp4")
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(seed)
            call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": steps, "generator": generator}
            frames = pipe(prompt, **call).frames[0]
            about = {"prompt": prompt, "seed": seed, "seconds": time.perf_counter() - start}
            path.with_suffix(".json").write_text(json.dumps({**about, "num_inference_steps": steps}))
            export_to_video(list(frames), str(path), fps=8)
    if any(name.startswith("dit_accel") for name in sys.modules):
        sys.exit("dit-accel was imported")
