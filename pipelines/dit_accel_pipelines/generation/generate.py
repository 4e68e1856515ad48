"""Generates videos or images with methods attached, and writes each with all that is needed to repeat it."""

import contextlib
import copy
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dit_accel
from dit_accel.adapters import Family
from dit_accel.adapters.model_files import read_model_files
from dit_accel.attachment.check import Check, compared, require_tools
from dit_accel.errors import ConfigError, DitAccelError
from dit_accel.estimate.sizes import token_layout
from dit_accel.files import held, json_text, written_whole
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.presets import NONE

from ..processes.parallel import ALONE, Group, check_transformer, joined_group
from ..processes.processes import Process
from .dense_attention import check_attention_backend, use_attention_backend
from .fit import memory_used
from .inputs import other_sizes, read_pictures
from .larger import prepare_larger
from .loading import compile_blocks, device_of, load_pipeline, transformers_of
from .media import Frames, to_uint8, upscale, whole_output, write_media
from .pipeline_call import PICTURES, CallSignature
from .progress import Stages
from .quiet import quiet_diffusers
from .request import CALL_ARGUMENTS, SET_ALONE, Request, Resolved, check_path, resolve, side_car_path
from .resume import kept_record, request_digest
from .room import check_outputs_fit
from .side_car import Generation, repeating, side_car
from .solvers import make_scheduler
from .sound import sound_of
from .threads import one_thread
from .timing import timed_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `generate` wrote, or found written."""

    record: dict[str, Any]  # the side-car's content
    report: dit_accel.Report | None  # the attachment's report; None without methods
    kept: bool = False  # an earlier run wrote it, and it was left as it is
    check: Check | None = None  # how near it is to the dense run of its seed, where that was requested


def generate(
    requests: Sequence[Request],
    *,
    stages: Stages | None = None,
    command: Sequence[str] = (),
    process: Process | None = None,
    resume: bool = False,
    notes: Sequence[str] = (),
    on_written: Callable[[Written], None] = lambda _: None,
) -> list[Written]:
    """Generate and write what requests ask for: a file and a JSON side-car for each, whole or not at all.

    Neighbours in the list that load the same model share it.

    Args:
        requests: what to make, in this order; all are checked before weights are loaded.
        process: which of several processes this is: each, or each group that works together, takes some of the
            requests; None: the only one.
        resume: leave outputs as they are whose side-car tells the same request.
        notes: shown before those of the requests, once it is known that they can be met.
        on_written: called with each output as soon as it stands.

    Returns:
        What this process, or the first of its group, wrote or kept, in the order of the requests.

    Raises:
        DitAccelError: for a request that can't be met; nothing is written then.
        Busy: if another run writes the same output.
    """
    stages, process = stages or Stages(silent=True), process or Process()
    placed = [dataclasses.replace(request, device=process.device(request.device)) for request in requests]
    every = resolved_requests(placed, stages, notes, together=process.together)
    on_written = on_written if process.first else lambda _: None
    share = process.own(every)
    with contextlib.ExitStack() as stack:
        if process.first and share:
            stack.enter_context(held(share[0][0].output))
        stack.enter_context(one_thread(embedded=all(request.embedded for request, _ in every)))
        group = stack.enter_context(joined_group(process.local_rank, process.together))
        records = group.firsts({request.output: kept_record(request) for request, _ in share if resume})
        written = {
            output: Written(record=record, report=None, kept=True) for output, record in records.items() if record
        }
        for output in written.values():
            on_written(output)
        missing = [resolved for resolved in share if resolved[0].output not in written]
        check_outputs_fit([request for request, _ in missing], process.count // process.together)
        for request, _ in missing if process.first else ():
            if request.output.exists():
                stages.note(f"{request.output} is there; it is replaced when the new one is whole")
        stages.outputs(len(missing))
        for _, same in itertools.groupby(missing, lambda resolved: _what_is_loaded(resolved[0])):
            with Loaded(stages, command, writes=process.first, group=group) as loaded:
                for request, family in same:
                    written[request.output] = loaded.make(request, family)
                    stages.output_made(request.output)
                    on_written(written[request.output])
    return [written[request.output] for request, _ in share]


OF_THE_CALL = (
    "prompt", "output", "seed", *CALL_ARGUMENTS, *SET_ALONE, *PICTURES, "arg", "fps", "scale", "quality", "check",
)  # fmt: skip
"""Fields of a request that are the call's own, or the file's: a loaded pipeline makes one after another."""

PREPARED = ("methods", "preset", "backend", "dense", "solver", "flow_shift", "check", "height", "width")
"""Fields for which a loaded pipeline is prepared, and anew for others; sizes, since larger ones take more of some."""


def _what_is_loaded(request: Request) -> list[Any]:
    """Return what requests have in common that can share a pipeline; compiled blocks also keep what is attached."""
    apart = {*OF_THE_CALL} - {*PREPARED} if request.compile else {*OF_THE_CALL, *PREPARED}
    return [getattr(request, field.name) for field in dataclasses.fields(request) if field.name not in apart]


Make = Callable[[str, Path, int], Written]
"""Generates one prompt into a file, from a seed."""


@contextlib.contextmanager
def opened(request: Request, *, stages: Stages | None = None, command: Sequence[str] = ()) -> Iterator[Make]:
    """Load what a request asks for, once, for as many files as wanted; yields the function that makes them."""
    stages = stages or Stages(silent=True)
    ((request, family),) = resolved_requests([request], stages)
    with one_thread(embedded=request.embedded is not None), Loaded(stages, command) as loaded:
        loaded.load(request, family)
        yield lambda prompt, output, seed: loaded.make(
            dataclasses.replace(request, prompt=prompt, output=output, seed=seed), family
        )


def resolved_requests(
    requests: Sequence[Request], stages: Stages, notes: Sequence[str] = (), *, together: int = 1
) -> list[tuple[Request, Family | None]]:
    """Return the resolved requests with their families, and show these notes and theirs, each once.

    ``together``: processes that are to share each output; what they can't is refused.
    """
    resolved = [_named(request, len(requests)) for request in requests]
    backends = {(request.attention_backend, request.source): device_of(request) for request in requests}
    for (backend, source), device in backends.items():
        if backend is not None:
            check_attention_backend(backend, read_model_files(source), device)
    for each in resolved if together > 1 else ():
        _check_spread(each.request, each.family, together)
    for text in dict.fromkeys([*notes, *(text for each in resolved for text in each.notes)]):
        stages.note(text)
    for text in dict.fromkeys(text for each in resolved for text in each.warnings):
        stages.warn(text)
    return [(each.request, each.family) for each in resolved]


def _named(request: Request, count: int) -> Resolved:
    """Resolve a request; of several, errors say the output's name."""
    try:
        return resolve(request)
    except DitAccelError as error:
        raise type(error)(f"{request.output.name}: {error}") if count > 1 else error from None


