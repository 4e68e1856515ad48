"""Measures how a cache's forecasts and rules lead on choosing clips: `python eval/studies/forecasts.py wan-tiny`.

Each line is one setting on one clip: PSNR to the converged run, and the steps' work that ran. The table holds each
setting against the curve of `BASE` at its own work, clip by clip, with a 95 % t interval over the clips.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.reference import default_cache, reference_run
from scipy import stats
from study import study

from dit_accel import EasyCache, SeaCache
from dit_accel.methods.caches.easy import EasyHandler
from dit_accel.methods.caches.sea import filtered, on_grid

BASE = "easycache taylor"
"""The settings whose curve of PSNR over work the others are held against: of two thresholds and more each."""

TAYLOR: dict[str, Any] = {"predictor": "taylor"}
DAMPED: dict[str, Any] = {"predictor": "corrected"}

Setting = tuple[int, float | None, Any]
"""Steps, noise shift (None: the model's own) and the cache.

Of a name that begins with "spectral" EasyCache measures the latents behind SeaCache's filter.
"""

FALLING = (0.1, 0.07, 0.05, 0.03)

SETTINGS: dict[str, dict[str, Setting]] = {
    "wan-tiny": {
        **{f"easycache taylor {t:g}, 30": (30, None, EasyCache(threshold=t, **TAYLOR)) for t in FALLING},
        **{f"corrected damped {t:g}, 30": (30, None, EasyCache(threshold=t, **DAMPED)) for t in (0.1, 0.07, 0.05)},
        **{f"corrected damped {t:g}, 30, shift 8": (30, 8.0, EasyCache(threshold=t, **DAMPED)) for t in (0.1, 0.06)},
        **{f"error corrected damped {t:g}, 30": (30, None, EasyCache(error=t, **DAMPED)) for t in (0.1, 0.06)},
        "error 0.06, 30": (30, None, EasyCache(error=0.06, **TAYLOR)),
        "spectral taylor 0.03, 30": (30, None, EasyCache(threshold=0.03, **TAYLOR)),
        "sea 0.4, 20, shift 8": (20, 8.0, SeaCache(threshold=0.4, **TAYLOR)),
        "sea corrected damped 0.4, 30": (30, None, SeaCache(threshold=0.4, **DAMPED)),
        "sea corrected damped 0.4, 30, shift 8": (30, 8.0, SeaCache(threshold=0.4, **DAMPED)),
    },
    "flux-tiny": {
        **{f"easycache taylor {t:g}, 28": (28, None, EasyCache(threshold=t, **TAYLOR)) for t in FALLING},
        **{f"corrected damped {t:g}, 28": (28, None, EasyCache(threshold=t, **DAMPED)) for t in (0.1, 0.05)},
    },
}
"""Model -> setting -> how it is run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file lacks, and print the table; returns the exit code."""
    return study(
        __doc__, arguments, measure, table, out="forecasts-wan-tiny.jsonl", resumes=True,
        model="wan-tiny", first_clip=16, clips=4, only="",
    )  # fmt: skip


def measure(options: argparse.Namespace, known: Sequence[Line]) -> Iterator[Line]:
    """Give a line for each setting and clip that is not ``known``."""
    done = {(line["setting"], line["clip"]) for line in known if line["model"] == options.model}
    model = EmbeddedModel(options.model, {})
    for clip in range(options.first_clip, options.first_clip + options.clips):
        for name, (steps, shift, cache) in SETTINGS[options.model].items():
            if (name, clip) in done or options.only not in name:
                continue
            reference = reference_run(model, clip, default_cache())
            with filtered_latents() if name.startswith("spectral") else nullcontext():
                made = model.run(clip, steps=steps, solver="unipc", flow_shift=shift, methods=(cache,))
            work = made.counts.blocks / reference.step.blocks
            found = psnr(made.frames, reference.frames)
            yield {"model": options.model, "setting": name, "clip": clip, "work": round(work, 3),
                   "psnr": round(float(found), 3)}  # fmt: skip


@contextmanager
def filtered_latents() -> Iterator[None]:
    """Let EasyCache measure latents behind SeaCache's filter inside the block."""

    def latents(handler: EasyHandler, context: Any) -> Any:
        found, axes = on_grid(plain(handler, context).float(), context.layout, handler.model.adapter.grid)
        return filtered(found, axes, context.sigma, SeaCache().filled().power)

    plain = EasyHandler.latents
    with patch.object(EasyHandler, "latents", latents):
        yield


def table(lines: Sequence[Line]) -> str:
    """Return the mean work and PSNR of each setting, and what it leads the curve of `BASE` by at its own work."""
    by: dict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    for line in lines:
        by[line["model"], line["setting"]][line["clip"]] = line["work"], line["psnr"]
    rows = []
    for (model, name), runs in by.items():
        leads = []
        for clip, (work, found) in runs.items():
            base = sorted(
                one[clip] for (of, other), one in by.items() if of == model and other.startswith(BASE) and clip in one
            )
            if len(base) > 1 and base[0][0] <= work <= base[-1][0] and not name.startswith(BASE):
                works, levels = np.array(base).T
                leads.append(found - float(np.interp(work, works, levels)))
        works, found = np.mean([*runs.values()], axis=0)
        rows.append((model, name, len(runs), f"{works:.2f}", f"{found:.2f}", _interval(leads)))
    return markdown_table("model | setting | clips | work | PSNR, dB | against taylor, dB", rows)


def _interval(leads: Sequence[float]) -> str:
    if len(leads) < 2:
        return ""
    half = float(stats.t.ppf(0.975, len(leads) - 1) * np.std(leads, ddof=1) / len(leads) ** 0.5)
    return f"{np.mean(leads):+.2f} [{np.mean(leads) - half:+.2f}, {np.mean(leads) + half:+.2f}] on {len(leads)}"


if __name__ == "__main__":
    raise SystemExit(main())
