"""Compares a suite's arms on the embedded model: `python -m dit_accel_eval.compare eval/suites/radial-tiny.toml`.

Every clip of every arm is one JSON line, written as it is made; a run that was stopped goes on where it stopped. The
dense arm and the dense steps of all others use the same dense kernel, and every figure is paired by prompt and seed.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_assets.checker import check
from dit_accel_assets.clips import clip_of

import dit_accel
from dit_accel import ConfigError

from .fidelity import psnr, ssim
from .paired import bootstrap
from .suite import Arm, Suite, read_suite

WEIGHTS = model_path() / "transformer" / "diffusion_pytorch_model.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, or only print the table of what has run; returns the exit code."""
    return suite_command(__doc__ or "", run, table, arguments)


def suite_command(
    about: str,
    run: Callable[[Suite, Path], None],
    table: Callable[[Suite, Sequence[dict[str, Any]]], str],
    arguments: Sequence[str] | None,
) -> int:
    """Run a suite from the command line, or only print its table; returns the exit code.

    Args:
        about: what the command does, in its first line.
        run: makes what a file of JSON lines does not hold yet.
        table: puts the lines of the file into a table.
        arguments: the command line's; None: this process's.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines; default: results/<suite>.jsonl beside the suite's folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, generate nothing")
    options = parser.parse_args(arguments)
    try:
        suite = read_suite(options.suite)
        out = options.out or options.suite.parent.parent / "results" / f"{suite.name}.jsonl"
        if not options.table:
            torch.set_num_threads(options.threads)
            out.parent.mkdir(parents=True, exist_ok=True)
            run(suite, out)
    except dit_accel.DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(suite, read_lines(out)))
    return 0


def run(suite: Suite, out: Path) -> None:
    """Generate what ``out`` does not hold yet, and append one JSON line per clip.

    Raises:
        ConfigError: if ``out`` holds results of another model.
    """
    lines = read_lines(out)
    model = model_hash(out, lines)
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    done = {(line["arm"], line["clip"]) for line in lines}
    for clip in range(suite.clips):
        todo = [arm for arm in suite.arms if (arm.name, clip) not in done]
        if not todo:
            continue
        prompt, scene, _ = clip_of(clip, frames=suite.num_frames, held_out=True)
        dense_arm = Arm(name="", num_inference_steps=suite.num_inference_steps, methods=())
        reference, dense_seconds, _ = generate(pipe, suite, dense_arm, prompt, clip)
        for arm in todo:
            video, seconds, report = generate(pipe, suite, arm, prompt, clip)
            verdict = check(video)
            line = {
                "arm": arm.name,
                "clip": clip,
                "prompt": prompt,
                "psnr": psnr(video, reference),
                "ssim": ssim(video, reference),
                "color": verdict.color == scene.color,
                "shape": verdict.shape == scene.shape,
                "direction": verdict.direction == scene.direction,
                "density": report.density,
                "sparse_density": report.sparse_density,
                "seconds": seconds,
                "dense_seconds": dense_seconds,
                "steps": arm.num_inference_steps,
                "torch": torch.__version__,
                "model": model,
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            kept = f", {report.sparse_density:.3f} of the sparse calls exact" if arm.methods else ""
            print(f"clip {clip} {arm.name}: {line['psnr']:.1f} dB{kept}", file=sys.stderr)


def model_hash(out: Path, lines: Sequence[dict[str, Any]]) -> str:
    """Return what tells the embedded model from another.

    Raises:
        ConfigError: if the lines of ``out`` are of another one.
    """
    model = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]
    others = {line["model"] for line in lines} - {model}
    if others:
        raise ConfigError(f"{out} holds results of model {', '.join(others)}, this is {model}; delete it and run again")
    return model


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(suite: Suite, lines: Sequence[dict[str, Any]]) -> str:
    """Return the suite's Markdown table: one row per arm, means over clips, intervals by paired bootstrap."""
    return "\n".join(_rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| arm | density | of sparse calls | PSNR to dense, dB | SSIM | colour / shape / direction right | against "
        "| paired PSNR difference, dB |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        clips = by_arm[arm.name]
        if not clips:
            continue
        mean = {key: float(np.mean([line[key] for line in clips.values()])) for key in ("density", "ssim")}
        # Fewer steps cost as much less as dense attention and all else do, so their density is the share of steps.
        density = mean["density"] * arm.num_inference_steps / suite.num_inference_steps
        exact = [line["sparse_density"] for line in clips.values() if line["sparse_density"] is not None]
        sparse = f"{np.mean(exact):.3f}" if exact else ""
        right = " / ".join(
            f"{np.mean([c[key] for c in clips.values()]):.0%}" for key in ("color", "shape", "direction")
        )
        fidelity = bootstrap([line["psnr"] for line in clips.values()])
        paired = "" if arm.against is None else _paired(clips, by_arm[arm.against])
        against = arm.against or ""
        cells = (arm.name, f"{density:.3f}", sparse, fidelity, f"{mean['ssim']:.3f}", right, against, paired)
        yield f"| {' | '.join(map(str, cells))} |"


def _paired(clips: dict[int, Any], others: dict[int, Any]) -> str:
    shared = sorted(set(clips) & set(others))
    return str(bootstrap([clips[clip]["psnr"] - others[clip]["psnr"] for clip in shared])) if shared else ""


def generate(
    pipe: WanPipeline, suite: Suite, arm: Arm, prompt: str, seed: int
) -> tuple[np.ndarray, float, dit_accel.Report]:
    """Return frames [F, height, width, 3] in [0, 1], seconds, and the report."""
    with dit_accel.attach(pipe, *arm.methods) as attachment:
        started = time.perf_counter()
        (frames,) = pipe(
            prompt,
            num_frames=arm.num_frames or suite.num_frames,
            height=64,
            width=64,
            num_inference_steps=arm.num_inference_steps,
            guidance_scale=suite.guidance_scale,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            return_dict=False,
        )[0]
        return np.asarray(frames), time.perf_counter() - started, attachment.report()


if __name__ == "__main__":
    raise SystemExit(main())
