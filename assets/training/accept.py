"""Measures a model against its gates and writes acceptance.json: `python assets/training/accept.py [--model FOLDER]`.

A model on which methods are told apart must (1) need its steps, (2) be neither lost nor perfect at its own world, (3)
attend to few places, and (4) fail where its length is plainly extrapolated. Without --model it takes the checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUNS
from concentration import heaviest_mass
from diffusers import WanPipeline
from dit_accel_assets import judge, painter, world
from samples import generate, held_out, load, score
from train_vae import psnr, to_tensor

FEW_STEPS = 8
FEW_AT_MOST = 30.0
"""dB between the clip of few steps and the converged one."""
CONVERGED = 45.0
"""dB between N and 2 N steps at which N steps count as converged."""
SCORE = (0.70, 0.95)
LONGER = 3
FALL = 0.10
"""By how much the judge's score must fall at three times the trained length."""
MASS, SHARE = 0.80, 0.25
"""The heaviest share of key tiles must hold this much of the attention's mass in half of the heads."""


def clip_psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the PSNR in dB of two clips with values in 0..1."""
    return float(-10 * np.log10(np.square(one - other).mean() + 1e-12))


def steps_gate(pipe: WanPipeline, scenes: list[world.Scene], guidance: float, most: int) -> dict[str, Any]:
    """Return how far few steps are from the converged clips, which are sought by doubling the steps up to `most`."""
    few = list(generate(pipe, scenes, world.FRAMES, FEW_STEPS, guidance))
    steps, last = 16, list(generate(pipe, scenes, world.FRAMES, 16, guidance))
    while True:
        steps *= 2
        present = list(generate(pipe, scenes, world.FRAMES, steps, guidance))
        agree = [clip_psnr(one, other) for one, other in zip(last, present, strict=True)]
        if np.mean(agree) >= CONVERGED or steps >= most:
            break
        last = present
    values = [clip_psnr(one, other) for one, other in zip(few, present, strict=True)]
    return {
        "few_steps": FEW_STEPS, "reference_steps": steps, "reference_agrees_db": round(float(np.mean(agree)), 2),
        "converged": bool(np.mean(agree) >= CONVERGED), "psnr_db": [round(value, 2) for value in values],
        "mean_db": round(float(np.mean(values)), 2), "at_most_db": FEW_AT_MOST,
        "passed": bool(np.mean(values) <= FEW_AT_MOST),
    }  # fmt: skip


def judged(pipe: WanPipeline, scenes: list[world.Scene], frames: int, steps: int, guidance: float) -> dict[str, Any]:
    """Return the judge's scores of generated clips, and their distribution."""
    clips = generate(pipe, scenes, frames, steps, guidance)
    verdicts = [judge.judge(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    spread = np.quantile([verdict.score for verdict in verdicts], [0, 0.25, 0.5, 0.75, 1]).round(3)
    return {"clips": len(scenes), "frames": frames, "steps": steps, "quartiles": spread.tolist(), **score(verdicts)}


def mass_gate(pipe: WanPipeline, scene: world.Scene, frames: int, guidance: float) -> dict[str, Any]:
    """Return which share of the attention's mass the heaviest tiles hold, over heads, at 4,000 tokens and more."""
    masses, tokens = heaviest_mass(pipe, scene, frames, share=SHARE, guidance=guidance)
    return {
        "tokens": tokens, "heaviest_share": SHARE, "heads": int(masses[0].size), "steps": len(masses),
        "mass_quantiles": np.quantile(masses, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]).round(3).tolist(),
        "mass_by_layer": masses.mean(axis=(0, 2)).round(3).tolist(), "at_least": MASS,
        "passed": bool(np.median(masses) >= MASS),
    }  # fmt: skip


@torch.no_grad()
def reconstruction(pipe: WanPipeline, scenes: list[world.Scene], frames: int) -> dict[str, Any]:
    """Return the autoencoder's PSNR on drawn clips, and the judge's score of what it makes of them."""
    values, verdicts = [], []
    for scene in scenes:
        x = to_tensor(painter.draw(scene, frames)[None])
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
        values.append(psnr(y, x).item())
        verdicts.append(judge.judge(y[0].permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1).numpy(), scene))
    figures = {"clips": len(scenes), "frames": frames, "mean_db": round(float(np.mean(values)), 2)}
    return figures | {"worst_db": round(min(values), 2), **score(verdicts)}


def digest(pipe: WanPipeline) -> str:
    """Return the first 16 hex digits of the hash of all weights, fp16."""
    found = hashlib.sha256()
    for part in (pipe.text_encoder, pipe.vae, pipe.transformer):
        for weight in part.state_dict().values():
            found.update(weight.to(torch.float16).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def kept_figures(path: Path, subject: dict[str, Any]) -> dict[str, Any]:
    """Return what a file holds on the same subject, or the subject alone: other weights' figures say nothing here."""
    figures = json.loads(path.read_text()) if path.exists() else {}
    return figures if {key: figures.get(key) for key in subject} == subject else subject


def main() -> None:
    """Run the gates asked for, print each, and keep the figures of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="packed model; without it the checkpoints in --runs")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--gates", nargs="*", default=["reconstruction", "steps", "judge", "mass", "longer"])
    parser.add_argument("--count", type=int, default=32, help="clips that are judged (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="clips compared with converged ones (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--most-steps", type=int, default=256, help="where the search for convergence ends")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RUNS / "acceptance.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe, name = load(args.model, args.runs)
    setting = {"size": args.size, "steps": args.steps, "guidance": args.guidance}
    figures = kept_figures(args.out, {"model": name, "weights": digest(pipe), **setting})
    scenes = held_out(args.count, args.size, args.size)

    def note(gate: str, values: dict[str, Any]) -> None:
        figures[gate] = values
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
        print(gate, json.dumps(values), flush=True)

    for gate in args.gates:
        if gate == "reconstruction":
            note(gate, reconstruction(pipe, scenes, world.FRAMES))
        elif gate == "steps":
            note(gate, steps_gate(pipe, scenes[: args.pairs], args.guidance, args.most_steps))
        elif gate == "judge":
            values = judged(pipe, scenes, world.FRAMES, args.steps, args.guidance)
            note(gate, values | {"between": SCORE, "passed": SCORE[0] <= values["score"] <= SCORE[1]})
        elif gate == "mass":
            note(gate, mass_gate(pipe, held_out(1, 128, 128)[0], 33, args.guidance))
        elif gate == "longer":
            frames = LONGER * (world.FRAMES - 1) + 1
            values = judged(pipe, scenes, frames, args.steps, args.guidance)
            fall = figures.get("judge", {}).get("score", float("nan")) - values["score"]
            note(gate, values | {"fall": round(fall, 3), "at_least": FALL, "passed": bool(fall >= FALL)})
        else:
            raise SystemExit(f"--gates {gate}: no such gate; choose from reconstruction, steps, judge, mass, longer")


if __name__ == "__main__":
    main()
