"""The demo: a prompt dense, by a preset, and dense with the steps of as much time: `python eval/studies/demo.py`.

Both are held against the dense run of the same seed. What is shown was chosen by rule, before it ran: the preset that
saves most, and of the choosing prompts on which its setting was picked the one where it comes out in the middle.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from dit_accel_assets import held_out_prompts
from dit_accel_eval.metrics.metric import Clip
from dit_accel_eval.metrics.pixels import psnr
from dit_accel_eval.runs.counting import work
from dit_accel_eval.runs.loaded import EmbeddedModel, OwnClips, processor_name, tuning_request
from dit_accel_eval.runs.model import ModelRun
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.statistics import FEWEST, clip_mean, judge
from dit_accel_eval.suites.arms import Arm, dense_arm
from dit_accel_pipelines.generation.media import Frames, to_uint8, upscale, write_media
from dit_accel_pipelines.generation.request import EMBEDDED_FPS, resolve
from dit_accel_pipelines.generation.threads import one_thread
from report_tables import over_prompts

from dit_accel import ConfigError
from dit_accel.adapters.embedded import embedded_names
from dit_accel.cli import run_alone
from dit_accel.cli.console import OUT, TALK, plain_table
from dit_accel.errors import did_you_mean
from dit_accel.files import held, json_text, new_folder, written_whole
from dit_accel.methods.presets import PRESETS, Level

RESULTS = Path(__file__).parents[1] / "results"

LEVEL: Level = "fast"
"""The preset that is shown."""

DENSE = dense_arm(30)

SCALE, AMPLIFIED = 3, 5
"""How large a pixel is in the pictures, and how many times larger the differences in the strip."""

LINE, SHADES = 16, 16
"""Pixels of a line of text; brightnesses of the animated picture: finer noise would make up most of its bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an arm made, one entry a seed: its runs, their PSNR to the dense run, their work in dense steps."""

    name: str
    arm: Arm
    runs: tuple[ModelRun, ...]
    psnr: tuple[float, ...]
    work: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median seconds of the denoising loop."""
        return float(np.median([run.seconds for run in self.runs]))


def shown_prompt(name: str) -> str:
    """Return the prompt of the choosing clip on which the preset's cache had the upper median of its PSNRs."""
    cache = PRESETS[LEVEL][0].config.to_dict()
    kind = f"line, {cache['max_consecutive']:g} after {cache['warmup_steps']:g}, last {cache['last_steps']}"
    key = kind, DENSE.num_inference_steps, name
    every = read_lines(RESULTS / f"preset-levels-choose-{name}.jsonl")
    lines = [line for line in every if (line["setting"], line["steps"], line["model"]) == key]
    middle = sorted(lines, key=lambda line: line["psnr"])[len(lines) // 2]["clip"]
    return held_out_prompts(name, middle + 1)[middle]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the files; made if missing.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Name of an embedded model.")] = "wan-tiny",
    prompt: Annotated[str | None, typer.Option(help="What to show; default: a choosing prompt, by rule.")] = None,
    seeds: Annotated[
        int, typer.Option(help="Seeds of the noise, from 0; the pictures show the one of median lead.", min=1, max=1000)
    ] = 6,
    num_frames: Annotated[int | None, typer.Option(help="Output frames; default: the model's own.")] = None,
) -> None:
    """Generate one prompt dense, by a preset, and dense in the same time; compare, and write the pictures."""
    if model not in embedded_names():
        raise ConfigError(f"{model!r} is no embedded model; {did_you_mean(model, embedded_names())}")
    text = shown_prompt(model) if prompt is None else prompt
    resolve(tuning_request(prompts=(text,), model=model, num_frames=num_frames))
    with new_folder(out), held(out, "the demo's folder"), one_thread(embedded=True):
        clips = OwnClips(prompts=(text,), seeds=tuple(range(seeds)))
        loaded = EmbeddedModel(model, {} if num_frames is None else {"num_frames": num_frames}, clips)
        _write(out, loaded, compare(loaded, seeds))


