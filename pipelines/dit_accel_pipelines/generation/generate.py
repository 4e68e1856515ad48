"""Generates videos or images with methods attached, and writes each with all that is needed to repeat it."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

import dit_accel
from dit_accel.adapters.adapter import Family
from dit_accel.adapters.model_files import read_model_files
from dit_accel.attachment.check import Check, compared, require_tools
from dit_accel.errors import ConfigError
from dit_accel.estimate.sizes import token_layout
from dit_accel.files import held, json_text, written_whole
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.presets import NONE

from ..processes.parallel import ALONE, Group, check_transformer, joined
from ..processes.processes import Process
from .larger import prepare_larger
from .loading import compile_blocks, device_of, load_pipeline, transformers_of
from .media import Frames, to_uint8, upscale, write_media
from .pipeline_call import PipelineCall
from .progress import Stages
from .quiet import quiet_diffusers
from .request import Backend, Dense, Request, check_path, read_pictures, settle, side_car_path
from .resume import kept_record, request_digest
from .room import check_outputs_fit
from .side_car import Generation, side_car
from .solvers import make_scheduler
from .threads import one_thread
from .timing import timed_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `generate` wrote, or found written.

    Attributes:
        record: the side-car's content.
        report: the attachment's report; None without methods.
        kept: an earlier run wrote it, and it was left as it is.
        check: how near it is to the dense run of its seed, where that was requested.
    """

    record: dict[str, Any]
    report: dit_accel.Report | None
    kept: bool = False
    check: Check | None = None


