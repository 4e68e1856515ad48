"""Measures how forecasts of late steps take a run off its own dense one: `python eval/studies/late_forecasts.py`.

On wan-tiny's choosing clips, one batch: the first steps are dense, then some are skipped by a list and forecast, so
that forecasts alone differ. Each line is one way to forecast: PSNR of its latents to those of the dense run, by clip.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_assets.clips import clip_of
from dit_accel_eval.runs.results import Line, markdown_table
from study import study
from torch import Tensor

from dit_accel.methods.caches.correction import SHARE
from dit_accel.rules.forecast import growth, taylor

LISTS = {"every third": "############..#..#..#..#..#..#"}
"""Name -> the steps of the run: # is computed, . forecast."""

GUIDANCE = 4.0


@dataclass(frozen=True)
class Point:
    """A computed step: its index, noise level, latents and guided output."""

    step: int
    sigma: float
    x: Tensor
    v: Tensor


Forecast = Callable[[Sequence[Point], int, float, Tensor], Tensor]
"""(computed steps, step, noise level, latents) -> output."""


def log_snr(step: int, sigma: float) -> float:
    """Return the solver's own variable."""
    return float(np.log((1 - sigma) / sigma)) if sigma < 1 else -9.0


VARIABLES = {"step": lambda step, sigma: float(step), "sigma": lambda step, sigma: sigma, "log-SNR": log_snr}

STORED = {
    "output": lambda sigma: 0.0,
    "residual": lambda sigma: -1.0,
    "clean": lambda sigma: -1 / sigma,
    "preconditioned": lambda sigma: -(2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2),
}
"""What is continued: the output plus this times the latents."""


def polynomial(
    points: Sequence[Point], step: int, sigma: float, x: Tensor, *, stored: str = "residual", variable: str = "step",
    order: int = 1, damping: float = 0.0,
) -> Tensor:  # fmt: skip
    """Taylor's forecast."""
    of, add = VARIABLES[variable], STORED[stored]
    used = points[-(order + 1) :]
    weights = taylor([of(one.step, one.sigma) for one in used], of(step, sigma), order, damping)
    made = sum(weight * (one.v + add(one.sigma) * one.x) for weight, one in zip(weights, used, strict=True))
    return made - add(sigma) * x


def fitted(points: Sequence[Point], step: int, sigma: float, x: Tensor) -> Tensor:
    """Taylor's line, damped by what would have fitted the last computed step best, by least squares and clip."""
    *before, last = points
    hold = polynomial(before, last.step, last.sigma, last.x, order=0)
    line = polynomial(before, last.step, last.sigma, last.x) - hold
    dims = [*range(1, x.dim())]
    share = ((last.v - hold) * line).sum(dims, keepdim=True) / (line**2).sum(dims, keepdim=True)
    held = polynomial(points, step, sigma, x, order=0)
    return held + share.clamp(0, 1) * (polynomial(points, step, sigma, x) - held)


def modes(points: Sequence[Point], step: int, sigma: float, x: Tensor) -> Tensor:
    """Dynamic mode decomposition of the last computed steps at equal distances; of fewer than four: Taylor's line."""
    gap, used = points[-1].step - points[-2].step, [points[-1]]
    for one in reversed(points[:-1]):
        if used[0].step - one.step != gap or len(used) == 6:
            break
        used.insert(0, one)
    if len(used) < 4:
        return polynomial(points, step, sigma, x)
    made = []
    for clip in range(len(x)):
        snapshots = torch.stack([(one.v - one.x)[clip].flatten() for one in used], dim=1).double()
        before, after = snapshots[:, :-1], snapshots[:, 1:]
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        kept = int((values > 1e-4 * values[0]).sum())
        left, values, right = left[:, :kept], values[:kept], right[:kept]
        small = left.T @ after @ right.T / values
        roots, vectors = np.linalg.eig(small.numpy())
        ahead = (step - used[-1].step) / gap
        power = (vectors * roots.astype(complex) ** ahead) @ np.linalg.inv(vectors)
        made.append((left @ torch.from_numpy(power.real) @ (left.T @ snapshots[:, -1])).float().view(x.shape[1:]))
    return torch.stack(made) + x


WAYS: dict[str, tuple[Forecast, bool]] = {
    "hold": (partial(polynomial, order=0), False),
    "taylor": (polynomial, False),
    "taylor, order 2": (partial(polynomial, order=2), False),
    "taylor of the output": (partial(polynomial, stored="output"), False),
    "taylor in sigma": (partial(polynomial, variable="sigma"), False),
    "taylor in log-SNR": (partial(polynomial, variable="log-SNR"), False),
    "clean prediction in log-SNR (the solver's)": (partial(polynomial, stored="clean", variable="log-SNR"), False),
    "preconditioned output in log-SNR": (partial(polynomial, stored="preconditioned", variable="log-SNR"), False),
    "DMD": (modes, False),
    "taylor, damping by least squares": (fitted, False),
    "taylor, damping .2": (partial(polynomial, damping=0.2), False),
    "taylor corrected": (polynomial, True),
    "taylor corrected, damping .2": (partial(polynomial, damping=0.2), True),
}
"""Name -> the forecast, and whether computed steps are corrected for the skipped ones before, as `Correction` does."""


