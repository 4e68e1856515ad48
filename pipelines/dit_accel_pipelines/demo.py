"""The demo: one prompt on the embedded model, dense, with Radial Attention, and dense with fewer steps, side by side.

Run it as ``python -m dit_accel_pipelines.demo --out demo``.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dit_accel import RadialAttention
from dit_accel.cli.console import OUT, TALK, plain_table
from dit_accel.estimate.estimate import estimate
from dit_accel.files import json_text, written_whole

from .generate import attached, run
from .generation import Generation
from .loading import load_pipeline
from .media import contact_sheet, upscale, write_media
from .progress import Stages
from .request import EMBEDDED_FPS, Request, settle
from .wan import WAN, WAN_TINY

PROMPT = "a red circle moving right on a navy background"
SCALE = 4
"""The embedded model's videos are tiny; the demo's files show every pixel 4 x 4 times."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of generating, and what it made: ``density`` is the kept share of the run's attention."""

    name: str
    steps: int
    density: float
    made: Generation
    psnr: float | None

    @property
    def seconds(self) -> float:
        """Seconds of the denoising loop."""
        return self.made.timings.denoise

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps."""
        return statistics.median(self.made.timings.steps)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the files; made if missing.")] = Path("demo"),
    prompt: Annotated[str, typer.Option(help="What to show.")] = PROMPT,
    num_frames: Annotated[int, typer.Option(help="Output frames.")] = 33,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 1,
) -> None:
    """Generate one prompt dense and accelerated from the same seed, compare, and write videos and a contact sheet."""
    out.mkdir(parents=True, exist_ok=True)
    asked = Request(
        prompts=(prompt,),
        output=out / "dense.mp4",
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        seed=seed,
    )
    request, *_ = settle(asked)
    with Stages() as stages:
        arms = compare(request, stages)
    for arm in arms:
        with written_whole(out / f"{arm.name}.mp4") as path:
            write_media(path, upscale(arm.made.frames, SCALE), fps=EMBEDDED_FPS)
    with written_whole(out / "comparison.png") as path:
        sheet = contact_sheet([upscale(arm.made.frames, SCALE) for arm in arms], [_label(arm) for arm in arms])
        sheet.save(path)
    with written_whole(out / "comparison.json") as path:
        path.write_text(json_text([_data(arm) for arm in arms]) + "\n", encoding="utf-8")
    _print(prompt, arms)
    TALK.print(f"written to {out}: {', '.join(f'{arm.name}.mp4' for arm in arms)}, comparison.png, comparison.json")


def compare(request: Request, stages: Stages) -> list[Arm]:
    """Generate a settled request's first prompt dense, with radial, and dense with the steps of radial's FLOPs."""
    stages.stage("loading")
    pipe = load_pipeline(request)
    run(pipe, request.prompts[0], dataclasses.replace(request, num_inference_steps=1))  # warms up, not measured

    def arm(name: str, steps: int, methods: tuple[Any, ...] = (), reference: Generation | None = None) -> Arm:
        changed = dataclasses.replace(request, num_inference_steps=steps)
        with attached(pipe, methods, request.backend) as attachment:
            made = run(pipe, request.prompts[0], changed, attachment=attachment, stages=stages)
        psnr = _psnr(made, reference) if reference else None
        return Arm(name=name, steps=steps, density=made.report.density if made.report else 1.0, made=made, psnr=psnr)

    steps = request.num_inference_steps or 1
    dense = arm("dense", steps)
    radial = arm("radial", steps, (RadialAttention(),), dense.made)
    return [dense, radial, arm("fewer-steps", equal_steps(request, radial.made), (), dense.made)]


def equal_steps(request: Request, made: Generation) -> int:
    """Return how many dense steps cost the FLOPs of a run with radial."""
    sizes = {name: getattr(request, name) for name in ("height", "width", "num_frames", "num_inference_steps")}
    radial = RadialAttention(**made.report.methods["radial"]) if made.report else RadialAttention()
    return max(1, round(estimate(WAN, WAN_TINY, methods=[radial], kernel_cost=1, **sizes).equal_steps))


def _psnr(made: Generation, reference: Generation) -> float:
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ours, theirs = (torch.from_numpy(one.frames.astype(np.float32)) for one in (made, reference))
    return float(peak_signal_noise_ratio(ours, theirs, data_range=255.0))


def _label(arm: Arm) -> str:
    return arm.name if arm.psnr is None else f"{arm.name} {_psnr_text(arm)}"


def _psnr_text(arm: Arm) -> str:
    if arm.psnr is None:
        return "-"
    return f"{arm.psnr:.1f} dB" if math.isfinite(arm.psnr) else "identical"


def _data(arm: Arm) -> dict[str, Any]:
    report = arm.made.report.to_dict() if arm.made.report else None
    values = {name: getattr(arm, name) for name in ("name", "steps", "density", "seconds", "seconds_per_step")}
    return {**values, "psnr": arm.psnr, "report": report}


def _print(prompt: str, arms: list[Arm]) -> None:
    numbers = ("density", "steps", "seconds", "s/step", "PSNR to dense")
    table = plain_table("", *numbers, right=numbers, title=prompt)
    for arm in arms:
        table.add_row(
            arm.name,
            f"{arm.density:.3f}",
            str(arm.steps),
            f"{arm.seconds:.2f}",
            f"{arm.seconds_per_step:.3f}",
            _psnr_text(arm),
        )
    OUT.print(table)
    OUT.print("density: computed share of the self-attention over the run", style="dim")
    OUT.print("fewer-steps: dense, with as many steps as radial's FLOPs pay for", style="dim")


if __name__ == "__main__":
    typer.run(main)
