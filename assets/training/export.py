"""Packs the averaged weights of both trainings into the packaged model: `python assets/training/export.py`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from build import build_pipeline, save_pipeline
from common import RUNS
from diffusers import AutoencoderKLWan
from dit_accel_assets import model_path


def main() -> None:
    """Read both runs, save the pipeline in fp16 and keep the trainings' logs beside the scripts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=model_path())
    args = parser.parse_args()
    statistics = json.loads((RUNS / "vae" / "frozen" / "config.json").read_text())
    vae = AutoencoderKLWan.from_pretrained(RUNS / "vae" / "frozen")
    state = torch.load(RUNS / "vae" / "checkpoint.pt", weights_only=False)
    vae.load_state_dict(state["averages"]["vae"])
    vae.register_to_config(latents_mean=statistics["latents_mean"], latents_std=statistics["latents_std"])
    pipe = build_pipeline(vae)
    state = torch.load(RUNS / "transformer" / "checkpoint.pt", weights_only=False)
    for name in ("transformer", "text_encoder"):
        missing = getattr(pipe, name).load_state_dict(state["averages"][name], strict=False).missing_keys
        if any("embed_tokens" not in key and "rope" not in key for key in missing):
            raise RuntimeError(f"{name}: the checkpoint lacks {missing}; train again")
    save_pipeline(pipe, args.out)
    for name in ("vae", "transformer"):
        shutil.copy(RUNS / name / "log.jsonl", Path(__file__).parent / f"{name}.log.jsonl")
    print(f"step {state['step']} -> {args.out}")


if __name__ == "__main__":
    main()