class Runs:
    """wan-tiny on some clips at once, its guided outputs step by step."""

    def __init__(self, clips: range) -> None:
        self.pipe: Any = WanPipeline.from_pretrained(model_path("wan-tiny"), dtype=torch.float32)
        prompts = [clip_of(clip, held_out=True)[0] for clip in clips]
        self.texts = torch.cat(self.pipe.encode_prompt(prompts, None, True))
        channels = self.pipe.transformer.config.in_channels
        self.noise = torch.cat([
            self.pipe.prepare_latents(
                1, channels, 64, 64, 17, torch.float32, "cpu", torch.Generator().manual_seed(clip)
            )
            for clip in clips
        ])  # fmt: skip

    def output(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the guided output."""
        given = self.pipe.transformer(
            torch.cat([x, x]), time.expand(2 * len(x)), encoder_hidden_states=self.texts, return_dict=False
        )[0]
        wanted, other = given.chunk(2)
        return other + GUIDANCE * (wanted - other)

    def dense(self, steps: int, until: int) -> tuple[Tensor, tuple[Any, list[Point], Tensor]]:
        """Return the end of a dense run, and scheduler, points and latents as they were before a step."""
        scheduler, x, points, kept = copy.deepcopy(self.pipe.scheduler), self.noise, [], None
        scheduler.set_timesteps(steps)
        for step, time in enumerate(scheduler.timesteps):
            if step == until:
                kept = copy.deepcopy(scheduler), [*points], x
            v = self.output(x, time)
            points.append(Point(step, float(scheduler.sigmas[step]), x, v))
            x = scheduler.step(v, time, x, return_dict=False)[0]
        assert kept is not None
        return x, kept

    def skipping(
        self, drawn: str, start: tuple[Any, list[Point], Tensor], forecast: Forecast, corrected: bool
    ) -> Tensor:
        """Return the end of a run that goes on from a step with forecasts."""
        (scheduler, points, x), skipped = copy.deepcopy(start), []
        levels = [float(sigma) for sigma in scheduler.sigmas]
        for step in range(drawn.index("."), len(drawn)):
            time, sigma = scheduler.timesteps[step], levels[step]
            if drawn[step] == ".":
                given = forecast(points, step, sigma, x)
                skipped.append(step)
            else:
                v = given = self.output(x, time)
                if skipped and corrected:
                    known = [float(one.step) for one in points[-2:]]
                    moved = sum(growth(known, one) * (levels[one] - levels[one + 1]) for one in skipped)
                    width = sigma if step == len(drawn) - 1 else levels[step - 1] - sigma
                    off = v - forecast(points, step, sigma, x)
                    given = v + SHARE * moved / growth(known, step) / width * off
                points, skipped = [*points, Point(step, sigma, x, v)], []
            x = scheduler.step(given, time, x, return_dict=False)[0]
        return x


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file lacks, and print the table; returns the exit code."""
    return study(__doc__, arguments, measure, table, out="late-forecasts.jsonl", resumes=True, first_clip=16, clips=4)


@torch.no_grad()
def measure(options: argparse.Namespace, known: Sequence[Line]) -> Iterator[Line]:
    """Give a line for each list and way that is not ``known``."""
    done = {(line["list"], line["forecast"]) for line in known}
    if len(done) == len(LISTS) * len(WAYS):
        return
    runs = Runs(range(options.first_clip, options.first_clip + options.clips))
    first = next(iter(LISTS.values()))
    whole, start = runs.dense(len(first), first.index("."))
    for name, drawn in LISTS.items():
        for way, (forecast, corrected) in WAYS.items():
            if (name, way) not in done:
                made = runs.skipping(drawn, start, forecast, corrected)
                errors = (made - whole).square().flatten(1).mean(1)
                found = [round(float(-10 * error.log10()), 3) for error in errors]
                yield {"list": name, "forecast": way, "first_clip": options.first_clip, "psnr": found}


def table(lines: Sequence[Line]) -> str:
    """Return each way's mean, and what it leads Taylor's line by."""
    base = {line["list"]: np.array(line["psnr"]) for line in lines if line["forecast"] == "taylor"}
    rows = []
    for line in lines:
        lead = np.array(line["psnr"]) - base[line["list"]]
        rows.append((line["list"], line["forecast"], f"{np.mean(line['psnr']):.2f}", f"{lead.mean():+.2f}",
                     " ".join(f"{one:+.1f}" for one in lead)))  # fmt: skip
    return markdown_table("computed | forecast | PSNR of latents, dB | against taylor | clip by clip", rows)


if __name__ == "__main__":
    raise SystemExit(main())
