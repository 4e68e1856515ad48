"""Choose the caches that judge the presets: settings of ours, cache-dit's and diffusers' caches, on choosing clips.

    python eval/studies/choose_caches.py wan-tiny --out eval/results/choose-caches-wan-tiny.jsonl

Each line is one setting on one clip: PSNR to the model's own dense run of as many steps, and processor seconds of the
denoising loop beside that run's, on one thread. What is there is not run again. The table at the end gives for each of
our settings the best of the others that take no more than `SLACK` of its time. Needs the extra ``eval``.
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.loaded import EmbeddedModel

from dit_accel import EasyCache, SeaCache
from dit_accel.methods.caches.native import DiffusersCache

STEPS = {"wan-tiny": 30, "flux-tiny": 28}
CLIPS = range(4)
GROWING_CLIPS = {"flux-tiny": 16, "wan-tiny": 4}
"""Model -> clips on which caches with a growing bound were tried, from the first on."""

SLACK = 1.05

OURS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2)
"""Thresholds of EasyCache with Heun's predictor."""

MASKS = ("slow", "medium", "fast", "ultra")
"""cache-dit's own masks of the steps that are computed."""

BINS = {
    "flux-tiny": {
        "19 of 28": ((8, 3, 3, 3, 1, 1), (1, 2, 2, 2, 2)),
        "17 of 28": ((7, 3, 2, 2, 2, 1), (1, 3, 3, 2, 2)),
        "13 of 28": ((6, 1, 2, 1, 2, 1), (1, 3, 4, 4, 3)),
    },
    "wan-tiny": {"15 of 30": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 4, 4))},
}
"""Model -> masks of the same kind, of about the time of a level of ours: steps computed, steps skipped."""

GROWING: tuple[tuple[float, int, Literal["heun", "hold"], int], ...] = (
    (0.5, 2, "heun", 2), (0.5, 3, "heun", 1), (0.5, 3, "hold", 1), (0.4, 2, "heun", 1), (0.4, 2, "hold", 1),
    (0.35, 3, "heun", 1), (0.35, 3, "hold", 1), (0.35, 3, "heun", 2), (0.3, 4, "heun", 1), (0.3, 4, "hold", 1),
    (0.25, 4, "hold", 1), (0.3, 3, "hold", 1), (0.3, 3, "heun", 2),
)  # fmt: skip
"""Warm-up, bound, predictor and last steps of caches whose bound on skips in a row grows, as the presets' does."""

