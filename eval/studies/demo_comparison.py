"""What the demo runs: a prompt dense, accelerated, and dense with the steps of as much time.

All are held against the converged run of the same seed. The settings were chosen on other prompts than the demo's.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo_references
import numpy as np
import torch
from dit_accel_assets import held_out_prompts
from dit_accel_eval.metrics.metric import Clip
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.conditions import processor
from dit_accel_eval.runs.counting import work
from dit_accel_eval.runs.loaded import EmbeddedModel, check_name, tuning_request
from dit_accel_eval.runs.model import Run
from dit_accel_eval.statistics import FEWEST, estimate, judge
from dit_accel_eval.suites.arms import Arm, dense_arm
from dit_accel_eval.suites.reference import Reference
from dit_accel_pipelines.generation.media import Frames, to_uint8, upscale, write_media
from dit_accel_pipelines.generation.request import EMBEDDED_FPS, settle
from dit_accel_pipelines.generation.threads import one_thread

from dit_accel import EasyCache
from dit_accel.cli.console import OUT, TALK, plain_table
from dit_accel.cli.stopping import keeps
from dit_accel.files import held, json_text, new_folder, written_whole

PROMPT = 25
"""Number of the held-out prompt; the suites run those from 0 to 15."""

DENSE = dense_arm(20)
ACCELERATED = Arm(
    name="easycache", num_inference_steps=30, methods=(EasyCache(threshold=0.1, predictor="taylor", order=1),)
)
"""What is shown: of the suite `caches-wan-tiny` the arm of least work that comes as near to converged as `DENSE`.

The demo's prompt is none of the suite's.
"""

SCALE, AMPLIFIED = 3, 5
"""How large a pixel is in the pictures, and how many times larger the differences in the strip."""

LINE = 16
"""Height of a line of text, in pixels of the picture."""

SHADES = 16
"""Steps in brightness that the animated picture tells apart: finer noise would make up most of its bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an arm made, one entry a seed: its runs, their PSNR to the converged run, their work in dense steps."""

    name: str
    arm: Arm
    runs: tuple[Run, ...]
    psnr: tuple[float, ...]
    work: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median seconds of the denoising loop."""
        return float(np.median([run.seconds for run in self.runs]))


def make(out: Path, name: str, prompt: str | None, seeds: int, num_frames: int | None, *, anew: bool) -> None:
    """Generate one prompt dense, accelerated, and dense in the same time; compare, and write the pictures.

    The arguments are the options of the command in `demo`.
    """
    check_name(name)
    text = held_out_prompts(name, PROMPT + 1)[PROMPT] if prompt is None else prompt
    settle(tuning_request(prompts=(text,), model=name, num_frames=num_frames))
    with new_folder(out), held(out, "the demo's folder"), one_thread(embedded=True):
        keeps(f"the converged runs that are done stand in {out}, and the same command goes on there")
        call = {} if num_frames is None else {"num_frames": num_frames}
        requested = (name, call, text)
        model = EmbeddedModel(*requested)
        committed = None if anew else demo_references.COMMITTED
        references = demo_references.references(requested, model, seeds, out / "references", committed=committed)
        if anew:
            demo_references.write(out / "references.npz", model, references)
        _write(out, model, references, compare(model, references))


