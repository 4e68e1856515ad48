"""The command `dit-accel eval vbench`; what it needs is loaded when it runs."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.options import fields_of, with_option_fields

from dit_accel import ConfigError
from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, print_json, print_table
from dit_accel.cli.stopping import STOP
from dit_accel.files import make_folder

from .dimensions import DIMENSIONS, first_of, read_full_info, read_scores, totals
from .job import VideoJob, tell


@with_option_fields
def evaluate(job: VideoJob, *, methods: MethodList) -> None:
    """Measure videos by VBench's sixteen dimensions, and give its totals where all are there.

    Scores are VBench's own or none. With --official the vbench package measures
    them; without it, those that take pixels alone or CLIP are measured here, each
    video's score kept as it is measured, so that a run that was stopped goes on.

    With --generate the videos are made: those of the dimensions' prompts, or of
    --prompts, that the folder lacks, each of another seed.

    \b
    Examples:
      dit-accel eval vbench --totals scores.json --json
      dit-accel eval vbench --videos out/ --official vbench-env
      dit-accel eval vbench --videos out/ -d background_consistency -d aesthetic_quality
      dit-accel eval vbench --videos out/ --generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --radial --subset 1
    """
    _refuse(job, methods)
    if job.videos is None:
        assert job.totals is not None
        sums = totals(read_scores(job.totals))
        if job.json:
            return print_json(sums)
        rows = [(name, DIMENSIONS[name].group, f"{100 * value:.2f}") for name, value in sums["normalized"].items()]
        print_table(("dimension", "group", "in its range"), rows, right=("in its range",))
        return _print_sums(sums)
    if job.generate:
        return _generate(job, methods)
    if job.official is not None:
        from .official import RESULTS, measure_officially

        STOP.files = f"each dimension's results stand in {job.output}, and the same command goes on with the next"
        results = measure_officially(job, job.official)
    else:
        from .run import LINES, RESULTS, measure

        STOP.files = f"what was measured stands in {job.file(LINES)}, and the same command goes on there"
        results = measure(job)
    _print_scores(results, job.file(RESULTS), whole=job.official is not None and not job.custom, json=job.json)


def _refuse(job: VideoJob, methods: MethodList) -> None:
    """Refuse options that can't be requested together, and unknown dimensions, before anything is read."""
    requested = {field.name for field in fields(job) if getattr(job, field.name) not in (None, False, [])}
    requested |= {"methods"} if methods else set()
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
    _ = job.dimensions


def _generate(job: VideoJob, methods: MethodList) -> None:
    """Make the videos that a folder lacks; how many, and their sizes, are printed before the model is loaded."""
    from dit_accel_pipelines.generation.request import Request, read_prompts, resolve

    from . import generating
    from .official import prompts_path

    make_folder(job.clips)
    if job.prompts is not None:
        texts = read_prompts(job.prompts, "--prompts")[: job.subset]
        work = generating.own_pieces(texts, job.clips, job.samples, job.seed)
    else:
        every = read_full_info(prompts_path(job.full_info))
        names = job.dimensions or [name for name in DIMENSIONS if any(name in prompt.dimensions for prompt in every)]
        worded = () if job.augmented is None else generating.read_augmented(job.augmented, every)
        wanted = first_of(every, names, job.subset)
        work = generating.video_pieces(every, wanted, names, job.clips, job.samples, job.seed, worded)
    work = generating.share_of_work(work, job.shard)
    values = {name: value for name, value in fields_of(Request, job).items() if name != "seed"}
    request = Request(**{**values, "prompt": work[0].prompt, "output": work[0].path, "methods": tuple(methods)})
    left = generating.remaining(work, request)
    known = ((name, getattr(resolve(request)[0], name)) for name in generating.SIZES)
    sizes = ", ".join(f"{name} {value}" for name, value in known if value is not None) or "the model's sizes"
    tell(f"{len(left)} of {len(work)} videos to make, {len(work) - len(left)} are there; {sizes}")
    if left:
        STOP.files = f"the videos in {job.clips} are whole, and the same command makes those that lack"
        generating.make_videos(left, request, tell, sys.argv)
    then = " --custom" if job.prompts is not None else ""
    tell(f"{job.clips} is whole; measure it: dit-accel eval vbench --videos {job.clips}{then}")


def _print_scores(by_name: dict[str, list[Any]], results: Path, *, whole: bool, json: bool) -> None:
    scores = {name: held[0] for name, held in by_name.items()}
    sums = totals(scores) if whole and len(scores) == len(DIMENSIONS) else None
    if json:
        print_json({"scores": scores, "totals": sums, "results": str(results)})
        return
    rows = [(name, f"{score:.4f}", str(len(entries))) for name, (score, entries) in by_name.items()]
    print_table(("dimension", "score", "videos"), rows, right=("score", "videos"))
    if sums is not None:
        _print_sums(sums)
    tell(f"written to {results}")


def _print_sums(sums: dict[str, Any]) -> None:
    OUT.print("  ".join(f"{name.title()} {100 * sums[name]:.2f}" for name in ("quality", "semantic", "total")))
