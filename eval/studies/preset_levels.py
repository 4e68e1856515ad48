"""Measure the presets' step caches at many numbers of steps: how near each stays to the model's own run, beside fewer.

    python eval/studies/preset_levels.py flux-tiny --out eval/results/preset-levels-flux-tiny.jsonl

The clips chose nothing; ``--solver unipc`` adds that solver. Each line is one preset at one number of steps on one
clip: PSNR to the model's own dense run of as many steps by the same solver, and as shares of that run's the blocks that
ran and the processor seconds of the denoising loop and of the whole call. Lines named ``dense M`` are runs of M steps
held against the same run. What is there is not run again; all runs on one thread.
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from dit_accel_eval.metrics.pixels import psnr
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.model import ModelRun
from dit_accel_eval.runs.results import append_line, read_lines

from dit_accel.methods.config import MethodConfig
from dit_accel.methods.presets import LEVELS, PRESETS

STEPS = (8, 10, 12, 16, 20, 30, 50)
"""The numbers of steps at which levels are chosen and judged."""

FEWER = (8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 32, 36, 40)
"""Steps of the dense runs that levels are held against."""

JUDGING = range(320, 336)
"""Clips that judge them; 200 to 215 chose them, by this study as it was at the tag `studies-2026-12`."""


def levels(steps: int) -> dict[str, MethodConfig]:
    """Return the step caches of the presets that skip any in a run of so many steps."""
    configs = {level: PRESETS[level][0].config for level in LEVELS}
    return {level: config for level, config in configs.items() if (getattr(config, "min_steps", None) or 0) <= steps}


def measure(model: str, solver: str, clips: Iterable[int], steps: Iterable[int], out: Path) -> None:
    """Run what the file lacks, a line each."""
    done = {(line["solver"], line["clip"], line["steps"], line["setting"]) for line in read_lines(out)}
    suite_model = EmbeddedModel(model, {})

    def run(clip: int, count: int, methods: tuple[MethodConfig, ...] = ()) -> tuple[ModelRun, float]:
        began = time.process_time()
        result = suite_model.run(clip, steps=count, solver=solver, methods=methods)
        return result, time.process_time() - began

    for clip in clips:
        dense: dict[int, tuple[ModelRun, float]] = {}
        for count in steps:
            wanted = {f"dense {fewer}": fewer for fewer in FEWER if fewer < count} | levels(count)
            missing = {k: v for k, v in wanted.items() if (solver, clip, count, k) not in done}
            if not missing:
                continue
            for needed in (count, *(item for item in missing.values() if isinstance(item, int))):
                if needed not in dense:
                    dense[needed] = run(clip, needed)
            whole, own_call = dense[count]
            for name, item in missing.items():
                result, call = dense[item] if isinstance(item, int) else run(clip, count, (item,))
                assert result.times is not None
                assert whole.times is not None
                append_line(out, {
                    "model": model, "solver": solver, "clip": clip, "steps": count, "setting": name,
                    "psnr": round(psnr(result.frames, whole.frames), 3),
                    "work": round(result.counts.blocks / whole.counts.blocks, 4),
                    "time": round(result.times.processor / whole.times.processor, 4), "call": round(call / own_call, 4),
                })  # fmt: skip
        print(f"clip {clip} of {model}, {solver}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["wan-tiny", "flux-tiny"])
    parser.add_argument("--solver", choices=["own", "unipc"], default="own")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--clips", type=int, nargs=2, default=(0, 16), help="from which to below which of them")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(options.model, options.solver, JUDGING[slice(*options.clips)], options.steps, options.out)
