"""Measure step caches at many numbers of steps: how near each stays to the model's own run, beside fewer steps.

    python eval/studies/preset_levels.py choose flux-tiny --out eval/results/preset-levels-choose-flux-tiny.jsonl
    python eval/studies/preset_levels.py judge flux-tiny --out eval/results/preset-levels-flux-tiny.jsonl

``choose`` runs `candidates`, ``judge`` the presets, on clips that chose nothing; ``--solver unipc`` adds that solver.
Each line is one setting at one number of steps on one clip: PSNR to the model's own dense run of as many steps by the
same solver, and as shares of that run's the blocks that ran and the processor seconds of the denoising loop and of the
whole call. Lines named ``dense M`` are runs of M steps held against the same run. What is there is not run again; all
runs on one thread.
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.model import ModelRun
from dit_accel_eval.runs.results import append_line, read_lines

from dit_accel import EasyCache, SeaCache
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.presets import LEVELS, PRESETS

STEPS = (8, 10, 12, 16, 20, 30, 50)
"""The numbers of steps at which levels are chosen and judged."""

FEWER = (8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 32, 36, 40)
"""Steps of the dense runs that levels are held against."""

CHOOSING = range(200, 216)
"""Clips on which levels are chosen, from the first on."""

JUDGING = range(320, 336)
"""Clips that judge them."""

HELD: dict[str, Any] = {"predictor": "hold", "stored": "output"}
LINE: dict[str, Any] = {"predictor": "taylor", "stored": "output", "reach": 0.035}
"""A line is followed one step in runs of 29 steps or more, two from 58 on; longer gaps are held."""

LINES = ((0.5, 0.03, 2), (0.35, 0.03, 1), (0.25, 0.06, 1), (0.25, 0.1, 1), (0.35, 0.03, 2), (0.25, 0.06, 2))
"""Warm-up, bound on steps skipped in a row at the run's end, and last steps computed."""

OTHERS = (
    ("held", HELD, 0.1, 0.25), ("held", HELD, 0.06, 0.25), ("held", HELD, 0.03, 0.35), ("held", HELD, 0.03, 0.5),
    ("line", LINE, 0.03, 0.25), ("line", LINE, 0.03, 0.5), ("heun", {**LINE, "predictor": "heun"}, 0.03, 0.5),
)  # fmt: skip
"""Forecasts, bounds and warm-ups that were tried before, with one last step."""


def candidates(steps: int) -> dict[str, MethodConfig]:
    """Return the caches that are tried in a run of so many steps, by name; of those that do the same the first."""
    usual: dict[str, Any] = {"threshold": 0.2, "growing": True}
    found = {
        f"line, {bound:g} after {warmup:g}, last {last}": EasyCache(
            **usual, **LINE, warmup_steps=warmup, last_steps=last, max_consecutive=bound
        )
        for warmup, bound, last in LINES
    } | {
        f"{words}, {bound:g} after {warmup:g}": EasyCache(
            **usual, **forecast, warmup_steps=warmup, last_steps=1, max_consecutive=bound
        )
        for words, forecast, bound, warmup in OTHERS
    }
    first = {
        (one.skipped_steps(steps), one.reached(steps) != 0 and one.predictor): name
        for name, one in reversed(found.items())
    }
    errors = {
        f"held, error {error:g}": EasyCache(error=error, warmup_steps=3, last_steps=1, **HELD)
        for error in (0.03, 0.04, 0.06, 0.09)
    }
    sea: dict[str, MethodConfig] = {
        f"line, seacache {threshold:g}": SeaCache(threshold=threshold, **LINE) for threshold in (0.15, 0.25)
    }
    return {**{name: found[name] for name in found if name in first.values()}, **errors, **sea}


def levels(steps: int) -> dict[str, MethodConfig]:
    """Return the step caches of the presets that skip any in a run of so many steps."""
    found = {level: PRESETS[level][0].config for level in LEVELS}
    return {level: config for level, config in found.items() if (getattr(config, "min_steps", None) or 0) <= steps}


def measure(model: str, solver: str, clips: Iterable[int], steps: Iterable[int], settings: Any, out: Path) -> None:
    """Run what the file lacks, a line each."""
    done = {(one["solver"], one["clip"], one["steps"], one["setting"]) for one in read_lines(out)}
    suite_model = EmbeddedModel(model, {})

    def run(clip: int, count: int, methods: tuple[MethodConfig, ...] = ()) -> tuple[ModelRun, float]:
        began = time.process_time()
        made = suite_model.run(clip, steps=count, solver=solver, methods=methods)
        return made, time.process_time() - began

    for clip in clips:
        dense: dict[int, tuple[ModelRun, float]] = {}
        for count in steps:
            wanted = {f"dense {fewer}": fewer for fewer in FEWER if fewer < count} | settings(count)
            missing = {k: v for k, v in wanted.items() if (solver, clip, count, k) not in done}
            if not missing:
                continue
            for needed in (count, *(one for one in missing.values() if isinstance(one, int))):
                if needed not in dense:
                    dense[needed] = run(clip, needed)
            own, own_call = dense[count]
            for name, one in missing.items():
                made, call = dense[one] if isinstance(one, int) else run(clip, count, (one,))
                assert made.times is not None
                assert own.times is not None
                append_line(out, {
                    "model": model, "solver": solver, "clip": clip, "steps": count, "setting": name,
                    "psnr": round(psnr(made.frames, own.frames), 3),
                    "work": round(made.counts.blocks / own.counts.blocks, 4),
                    "time": round(made.times.processor / own.times.processor, 4), "call": round(call / own_call, 4),
                })  # fmt: skip
        print(f"clip {clip} of {model}, {solver}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["choose", "judge"])
    parser.add_argument("model", choices=["wan-tiny", "flux-tiny"])
    parser.add_argument("--solver", choices=["own", "unipc"], default="own")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--clips", type=int, nargs=2, default=(0, 16), help="from which to below which of them")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clips = (CHOOSING if given.what == "choose" else JUDGING)[slice(*given.clips)]
    measure(given.model, given.solver, clips, given.steps, candidates if given.what == "choose" else levels, given.out)
