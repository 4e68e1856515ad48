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

PROMPTS = [f"a {colour} circle moving {way}" for colour in ("red", "blue", "green") for way in ("left", "right")]
RUNS = {"own": (8, False), "steps 2": (2, False), "steps 4": (4, False), "steps 7": (7, False), "fbc": (8, True)}

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
            known = {
                "prompt": prompt,
                "seed": seed,
                "seconds": time.perf_counter() - start,
                "num_inference_steps": steps,
            }
            path.with_suffix(".json").write_text(json.dumps(known))
            export_to_video(list(frames), str(path), fps=8)
    if any(name.startswith("dit_accel") for name in sys.modules):
        sys.exit("dit-accel was imported")