CONTINUED: dict[str, dict[str, Any]] = {
    "hold": {},
    "taylor": {"predictor": "taylor"},
    "corrected": {"predictor": "corrected"},
}
"""How steps that are skipped are continued -> options."""


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Return name -> options of `SuiteModel.run`."""
    steps = STEPS[model]
    found: dict[str, dict[str, Any]] = {}
    for threshold in OURS:
        found[f"easycache {threshold:g}"] = {
            "methods": (EasyCache(threshold=threshold, predictor="heun", min_steps=10),)
        }
    found["cache-dit, default"] = {"rival": {"cache-dit": {}}}
    usual = {"enable_separate_cfg": True, "max_warmup_steps": 3}
    for blocks, order, threshold in itertools.product((1, 2), (None, 1, 2), (0.03, 0.06, 0.12, 0.18, 0.24, 0.4)):
        options = {**usual, "Fn_compute_blocks": blocks, "residual_diff_threshold": threshold}
        found[f"cache-dit, F{blocks} taylor {order} {threshold:g}"] = {"rival": {"cache-dit": _with(options, order)}}
    for mask, policy, order in itertools.product(MASKS, ("dynamic", "static"), (None, 1)):
        options = {**usual, "Fn_compute_blocks": 1, "residual_diff_threshold": 0.3, "steps_computation_policy": policy,
                   "steps_computation_mask": _mask(mask, steps)}  # fmt: skip
        found[f"cache-dit, {mask} {policy} taylor {order}"] = {"rival": {"cache-dit": _with(options, order)}}
    for (name, bins), order in itertools.product(BINS[model].items(), (None, 1)):
        options = {**usual, "Fn_compute_blocks": 1, "residual_diff_threshold": 0.3,
                   "steps_computation_policy": "static", "steps_computation_mask": _mask_of(bins, steps)}  # fmt: skip
        found[f"cache-dit, {name} static taylor {order}"] = {"rival": {"cache-dit": _with(options, order)}}
    for warmup, bound, predictor, last in GROWING:
        stored = "output" if predictor == "hold" else "residual"
        config = EasyCache(
            threshold=0.2, predictor=predictor, stored=stored, warmup_steps=warmup, max_consecutive=bound,
            last_steps=last, growing=True, min_steps=10,
        )  # fmt: skip
        found[f"easycache growing, {warmup:g} {bound} {predictor}, last {last}"] = {"methods": (config,)}
    for threshold, how in itertools.product((0.05, 0.1, 0.15, 0.2, 0.3), CONTINUED):
        name = f"seacache {how} {threshold:g}"
        found[name] = {"methods": (SeaCache(threshold=threshold, min_steps=10, **CONTINUED[how]),)}
    for warmup, bound, last in ((0.5, 2, 2), (0.3, 3, 2), (0.25, 4, 1)):
        config = EasyCache(
            threshold=0.2, warmup_steps=warmup, max_consecutive=bound, last_steps=last, growing=True, min_steps=10,
            **CONTINUED["corrected"],
        )  # fmt: skip
        found[f"easycache growing, {warmup:g} {bound} corrected, last {last}"] = {"methods": (config,)}
    native = [
        *(diffusers.FirstBlockCacheConfig(threshold=threshold) for threshold in (0.02, 0.05, 0.1)),
        *(diffusers.SeaCacheConfig(threshold=threshold) for threshold in (0.1, 0.25)),
        *(
            diffusers.TaylorSeerCacheConfig(
                cache_interval=every, disable_cache_before_step=3, max_order=1, use_lite_mode=True
            )
            for every in (2, 3)
        ),
    ]
    for config in native:
        value = getattr(config, "threshold", None) or getattr(config, "cache_interval", None)
        found[f"diffusers, {type(config).__name__} {value}"] = {"methods": (DiffusersCache(config=config),)}
    for share in (0.35, 0.45, 0.55, 0.65, 0.75, 0.85):
        found[f"dense {round(share * steps)}"] = {"steps": round(share * steps)}
    return found


def _with(options: dict[str, Any], order: int | None) -> dict[str, Any]:
    return options if order is None else {**options, "taylorseer_order": order}


def _mask(policy: str, steps: int) -> list[int]:
    import cache_dit

    return cache_dit.steps_mask(total_steps=steps, mask_policy=policy)


def _mask_of(bins: tuple[tuple[int, ...], tuple[int, ...]], steps: int) -> list[int]:
    import cache_dit

    computed, skipped = map(list, bins)
    return cache_dit.steps_mask(compute_bins=computed, cache_bins=skipped, total_steps=steps)


def measure(model: str, out: Path) -> list[dict[str, Any]]:
    """Run what the file lacks, a line each, and return all lines."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(line["setting"], line["clip"]) for line in lines}
    steps, suite_model = STEPS[model], EmbeddedModel(model, {})
    for clip in range(GROWING_CLIPS[model]):
        wanted = [name for name in settings(model) if clip in CLIPS or "growing" in name]
        missing = {name: one for name, one in settings(model).items() if name in wanted and (name, clip) not in done}
        if not missing:
            continue
        dense = suite_model.run(clip, steps=steps, solver="unipc")
        for name, options in missing.items():
            try:
                made = suite_model.run(clip, **{"steps": steps, "solver": "unipc", **options})
            except (ValueError, AttributeError, TypeError) as error:  # of another project on this model
                print(f"{name}: {error}")
                continue
            assert made.times is not None
            assert dense.times is not None
            lines.append(
                {
                    "model": model,
                    "setting": name,
                    "clip": clip,
                    "psnr": round(psnr(made.frames, dense.frames), 4),
                    "forwards": round(made.counts.blocks / dense.counts.blocks, 4),
                    "time": round(made.times.processor / dense.times.processor, 4),
                }
            )
            with out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
        print(f"clip {clip} of {GROWING_CLIPS[model]}", flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Return the mean of each setting, and for each of ours the best other within its time."""
    by: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by[line["setting"]].append(line)
    means = {
        name: tuple(statistics.fmean(line[key] for line in found) for key in ("psnr", "time", "forwards"))
        for name, found in by.items()
    }
    rows = [f"{name:40s} {one[0]:6.1f} dB {one[1]:.3f} of the time, {one[2]:.3f} of the blocks" for name, one in
            sorted(means.items(), key=lambda item: item[1][1])]  # fmt: skip
    for name, (decibels, time, _) in means.items():
        if not name.startswith(("easycache", "seacache")):
            continue
        for kind in ("cache-dit", "diffusers", "dense"):
            within = [
                (one[0], other) for other, one in means.items() if other.startswith(kind) and one[1] <= SLACK * time
            ]
            best, other = max(within, default=(0.0, "none"))
            rows.append(f"{name} ({decibels:.1f} dB at {time:.2f}): best of {kind} {other} {best:.1f} dB")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*STEPS])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(table(measure(given.model, given.out)))
