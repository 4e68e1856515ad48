"""Generates held-out prompts, judges the results and draws a contact sheet: `python assets/training/samples.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import subjects
from common import RUNS
from dit_accel_assets import judge, prompts
from PIL import Image


def score(verdicts: list[judge.Judgement]) -> dict[str, float]:
    """Return the mean share of questions passed, over clips, and of every question over the clips that ask it."""
    figures = {"score": float(np.mean([verdict.score for verdict in verdicts]))}
    for question in judge.MARKS:
        shares = [share for verdict in verdicts if (share := verdict.share(question)) is not None]
        if shares:
            figures[question] = float(np.mean(shares))
    return {name: round(value, 3) for name, value in figures.items()}


def sheet(videos: list[np.ndarray]) -> Image.Image:
    """Return seven frames of each clip as rows, or pictures as a square, twice as large."""
    if len(videos[0]) == 1:
        wide = round(len(videos) ** 0.5)
        rows = [np.concatenate([v[0] for v in videos[k : k + wide]], axis=1) for k in range(0, len(videos), wide)]
        rows = [row for row in rows if row.shape == rows[0].shape]
    else:
        picks = np.linspace(0, len(videos[0]) - 1, 7).round().astype(int)
        rows = [np.concatenate([video[pick] for pick in picks], axis=1) for video in videos]
    picture = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)


def main() -> None:
    """Generate, print prompts with their scores, and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    subjects.add_arguments(parser)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the judged size")
    parser.add_argument("--frames", type=int, help="default: the trained length")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=subjects.Subject.guidance)
    parser.add_argument("--sheet", type=Path, default=RUNS / "sheet.png")
    args = parser.parse_args()
    subject, pipe, name = subjects.chosen(args)
    scenes, videos, verdicts = subject.scenes(args.count, args.size or subject.size), [], []
    frames = args.frames or subject.frames
    for scene, video in zip(scenes, subject.generate(pipe, scenes, frames, args.steps, args.guidance), strict=True):
        verdicts.append(judge.judge_clips(video, scene))
        videos.append(video)
        print(f"{verdicts[-1].score:.2f}  {prompts.prompt_of(scene)}", flush=True)
    sheet(videos).save(args.sheet)
    print(name, score(verdicts), "->", args.sheet)


if __name__ == "__main__":
    main()
