"""Measures a model against its gates: `python assets/training/accept.py [--image] [--model FOLDER] [--out FILE]`.

A model on which methods are told apart must (1) need its steps, (2) be neither lost nor perfect at its own world, (3)
attend to few places, and (4) fail where its length or size is plainly extrapolated. Without --model it takes the
checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import subjects
import torch
from common import RUNS
from concentration import heaviest_mass
from dit_accel_assets import judge, world
from samples import score
from subjects import Subject
from train_vae import psnr

FEW_STEPS = 8
FEW_AT_MOST = 30.0
"""dB between the clip of few steps and the converged one."""
CONVERGED = 45.0
"""dB between N and 2 N steps at which N steps count as converged."""
SCORE = (0.70, 0.95)
FALL = 0.10
"""By how much the judge's score must fall at three times the trained length, or twice the trained size."""
GATES = ("reconstruction", "steps", "judge", "mass", "beyond")
MASS, SHARE = 0.80, 0.25
"""The heaviest share of key tiles must hold this much of the attention's mass in half of the heads."""


def clip_psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the PSNR in dB of two clips with values in 0..1."""
    return float(-10 * np.log10(np.square(first - second).mean() + 1e-12))


def steps_gate(subject: Subject, pipe: Any, scenes: list[world.Scene], guidance: float, most: int) -> dict[str, Any]:
    """Return how far few steps are from the converged clips, which are sought by doubling the steps up to `most`."""
    few = list(subject.generate(pipe, scenes, subject.frames, FEW_STEPS, guidance))
    steps, last = 16, list(subject.generate(pipe, scenes, subject.frames, 16, guidance))
    while True:
        steps *= 2
        present = list(subject.generate(pipe, scenes, subject.frames, steps, guidance))
        agree = [clip_psnr(clip, other) for clip, other in zip(last, present, strict=True)]
        if np.mean(agree) >= CONVERGED or steps >= most:
            break
        last = present
    values = [clip_psnr(clip, other) for clip, other in zip(few, present, strict=True)]
    return {
        "few_steps": FEW_STEPS, "reference_steps": steps, "reference_agrees_db": round(float(np.mean(agree)), 2),
        "converged": bool(np.mean(agree) >= CONVERGED), "psnr_db": [round(value, 2) for value in values],
        "mean_db": round(float(np.mean(values)), 2), "at_most_db": FEW_AT_MOST,
        "passed": bool(np.mean(values) <= FEW_AT_MOST),
    }  # fmt: skip


def judged(
    subject: Subject, pipe: Any, scenes: list[world.Scene], frames: int, steps: int, guidance: float
) -> dict[str, Any]:
    """Return the judge's scores of generated clips, and their distribution."""
    clips = subject.generate(pipe, scenes, frames, steps, guidance)
    verdicts = [judge.judge_clips(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    spread = np.quantile([verdict.score for verdict in verdicts], [0, 0.25, 0.5, 0.75, 1]).round(3)
    return {"clips": len(scenes), "frames": frames, "steps": steps, "quartiles": spread.tolist(), **score(verdicts)}


def mass_gate(subject: Subject, pipe: Any, guidance: float) -> dict[str, Any]:
    """Return which share of the attention's mass the heaviest tiles hold, over heads, at 4,000 tokens and more."""
    masses, tokens = heaviest_mass(subject, pipe, share=SHARE, guidance=guidance)
    return {
        "tokens": tokens, "heaviest_share": SHARE, "heads": int(masses[0].size), "steps": len(masses),
        "mass_quantiles": np.quantile(masses, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]).round(3).tolist(),
        "mass_by_layer": masses.mean(axis=(0, 2)).round(3).tolist(), "at_least": MASS,
        "passed": bool(np.median(masses) >= MASS),
    }  # fmt: skip


def reconstruction(subject: Subject, pipe: Any, scenes: list[world.Scene]) -> dict[str, Any]:
    """Return the autoencoder's PSNR on drawn clips, and the judge's score of what it makes of them."""
    values, verdicts = [], []
    for scene in scenes:
        x, y = subject.reconstruct(pipe, scene)
        values.append(psnr(y, x).item())
        verdicts.append(judge.judge_clips(y[0].permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1).numpy(), scene))
    figures = {"clips": len(scenes), "mean_db": round(float(np.mean(values)), 2)}
    return figures | {"worst_db": round(min(values), 2), **score(verdicts)}


def digest(pipe: Any) -> str:
    """Return the first 16 hex digits of the hash of all weights, fp16."""
    sha = hashlib.sha256()
    for part in (part for _, part in sorted(pipe.components.items()) if isinstance(part, torch.nn.Module)):
        for weight in part.state_dict().values():
            sha.update(weight.to(torch.float16).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def subject_of(name: str, pipe: Any, size: int, steps: int, guidance: float) -> dict[str, Any]:
    """Return what the figures are of; no gate has the name of one of these."""
    return {"model": name, "weights": digest(pipe), "size": size, "sampling_steps": steps, "guidance": guidance}


def kept_figures(path: Path, subject: dict[str, Any]) -> dict[str, Any]:
    """Return what a file holds on the same subject, or the subject alone: other weights' figures say nothing here."""
    figures = json.loads(path.read_text()) if path.exists() else {}
    return figures if {key: figures.get(key) for key in subject} == subject else subject


def main() -> None:
    """Run the gates requested, print each, and keep the figures of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    subjects.add_arguments(parser)
    parser.add_argument("--gates", nargs="*", default=GATES, choices=GATES, metavar="GATE", help=" ".join(GATES))
    parser.add_argument("--count", type=int, default=32, help="clips that are judged (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="clips compared with converged ones (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--most-steps", type=int, default=256, help="where the search for convergence ends")
    parser.add_argument("--guidance", type=float, default=Subject.guidance)
    parser.add_argument("--beyond", type=int, metavar="PIXELS", help="plain extrapolation, where not as usual")
    parser.add_argument("--out", type=Path, default=RUNS / "acceptance.json")
    args = parser.parse_args()
    subject, pipe, name = subjects.chosen(args)
    figures = kept_figures(args.out, subject_of(name, pipe, subject.size, args.steps, args.guidance))
    scenes, sampling = subject.scenes(args.count, subject.size), (args.steps, args.guidance)
    for gate in args.gates:
        if gate == "reconstruction":
            values = reconstruction(subject, pipe, scenes)
        elif gate == "steps":
            values = steps_gate(subject, pipe, scenes[: args.pairs], args.guidance, args.most_steps)
        elif gate == "judge":
            values = judged(subject, pipe, scenes, subject.frames, *sampling)
            values |= {"between": SCORE, "passed": SCORE[0] <= values["score"] <= SCORE[1]}
        elif gate == "mass":
            values = mass_gate(subject, pipe, args.guidance)
        else:
            size, frames = args.beyond or subject.beyond[0], subject.beyond[1]
            values = judged(subject, pipe, subject.scenes(args.count, size), frames, *sampling)
            fall = figures.get("judge", {}).get("score", float("nan")) - values["score"]
            values |= {"pixels": size, "fall": round(fall, 3), "at_least": FALL, "passed": bool(fall >= FALL)}
        figures[gate] = values
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
        print(gate, json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
