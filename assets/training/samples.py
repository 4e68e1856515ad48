"""Generates held-out prompts, judges the clips and draws a contact sheet: `python assets/training/samples.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import RUNS
from diffusers import WanPipeline
from dit_accel_assets import judge, prompts, world
from export import trained_pipeline
from PIL import Image


def load(model: Path | None, runs: Path) -> tuple[WanPipeline, str]:
    """Return a packed model's pipeline in fp32, or that of the trainings in `runs` if none is given, and a name."""
    if model is not None:
        pipe = WanPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe, model.name
    pipe, step = trained_pipeline(runs)
    return pipe, f"step {step}"


def held_out(count: int, height: int, width: int, first: int = 0) -> list[world.Scene]:
    """Return the first held-out scenes at a picture size; their prompts at 64 x 64 are the catalog's."""
    return [world.scene_of(0, first + index, height=height, width=width, held_out=True) for index in range(count)]


def generate(
    pipe: WanPipeline, scenes: list[world.Scene], frames: int, steps: int, guidance: float
) -> Iterator[np.ndarray]:
    """Yield a clip float32 [F, H, W, 3] for each scene's prompt, its number being the seed, four at a time."""
    for first in range(0, len(scenes), 4):
        part = scenes[first : first + 4]
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(part))]
        yield from pipe(
            [prompts.prompt_of(scene) for scene in part],
            height=part[0].height,
            width=part[0].width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
        ).frames


def score(verdicts: list[judge.Verdict]) -> dict[str, float]:
    """Return the mean share of questions passed, over clips, and of every question over the clips that ask it."""
    figures = {"score": float(np.mean([verdict.score for verdict in verdicts]))}
    for question in judge.MARKS:
        shares = [share for verdict in verdicts if (share := verdict.share(question)) is not None]
        if shares:
            figures[question] = float(np.mean(shares))
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    """Generate, print prompts with their scores, and save seven frames of every clip as one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="packed model; without it the checkpoints in --runs")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=world.FRAMES)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, default=RUNS / "sheet.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, name = load(args.model, args.runs)
    scenes, rows, verdicts = held_out(args.count, *args.size), [], []
    for scene, video in zip(scenes, generate(pipe, scenes, args.frames, args.steps, args.guidance), strict=True):
        verdicts.append(judge.judge(video, scene))
        picks = np.linspace(0, args.frames - 1, 7).round().astype(int)
        rows.append(np.concatenate([video[pick] for pick in picks], axis=1))
        print(f"{verdicts[-1].score:.2f}  {prompts.prompt_of(scene)}", flush=True)
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(args.sheet)
    print(name, score(verdicts), "->", args.sheet)


if __name__ == "__main__":
    main()
