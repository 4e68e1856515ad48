"""Measures the embedded model against its acceptance figures and writes them: `python assets/training/accept.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from train_transformer import score
from train_vae import held_out_psnr


def main() -> None:
    """Load the packaged model in fp32, reconstruct and generate held-out clips, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--reconstruct", type=int, nargs="*", default=[17, 33], help="clip lengths to reconstruct")
    parser.add_argument("--generate", type=int, nargs="*", default=[17, 33], help="clip lengths to generate")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "acceptance.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}

    def note(name: str, values: dict[str, float]) -> None:
        figures[name] = {"clips": args.count, **values}
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
        print(name, figures[name], flush=True)

    for frames in args.reconstruct:
        values = held_out_psnr(pipe.vae, frames, args.count)
        note(f"vae_psnr_{frames}", {"mean": round(float(np.mean(values)), 2), "worst": round(min(values), 2)})
    for frames in args.generate:
        accuracies = score(pipe, args.count, frames, args.guidance)
        note(f"generated_{frames}", {"steps": 20, "guidance": args.guidance, **accuracies})


if __name__ == "__main__":
    main()