def _check_spread(request: Request, family: Family | None, degree: int) -> None:
    """Refuse a resolved request whose model or sizes so many processes can't share, before its weights are loaded."""
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


class Loaded(contextlib.ExitStack):
    """A pipeline that is loaded for the first of some requests, for as long as a ``with`` block lasts.

    Args:
        command: the command line, for the side-cars.
        writes: False in a process that only helps the first of its group.
        group: the processes that make each output together.
    """

    def __init__(
        self, stages: Stages, command: Sequence[str] = (), *, writes: bool = True, group: Group = ALONE
    ) -> None:
        super().__init__()  # of what is undone before a request that is prepared otherwise, and at the end
        self._stages, self._command, self._writes, self._group = stages, command, writes, group
        self._pipe: Any = None
        self._prepared_for: list[Any] = []

    def load(self, request: Request, family: Family | None) -> None:
        """Load what a resolved request needs, and attach its methods, where that is not there yet."""
        if self._pipe is None:
            if request.check:
                require_tools()
            self._stages.stage("loading")
            started = time.perf_counter()
            self._pipe = load_pipeline(request)
            self._loading = time.perf_counter() - started
            with quiet_diffusers():
                for transformer in transformers_of(self._pipe):
                    self._group.share(transformer)
                    if request.attention_backend is not None:
                        use_attention_backend(transformer, request.attention_backend)
        wanted = [getattr(request, name) for name in PREPARED]
        if wanted != self._prepared_for:
            self._prepared_for = []
            self.close()
            self._prepare(request, family)
            self._prepared_for = wanted

    def _prepare(self, request: Request, family: Family | None) -> None:
        """Attach a request's methods and its solver, until the stack is closed."""
        pipe, vae = self._pipe, getattr(self._pipe, "vae", None)
        self.callback(setattr, pipe, "scheduler", pipe.scheduler)
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        if request.solver is not None or request.flow_shift is not None:
            pipe.scheduler = make_scheduler(pipe.scheduler, request.solver, request.flow_shift)
        if vae is not None and getattr(vae, "use_tiling", None) is False:
            self.callback(vae.disable_tiling)
        for text in prepare_larger(pipe, request, family):
            self._stages.note(text)
        choices = {"preset": request.preset, "dense": request.dense, "quiet": self._stages.quiet}
        self._attachment = self.enter_context(attached(pipe, request.methods, request.backend, **choices))
        if request.check and not self._attachment.report().methods:
            raise ConfigError(
                f"check compares methods with the dense run, and the preset {request.preset!r} has none for "
                "this model; name one, such as --staticcache"
            )
        if request.compile:
            compile_blocks(pipe)

    def make(self, request: Request, family: Family | None) -> Written:
        """Generate and write one of the requests that share this pipeline."""
        self.load(request, family)
        resolved, dense, check = _with_choices(request, self._pipe), None, None
        pictures = read_pictures(request, CallSignature.of(type(self._pipe)))
        if request.check:
            with self._attachment.suspended():
                dense = self._run(resolved, None, pictures)
        generation = self._run(resolved, self._attachment, pictures)
        if text := other_sizes(request, generation.frames.shape):
            self._stages.note(text)
        record = side_car(resolved, generation, request.output, loading=self._loading, command=self._command)
        if dense is not None and self._writes:
            check = check_of(dense, generation)
            check.save(check_path(request.output))
        record["check"] = check and {**check.to_dict(), "picture": str(check_path(request.output))}
        record["ulysses"] = self._group.size
        if (memory := memory_used(resolved, record["peak_memory_bytes"])) is not None:
            text, below = memory
            (self._stages.note if below else self._stages.warn)(text)
        record["request_digest"] = request_digest(request)
        record["run"] = repeating(dataclasses.replace(request, dtype=resolved.dtype))
        if self._writes:
            _write(request.output, generation, record, resolved)
        return Written(record=record, report=generation.report, check=check)

    def _run(self, request: Request, attachment: Any, pictures: Mapping[str, Any]) -> Generation:
        return run(self._pipe, request, pictures=pictures, stages=self._stages, attachment=attachment)