def _write(out: Path, model: EmbeddedModel, references: Sequence[Reference], outcomes: Sequence[Outcome]) -> None:
    """Write the pictures and figures, and print the table."""
    shown = []
    for one in outcomes:
        figures = f"{one.runs[0].seconds:.1f} s, {one.psnr[0]:.1f} dB"
        shown.append((f"{one.name}, {one.arm.num_inference_steps} steps\n{figures}", one.runs[0].frames))
    frames = side_by_side(shown, references[0].frames)
    for name, pictures in (("comparison.mp4", frames), ("comparison.gif", frames // SHADES * SHADES)):
        with written_whole(out / name) as path:
            write_media(path, pictures, fps=EMBEDDED_FPS)
    with written_whole(out / "comparison.json") as path:
        path.write_text(json_text(_data(model, references, outcomes)) + "\n", encoding="utf-8")
    _print(model.prompt(0), references, outcomes)
    TALK.print(f"written to {out}: comparison.mp4, comparison.gif, comparison.json")


def compare(model: EmbeddedModel, references: Sequence[Reference]) -> list[Outcome]:
    """Run every seed dense and accelerated, one after the other, and dense with as many steps as took as long.

    That number is by the median of each seed's two times, so that no pause of the machine decides it, and rounded up,
    in favour of fewer steps.
    """
    model.run(0, steps=1, solver=DENSE.solver)  # warms up
    pairs = []
    for seed in range(len(references)):
        TALK.print(f"seed {seed}: dense and {ACCELERATED.name}")
        pairs.append([_run(model, arm, seed) for arm in (DENSE, ACCELERATED)])
    denses, accelerated = zip(*pairs, strict=True)
    dense = _outcome("dense", DENSE, denses, references, model)
    ours = _outcome(ACCELERATED.name, ACCELERATED, accelerated, references, model)
    share = np.median([mine.seconds / whole.seconds for whole, mine in pairs])
    steps = max(1, math.ceil(DENSE.num_inference_steps * share))
    fewer = dense_arm(steps)
    TALK.print(f"{ACCELERATED.name} took the time of {steps} dense steps")
    fewers = [_run(model, fewer, seed) for seed in range(len(references))]
    return [dense, _outcome("fewer steps", fewer, fewers, references, model), ours]


def side_by_side(shown: Sequence[tuple[str, Clip]], reference: Clip) -> Frames:
    """Return frames uint8: the clips side by side under their names, below each its amplified distance from a clip.

    Args:
        shown: (name, clip) of each; all [F, height, width, 3] in [0, 1], as the reference is.
        reference: what the differences are taken from.
    """
    columns = []
    for label, clip in shown:
        strip = AMPLIFIED * np.abs(clip - reference)
        parts = [_text(label, clip), upscale(to_uint8(clip), SCALE)]
        parts += [_text(f"{AMPLIFIED}x difference to converged", clip), upscale(to_uint8(strip), SCALE)]
        columns.append(np.concatenate(parts, axis=1))
    return np.concatenate(columns, axis=2)


def _text(text: str, clip: Clip) -> Frames:
    """Return a text, one line or several, above every frame of a clip."""
    from PIL import Image, ImageDraw, ImageFont

    box = Image.new("RGB", (clip.shape[2] * SCALE, LINE * (text.count("\n") + 1) + LINE // 2), "white")
    font, middle = ImageFont.load_default(size=12), (box.width // 2, box.height // 2)
    ImageDraw.Draw(box).multiline_text(middle, text, fill="black", font=font, anchor="mm", align="center")
    return np.broadcast_to(np.asarray(box), (len(clip), box.height, box.width, 3))


def _run(model: EmbeddedModel, arm: Arm, seed: int) -> Run:
    return model.run(seed, steps=arm.num_inference_steps, solver=arm.solver, methods=arm.methods)


def _outcome(
    name: str, arm: Arm, runs: Sequence[Run], references: Sequence[Reference], model: EmbeddedModel
) -> Outcome:
    both = list(zip(runs, references, strict=True))
    works = tuple(work(run.counts, reference.step, run.attended, model.own_share) for run, reference in both)
    psnrs = tuple(psnr(run.frames, reference.frames) for run, reference in both)
    return Outcome(name=name, arm=arm, runs=tuple(runs), psnr=psnrs, work=works)


def _data(model: EmbeddedModel, references: Sequence[Reference], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    arms = [
        {"arm": one.name, **one.arm.to_dict(), "psnr": one.psnr, "work": one.work,
         "seconds": [run.seconds for run in one.runs]}
        for one in outcomes
    ]  # fmt: skip
    found = [{"steps": one.steps, "agreement": one.agreement} for one in references]
    return {
        "model": model.name, "prompt": model.prompt(0), "call": model.call, "device": processor(),
        "threads": torch.get_num_threads(), "references": found, "arms": arms,
    }  # fmt: skip


def _print(prompt: str, references: Sequence[Reference], outcomes: Sequence[Outcome]) -> None:
    """Print the table: means over the seeds, with 95 % intervals, and each arm against fewer steps seed by seed."""
    columns = ("steps", "work", "seconds", "PSNR to converged, dB (median)", "against fewer steps, dB (median)")
    table = plain_table("", *columns, right=columns, title=prompt)
    _, fewer, _ = outcomes
    judged = judge({
        one.name: [own - rival for own, rival in zip(one.psnr, fewer.psnr, strict=True)]
        for one in outcomes if one is not fewer
    })  # fmt: skip
    for one in outcomes:
        cells = [str(one.arm.num_inference_steps), f"{np.mean(one.work):.1f}", f"{one.seconds:.2f}"]
        cells += [estimate(one.psnr).cell(), judged[one.name].judged() if one.name in judged else ""]
        table.add_row(one.name, *cells)
    OUT.print(table)
    steps, agreements = max(one.steps for one in references), [one.agreement for one in references]
    OUT.print(
        f"{len(references)} seeds, intervals and verdicts from {FEWEST} on; work in dense steps; "
        f"converged: at most {steps} steps, which agree with half as many to {min(agreements):.0f} dB or more",
        style="dim",
    )