def _write(out: Path, model: EmbeddedModel, outcomes: Sequence[Outcome]) -> None:
    """Write the pictures, of the seed of median lead, and the figures, and print the table."""
    _, fewer, ours = outcomes
    seed = middle_seed(ours, fewer)
    shown = []
    for outcome in outcomes:
        figures = f"{outcome.runs[seed].seconds:.1f} s" + (f", {outcome.psnr[seed]:.1f} dB" if outcome.psnr else "")
        shown.append((f"{outcome.name}, {outcome.arm.num_inference_steps} steps\n{figures}", outcome.runs[seed].frames))
    frames = side_by_side(shown, outcomes[0].runs[seed].frames)
    for name, pictures in (("comparison.mp4", frames), ("comparison.gif", frames // SHADES * SHADES)):
        with written_whole(out / name) as path:
            write_media(path, pictures, fps=EMBEDDED_FPS)
    with written_whole(out / "comparison.json") as path:
        path.write_text(json_text(_data(model, outcomes, seed)) + "\n", encoding="utf-8")
    _print(model, outcomes)
    TALK.print(f"written to {out}: comparison.mp4, comparison.gif (of seed {seed}), comparison.json")


def middle_seed(ours: Outcome, fewer: Outcome) -> int:
    """Return the seed whose lead over fewer steps is the median one, of two alike the smaller lead."""
    leads = [psnr - rival for psnr, rival in zip(ours.psnr, fewer.psnr, strict=True)]
    return sorted(range(len(leads)), key=lambda seed: leads[seed])[(len(leads) - 1) // 2]


def compare(model: EmbeddedModel, seeds: int) -> list[Outcome]:
    """Run every seed dense and by the preset, one after the other, and dense with as many steps as took as long.

    That number is by the median of each seed's two times, and rounded up, in favour of fewer steps.
    """
    cache = PRESETS[LEVEL][0].config  # all that the preset takes at this size
    preset = Arm(name=f"preset {LEVEL}", num_inference_steps=DENSE.num_inference_steps, methods=(cache,))
    model.run(0, steps=1, solver=DENSE.solver)  # warms up
    pairs = []
    for seed in range(seeds):
        TALK.print(f"seed {seed}: dense and {preset.name}")
        pairs.append([_run(model, arm, seed) for arm in (DENSE, preset)])
    dense, ours = zip(*pairs, strict=True)
    share = np.median([mine.seconds / whole.seconds for whole, mine in pairs])
    fewer = dense_arm(max(1, math.ceil(DENSE.num_inference_steps * share)))
    mine, whole = (f"{np.median([run.seconds for run in runs]):.2f} s" for runs in (ours, dense))
    TALK.print(f"{preset.name} denoised in {mine}, {DENSE.num_inference_steps} dense steps in {whole}; now "
               f"{fewer.num_inference_steps} dense steps, which take as long")  # fmt: skip
    fewers = [_run(model, fewer, seed) for seed in range(seeds)]
    whole = Outcome(name="dense", arm=DENSE, runs=dense, psnr=(), work=(float(DENSE.num_inference_steps),) * seeds)
    rest = (("fewer steps", fewer, fewers), (preset.name, preset, ours))
    return [whole, *(_outcome(*entry, dense, model) for entry in rest)]


def side_by_side(shown: Sequence[tuple[str, Clip]], reference: Clip) -> Frames:
    """Return frames uint8: named clips side by side, below each its amplified distance from a reference."""
    columns = []
    for label, clip in shown:
        strip = AMPLIFIED * np.abs(clip - reference)
        parts = [_text(label, clip), upscale(to_uint8(clip), SCALE)]
        parts += [_text(f"{AMPLIFIED}x difference to dense", clip), upscale(to_uint8(strip), SCALE)]
        columns.append(np.concatenate(parts, axis=1))
    return np.concatenate(columns, axis=2)


def _text(text: str, clip: Clip) -> Frames:
    """Return a text, one line or several, above every frame of a clip."""
    from PIL import Image, ImageDraw, ImageFont

    box = Image.new("RGB", (clip.shape[2] * SCALE, LINE * (text.count("\n") + 1) + LINE // 2), "white")
    font, middle = ImageFont.load_default(size=12), (box.width // 2, box.height // 2)
    ImageDraw.Draw(box).multiline_text(middle, text, fill="black", font=font, anchor="mm", align="center")
    return np.broadcast_to(np.asarray(box), (len(clip), box.height, box.width, 3))


def _run(model: EmbeddedModel, arm: Arm, seed: int) -> ModelRun:
    return model.run(seed, steps=arm.num_inference_steps, solver=arm.solver, methods=arm.methods)


def _outcome(name: str, arm: Arm, runs: Sequence[ModelRun], dense: Sequence[ModelRun], model: EmbeddedModel) -> Outcome:
    both, steps = list(zip(runs, dense, strict=True)), DENSE.num_inference_steps
    works = tuple(work(run.counts, whole.counts / steps, run.attended, model.own_share) for run, whole in both)
    psnrs = tuple(psnr(run.frames, whole.frames) for run, whole in both)
    return Outcome(name=name, arm=arm, runs=tuple(runs), psnr=psnrs, work=works)


def _data(model: EmbeddedModel, outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    arms = [
        {"arm": out.name, **out.arm.to_dict(), "psnr": out.psnr, "work": out.work,
         "seconds": [run.seconds for run in out.runs],
         "call_seconds": [run.times and run.times.text + run.times.denoise + run.times.decode for run in out.runs]}
        for out in outcomes
    ]  # fmt: skip
    figures = over_prompts(RESULTS.parents[1], model.name, LEVEL)
    return {
        "over_prompts": figures and dataclasses.asdict(figures),
        "model": model.name, "prompt": model.prompt(0), "call": model.call, "device": processor_name(),
        "threads": torch.get_num_threads(), "shown_seed": seed, "arms": arms,
    }  # fmt: skip


def _print(model: EmbeddedModel, outcomes: Sequence[Outcome]) -> None:
    """Print the table: means over the seeds, with 95 % intervals, and the preset against fewer steps seed by seed."""
    columns = ("steps", "work", "seconds", "PSNR to dense, dB (median)", "against fewer steps, dB (median)")
    table = plain_table("", *columns, right=columns, title=model.prompt(0))
    _, fewer, ours = outcomes
    lead = judge({ours.name: [psnr - rival for psnr, rival in zip(ours.psnr, fewer.psnr, strict=True)]})
    for out in outcomes:
        cells = [str(out.arm.num_inference_steps), f"{np.mean(out.work):.1f}", f"{out.seconds:.2f}"]
        cells += [clip_mean(out.psnr).cell() if out.psnr else "", lead[out.name].judged() if out is ours else ""]
        table.add_row(out.name, *cells)
    OUT.print(table)
    below = "work in dense steps, seconds of the denoising loop"
    OUT.print(f"{len(ours.psnr)} seeds, intervals and verdicts from {FEWEST} on; {below}", style="dim")
    if figures := over_prompts(RESULTS.parents[1], model.name, LEVEL):
        OUT.print(f"That is one prompt; {figures}.", soft_wrap=True)


if __name__ == "__main__":
    run_alone(main)