@contextlib.contextmanager
def attached(
    pipe: Any,
    methods: Sequence[MethodConfig],
    backend: str,
    *,
    preset: str | None = None,
    dense: str | None = None,
    quiet: bool = False,
) -> Iterator[Any]:
    """Attach methods, and those of a preset, for the block; yields the attachment, or None where none is requested.

    ``quiet``: what the preset is is not said.
    """
    if not methods and preset in (None, NONE):
        yield None
        return
    names: dict[str, Any] = {"preset": preset or NONE, "backend": backend, "dense": dense}
    with dit_accel.attach(pipe, *methods, **names) as attachment:
        if attachment.preset and not quiet:
            print(attachment.preset, file=sys.stderr)
        yield attachment


def run(
    pipe: Any,
    request: Request,
    *,
    pictures: Mapping[str, Any] | None = None,
    attachment: Any = None,
    stages: Stages | None = None,
) -> Generation:
    """Run a loaded pipeline on a (resolved) request.

    ``pictures``: what the request's files hold, as arguments of the call; None reads them.
    """
    import torch

    stages = stages or Stages(silent=True)
    call = CallSignature.of(type(pipe))
    pictures = read_pictures(request, call) if pictures is None else pictures
    arguments = {**request.full_call(call, pictures), "prompt": request.prompt}
    call.check(arguments)
    stages.stage("encoding the prompt")
    generator = torch.Generator("cpu").manual_seed(request.seed)
    with quiet_diffusers(), timed_steps(pipe, stages) as timings:
        called = pipe if attachment is None else attachment.call
        output = called(**arguments, generator=generator, output_type="np")
    pictures_made = pictures_of(output)
    report = attachment.report() if attachment is not None else None
    return Generation(
        prompt=request.prompt,
        frames=to_uint8(pictures_made),
        sound=sound_of(output, pipe),
        timings=timings,
        report=report,
        pictures=pictures_made if request.check else None,
    )


def check_of(dense: Generation, accelerated: Generation) -> Check:
    """Compare a run with methods to the dense one of the same seed, and the seconds of both."""
    assert dense.pictures is not None
    assert accelerated.pictures is not None
    seconds = dense.timings.total, accelerated.timings.total
    return compared(dense.pictures, accelerated.pictures, seconds, accelerated.report)


def _with_choices(request: Request, pipe: Any) -> Request:
    """Return the request with what the pipeline chose where nothing was requested, for the side-car."""
    guidance, call = request.guidance_scale, CallSignature.of(type(pipe))
    if guidance is None:
        guidance = request.beside(call).get("true_cfg_scale", call.default("guidance_scale"))
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

    ``output``: has ``frames`` [B, F, height, width, 3], ``video`` [F, height, width, 3], or ``images`` or ``image`` [B,
    height, width, 3], floats in [0, 1]; of a batch the first is taken.
    """
    name = next(name for name in ("frames", "video", "images", "image") if getattr(output, name, None) is not None)
    pictures = np.asarray(getattr(output, name))
    while pictures.ndim > 4:
        pictures = pictures[0]
    return pictures[:1] if name in ("images", "image") else pictures


def _write(output: Path, made: Generation, record: dict[str, Any], request: Request) -> None:
    frames, choices = upscale(made.frames, request.scale), {"fps": request.output_fps, "quality": request.quality}
    with written_whole(side_car_path(output)) as text, whole_output(output) as media:  # the file first, then its word
        write_media(media, frames, sound=made.sound, **choices)
        text.write_text(json_text(record) + "\n", encoding="utf-8")