def generate(
    request: Request,
    *,
    stages: Stages | None = None,
    command: Sequence[str] = (),
    process: Process | None = None,
    resume: bool = False,
    notes: Sequence[str] = (),
    on_written: Callable[[Written], None] = lambda _: None,
) -> list[Written]:
    """Generate and write what a request asks for: a file and a JSON side-car per prompt, each whole or not at all.

    Args:
        request: what to generate.
        stages: progress bars, notes and warnings; None shows none.
        command: the command line, for the side-car.
        process: which of several processes this is: each, or each group that works together, makes some of the prompts;
            None: the only one.
        resume: leave outputs as they are whose side-car tells the same request.
        notes: shown before those of the request, once it is known that it can be met.
        on_written: called with each output as soon as it stands.

    Returns:
        What this process, or the first of its group, wrote or kept, in the order of the prompts.

    Raises:
        DitAccelError: for a request that can't be met; nothing is written then.
        Busy: if another run writes the same output.
    """
    stages, process = stages or Stages(silent=True), process or Process()
    request, family = _settled(dataclasses.replace(request, device=process.device(request.device)), stages, notes)
    if process.together > 1:
        _check_spread(request, family, process.together)
    on_written = on_written if process.first else lambda _: None
    requested = process.own(_single(request))
    own = request.output if process.count == 1 else request.output.with_name(f"{request.output.name}.{process.rank}")
    alone = held(own) if process.first else contextlib.nullcontext()
    small = one_thread(embedded=request.embedded is not None)
    with alone, small, joined(process.local_rank, process.together) as group:
        kept = group.firsts({one.output: record for one, record in _kept(requested, resume)})
        written = {output: Written(record=record, report=None, kept=True) for output, record in kept.items()}
        for one in written.values():
            on_written(one)
        missing = [one for one in requested if one.output not in written]
        if not missing:
            return list(written.values())
        check_outputs_fit(request, process.count // process.together * len(missing))
        for one in missing if process.first else ():
            if one.output.exists():
                stages.note(f"{one.output} is there; it is replaced when the new one is whole")
        with _loaded(request, family, stages, command, process.first, group) as make:
            for one in missing:
                written[one.output] = make(one)
                on_written(written[one.output])
    return [written[one.output] for one in requested]


Make = Callable[[str, Path, int], Written]
"""Generates one prompt into a file, from a seed."""


@contextlib.contextmanager
def opened(request: Request, *, stages: Stages | None = None, command: Sequence[str] = ()) -> Iterator[Make]:
    """Load what a request asks for, once, for as many files as wanted; yields the function that makes them.

    Args:
        request: what to generate; all its prompts are checked, none is made by itself.
        stages: progress bars, notes and warnings; None shows none.
        command: the command line, for the side-cars.

    Raises:
        DitAccelError: for a request that can't be met.
    """
    stages = stages or Stages(silent=True)
    request, family = _settled(request, stages)
    with one_thread(embedded=request.embedded is not None), _loaded(request, family, stages, command) as make:
        yield lambda prompt, output, seed: make(
            dataclasses.replace(request, prompts=(prompt,), output=output, seed=seed)
        )


def _settled(request: Request, stages: Stages, notes: Sequence[str] = ()) -> tuple[Request, Family | None]:
    """Return the settled request and its family, and show these notes and its own."""
    settled = settle(request)
    device_of(request)
    for text in (*notes, *settled.notes):
        stages.note(text)
    for text in settled.warnings:
        stages.warn(text)
    return settled.request, settled.family


def _check_spread(request: Request, family: Family | None, degree: int) -> None:
    """Refuse a settled request whose model or sizes so many processes can't share, before its weights are loaded."""
    import diffusers

    config = read_model_files(request.source).transformer
    check_transformer(getattr(diffusers, str(config.get("_class_name"))), config, degree)
    height, width, frames = request.height, request.width, request.num_frames
    if family is None or height is None or width is None:
        return
    layout = token_layout(family, height=height, width=width, num_frames=1 if frames is None else frames)
    if layout.visual_tokens % degree:
        raise ConfigError(
            f"ulysses = {degree} does not divide the {layout.visual_tokens} tokens of an output of {frames} frames, "
            f"{height} x {width}; choose other sizes, or a degree that does"
        )


@contextlib.contextmanager
def _loaded(
    request: Request,
    family: Family | None,
    stages: Stages,
    command: Sequence[str],
    writes: bool = True,
    group: Group = ALONE,
) -> Iterator[Callable[[Request], Written]]:
    """Load a settled request's pipeline with its methods; yields what makes a request of one prompt.

    Of a group only the process that ``writes`` does.
    """
    pictures = read_pictures(request)
    if request.check:
        require_tools()
    stages.stage("loading")
    started = time.perf_counter()
    pipe = load_pipeline(request)
    if request.solver is not None:
        pipe.scheduler = make_scheduler(pipe.scheduler, request.solver, request.flow_shift)
    loading = time.perf_counter() - started
    for text in prepare_larger(pipe, request, family):
        stages.note(text)
    with quiet_diffusers():
        for transformer in transformers_of(pipe):
            group.share(transformer)
    choices = {"preset": request.preset, "dense": request.dense, "quiet": stages.quiet}
    with attached(pipe, request.methods, request.backend, **choices) as attachment:
        if request.check and not attachment.report().methods:
            raise ConfigError(
                f"check compares methods with the dense run, and the preset {request.preset!r} has none for this "
                "model; name one, such as --staticcache"
            )
        if request.compile:
            compile_blocks(pipe)

        def make(one: Request) -> Written:
            resolved = _resolved(one, pipe)
            given = {"pictures": pictures, "stages": stages}
            dense = None
            if one.check:
                with attachment.suspended():
                    dense = run(pipe, one.prompts[0], resolved, **given)
            made = run(pipe, one.prompts[0], resolved, attachment=attachment, **given)
            record = side_car(resolved, made, one.output, loading=loading, command=command)
            check = None if dense is None or not writes else _compared(dense, made)
            record["check"] = None if check is None else {**check.to_dict(), "picture": str(check_path(one.output))}
            record["ulysses"] = group.size
            record["request_digest"] = request_digest(one)
            if check is not None:
                check.save(check_path(one.output))
            if writes:
                _write(one.output, made.frames, record, resolved)
            return Written(record=record, report=made.report, check=check)

        yield make


def _single(request: Request) -> list[Request]:
    """Return a request for each prompt, with its output and seed."""
    return [
        dataclasses.replace(request, prompts=(prompt,), output=output, seed=seed)
        for prompt, output, seed in zip(request.prompts, request.outputs(), request.seeds(), strict=True)
    ]


def _kept(requested: Sequence[Request], resume: bool) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Give the requests that are met already, and the side-cars of their outputs."""
    for one in requested if resume else ():
        if (record := kept_record(one)) is not None:
            yield one, record


@contextlib.contextmanager
def attached(
    pipe: Any,
    methods: Sequence[MethodConfig],
    backend: Backend,
    *,
    preset: str | None = None,
    dense: Dense | None = None,
    quiet: bool = False,
) -> Iterator[Any]:
    """Attach methods, and those of a preset, for the block; yields the attachment, or None where none is requested.

    ``quiet``: what the preset is is not said.
    """
    if not methods and preset in (None, NONE):
        yield None
        return
    with dit_accel.attach(pipe, *methods, preset=cast(Any, preset or NONE), backend=backend, dense=dense) as attachment:
        if attachment.preset and not quiet:
            print(attachment.preset, file=sys.stderr)
        yield attachment


def run(
    pipe: Any,
    prompt: str,
    request: Request,
    *,
    pictures: Mapping[str, Any] | None = None,
    attachment: Any = None,
    stages: Stages | None = None,
) -> Generation:
    """Run a loaded pipeline on one prompt of a (settled) request.

    Args:
        pipe: the pipeline.
        prompt: what to show.
        request: sizes, steps, guidance and seed.
        pictures: what the request's image and video files hold; None reads them.
        attachment: the attachment whose report is wanted.
        stages: progress bars; None shows none.

    Raises:
        ConfigError: if the pipeline does not take what the request asks for, or needs more.
    """
    import torch

    stages = stages or Stages(silent=True)
    pictures = read_pictures(request) if pictures is None else pictures
    call = PipelineCall.of(type(pipe))
    arguments = {**request.beside(call), **request.call_arguments(), "prompt": prompt, **pictures}
    call.check(arguments)
    stages.stage("encoding the prompt")
    generator = torch.Generator("cpu").manual_seed(request.seed)
    with quiet_diffusers(), timed_steps(pipe, stages) as timings:
        called = pipe if attachment is None else attachment.call
        made = pictures_of(called(**arguments, generator=generator, output_type="np"))
    report = attachment.report() if attachment is not None else None
    return Generation(
        prompt=prompt, frames=to_uint8(made), timings=timings, report=report, pictures=made if request.check else None
    )


def _compared(dense: Generation, made: Generation) -> Check:
    """Return how near a run with methods is to the dense one of the same seed."""
    assert dense.pictures is not None
    assert made.pictures is not None
    seconds = [one.timings.text + one.timings.denoise + one.timings.decode for one in (dense, made)]
    return compared(dense.pictures, made.pictures, *seconds)


def _resolved(request: Request, pipe: Any) -> Request:
    """Return the request with what the pipeline chose where nothing was requested, for the side-car."""
    guidance = request.guidance_scale
    if guidance is None:
        guidance = PipelineCall.of(type(pipe)).default("guidance_scale")
    chosen = {"guidance_scale": guidance, "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    return dataclasses.replace(request, device=str(pipe._execution_device), **chosen)


def frames_of(output: Any) -> Frames:
    """Return the frames of a pipeline's output, uint8 [F, height, width, 3]; see `pictures_of`."""
    return to_uint8(pictures_of(output))


def pictures_of(output: Any) -> np.ndarray:
    """Return the frames of a pipeline's output, as `any_pictures_of`; `ConfigError` for values that are not finite."""
    pictures = any_pictures_of(output)
    if not np.isfinite(pictures).all():
        raise ConfigError(
            "the model made values that are no numbers (nan or infinite), which no picture can show; take a guidance "
            "scale nearer to the model's own, or a number format of more range, such as --dtype bfloat16"
        )
    return pictures


def any_pictures_of(output: Any) -> np.ndarray:
    """Return the frames of a pipeline's output, floats [F, height, width, 3] in [0, 1]; an image is one frame.

    Args:
        output: has ``frames`` [B, F, height, width, 3], ``video`` [F, height, width, 3], or ``images`` or ``image``
            [B, height, width, 3], floats in [0, 1]; of a batch the first is taken.
    """
    name = next(name for name in ("frames", "video", "images", "image") if getattr(output, name, None) is not None)
    pictures = np.asarray(getattr(output, name))
    while pictures.ndim > 4:
        pictures = pictures[0]
    return pictures[:1] if name in ("images", "image") else pictures


def _write(output: Path, frames: Frames, record: dict[str, Any], request: Request) -> None:
    with written_whole(side_car_path(output)) as text, written_whole(output) as media:  # the file first, then its word
        write_media(media, upscale(frames, request.scale), fps=request.output_fps)
        text.write_text(json_text(record) + "\n", encoding="utf-8")
