"""Packs the averaged weights of trainings: `python assets/training/export.py [--image] --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from build import build_pipeline, save_pipeline
from common import RUNS, last_checkpoint
from diffusers import AutoencoderKLWan, WanPipeline
from dit_accel_assets import model_path
from train_image import trained_flux

LOGS = Path(__file__).parent
"""Where the logs of packed trainings stay."""


def trained_autoencoder(run: Path) -> AutoencoderKLWan:
    """Return a run's autoencoder, its fixed encoder and the latest averages of its decoder; else the packed one."""
    if not (run / "checkpoint.pt").exists():
        return AutoencoderKLWan.from_pretrained(model_path("wan-tiny") / "vae", dtype=torch.float32)
    vae = AutoencoderKLWan.from_pretrained(run / "frozen")
    statistics = json.loads((run / "frozen" / "config.json").read_text())
    state = last_checkpoint(run)
    vae.load_state_dict(state["averages"]["vae"])
    vae.register_to_config(latents_mean=statistics["latents_mean"], latents_std=statistics["latents_std"])
    return vae


def trained_pipeline(runs: Path) -> tuple[WanPipeline, int]:
    """Return the pipeline with the averaged weights of the trainings in `runs`, fp32, and the transformer's step."""
    pipe = build_pipeline(trained_autoencoder(runs / "vae"))
    state = last_checkpoint(runs / "transformer")
    for name in ("transformer", "text_encoder"):
        missing = getattr(pipe, name).load_state_dict(state["averages"][name], strict=False).missing_keys
        if any("embed_tokens" not in key and "rope" not in key for key in missing):
            raise RuntimeError(f"{name}: the checkpoint lacks {missing}; train again")
    pipe.set_progress_bar_config(disable=True)
    return pipe, state["step"]


@torch.no_grad()
def average_in(pipe: Any, other: Any) -> None:
    """Move all weights of a pipeline half way to another's (arXiv 2109.01903)."""
    for name, module in pipe.components.items():
        for key, weight in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            weight.lerp_(getattr(other, name).get_parameter(key), 0.5)


def main() -> None:
    """Read the runs, save the pipeline in fp16 and keep the trainings' logs beside the scripts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder with the runs (default %(default)s)")
    parser.add_argument("--image", action="store_true", help="the image model instead of the video model")
    parser.add_argument("--also", type=Path, help="runs whose weights are averaged with these, half each")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    trained = trained_flux if args.image else trained_pipeline
    pipe, step = trained(args.runs)
    if args.also:
        average_in(pipe, trained(args.also)[0])
    save_pipeline(pipe, args.out)
    for name in ("image-vae", "flux") if args.image else ("vae", "transformer"):
        if (args.runs / name / "log.jsonl").exists():  # a packed autoencoder's is there already
            shutil.copy(args.runs / name / "log.jsonl", LOGS / f"{args.out.name}.{name}.log.jsonl")
    print(f"step {step} -> {args.out}")


if __name__ == "__main__":
    main()
