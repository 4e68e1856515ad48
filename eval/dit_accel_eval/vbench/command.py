"""The command `dit-accel eval vbench`; what it needs is loaded when it runs."""

import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from dit_accel_pipelines.generation.options import Json

from dit_accel import ConfigError
from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_error, print_json, warn
from dit_accel.cli.stopping import keeps

from . import options as given
from .dimensions import DIMENSIONS, read_scores, totals
from .job import VideoJob
from .prompts import SAMPLES, first_of, known_names, read_full_info

_tell = functools.partial(TALK.print, markup=False, soft_wrap=True)


def evaluate(
    totals: given.Totals = None, videos: given.Videos = None, dimension: given.Dimensions = None,
    full_info: given.FullInfo = None, samples: given.Samples = None, subset: given.Subset = None,
    filtered: given.Filtered = False, custom: given.Custom = False, prompts: given.Prompts = None,
    official: given.Official = None, folder: given.Folder = None, output: given.Output = Path("vbench"),
    name: given.Name = None, generate: given.Generate = False, augmented: given.Augmented = None,
    model: given.Model = None, height: given.Pixels = None, width: given.Pixels = None, num_frames: given.Frames = None,
    num_inference_steps: given.Steps = None, guidance_scale: given.Guidance = None, fps: given.Fps = None,
    dtype: given.Dtype = None, offload: given.Offload = "none", seed: given.Seed = 0, shard: given.Shard = None,
    device: given.Device = None, json: Json = False, *, methods: MethodList,
) -> None:  # fmt: skip
    """Measure videos by VBench's sixteen dimensions, and give its totals where all are there.

    Scores are VBench's own or none. With --official the vbench package measures
    them; without it, those that take pixels alone or CLIP are measured here, each
    video's score kept as it is measured, so that a run that was stopped goes on.

    With --generate the videos are made: those of the dimensions' prompts, or of
    --prompts, that the folder lacks, each of another seed.

    Examples:

    dit-accel eval vbench --totals scores.json --json

    dit-accel eval vbench --videos out/ --official vbench-env

    dit-accel eval vbench --videos out/ -d background_consistency -d aesthetic_quality

    dit-accel eval vbench --videos out/ --generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --radial --subset 1
    """
    _refuse(locals())
    if videos is None:
        assert totals is not None
        return _print_totals(totals, json)
    job = VideoJob(
        videos=videos, output=output, name=name or videos.resolve().name, dimensions=known_names(dimension or ()),
        custom=custom, prompts=prompts, full_info=full_info, samples=samples or SAMPLES, subset=subset,
        filtered=filtered, cache=folder, device=device or "cuda", tell=_tell, warn=warn,
    )  # fmt: skip
    if generate:
        making = {"model": model, "height": height, "width": width, "num_frames": num_frames, "fps": fps,
                  "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "dtype": dtype,
                  "device": device, "offload": offload, "methods": tuple(methods)}  # fmt: skip
        return _generate(job, samples, augmented, seed, shard, making)
    if official is not None:
        from .official import RESULTS, measure_officially

        keeps(f"each dimension's results stand in {output}, and the same command goes on with the next")
        found = measure_officially(job, official)
    else:
        from .run import LINES, RESULTS, measure

        keeps(f"what was measured stands in {job.file(LINES)}, and the same command goes on there")
        found = measure(job)
    _print_scores(found, job.file(RESULTS), whole=official is not None and not custom, json=json)


def _refuse(options: Mapping[str, Any]) -> None:
    """Refuse options of `evaluate` that can't be requested together, before anything is read."""
    requested = {name for name, value in options.items() if value not in (None, False, [])}
    if len(requested & {"totals", "videos"}) != 1:
        raise ConfigError("name either raw scores with --totals or a folder of videos with --videos")
    for name in ("samples", "subset", "generate"):
        if {"official", name} <= requested:
            raise ConfigError(f"--official runs the vbench package as it is, which has no --{name}; leave one out")
    if "folder" in requested and "official" not in requested:
        raise ConfigError("--folder is where the vbench package has its weights; add --official ENV")
    if "generate" not in requested and requested & {"methods", "model", "shard", "augmented"}:
        raise ConfigError("a model, its methods, shards and augmented prompts are for making videos; add --generate")
    if "prompts" in requested and not requested & {"generate", "custom"}:
        raise ConfigError("--prompts tells prompts of one's own; add --custom")
    if {"augmented", "prompts"} <= requested:
        raise ConfigError("--augmented words VBench's own prompts, no others; leave --prompts out")


def _generate(
    job: VideoJob, samples: int | None, augmented: Path | None, seed: int, shard: str | None, making: dict[str, Any]
) -> None:
    """Make the videos that a folder lacks; how many, and their sizes, are printed before the model is loaded."""
    from dit_accel_pipelines.generation.request import Request

    from . import generating
    from .official import prompts_path

    try:
        job.videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {job.videos} can't be made: {error.strerror}; name another") from None
    if job.prompts is not None:
        texts = generating.read_texts(job.prompts, "--prompts")[: job.subset]
        work = generating.own_pieces(texts, job.videos, samples, seed)
    else:
        every = read_full_info(prompts_path(job.full_info))
        names = job.dimensions or [name for name in DIMENSIONS if any(name in one.dimensions for one in every)]
        worded = () if augmented is None else generating.read_augmented(augmented, every)
        work = generating.video_pieces(
            every, first_of(every, names, job.subset), names, job.videos, samples, seed, worded
        )  # fmt: skip
    work = generating.share_of_work(work, shard)
    request = Request(prompts=(work[0].prompt,), output=work[0].path, **making)
    left = generating.remaining(work, request)
    there = len(work) - len(left)
    _tell(f"{len(left)} of {len(work)} videos to make, {there} are there; {generating.sizes_text(request)}")
    if left:
        keeps(f"the videos in {job.videos} are whole, and the same command makes those that lack")
        generating.make_videos(left, request, _tell, sys.argv)
    then = " --custom" if job.prompts is not None else ""
    _tell(f"{job.videos} is whole; measure it: dit-accel eval vbench --videos {job.videos}{then}")


def _print_scores(found: dict[str, list[Any]], results: Path, *, whole: bool, json: bool) -> None:
    scores = {name: held[0] for name, held in found.items()}
    sums = asdict(totals(scores)) if whole and len(scores) == len(DIMENSIONS) else None
    if json:
        print_json({"scores": scores, "totals": sums, "results": str(results)})
        return
    table = plain_table("dimension", "score", "videos", right=("score", "videos"))
    for name, (score, entries) in found.items():
        table.add_row(name, f"{score:.4f}", str(len(entries)))
    OUT.print(table)
    if sums is not None:
        OUT.print("  ".join(f"{name.title()} {100 * sums[name]:.2f}" for name in ("quality", "semantic", "total")))
    _tell(f"written to {results}")


def _print_totals(path: Path, json: bool) -> None:
    found = totals(read_scores(path))
    if json:
        print_json(asdict(found))
        return
    table = plain_table("dimension", "group", "in its range", right=("in its range",))
    for name, value in found.normalized.items():
        table.add_row(name, DIMENSIONS[name].group, f"{100 * value:.2f}")
    OUT.print(table)
    OUT.print(f"Quality {100 * found.quality:.2f}  Semantic {100 * found.semantic:.2f}  Total {100 * found.total:.2f}")


def set_up_prompts(archives: Path | None, json: bool) -> None:
    """Unpack VBench's prompts, and print where they lie; exit code 1 where they can't be had."""
    from . import official

    reason = official.unpack_prompts(archives, _tell)
    if json:
        print_json({"prompts": str(official.unpacked()), "missing": reason})
    elif reason is None:
        OUT.print(f"VBench's prompts are at {official.unpacked()}", markup=False, soft_wrap=True)
    if reason is not None:
        print_error(reason)
        raise typer.Exit(1)
