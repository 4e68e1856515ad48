"""What `generate` takes, and every check that can be made before weights are loaded."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from dit_accel_kernels import BACKENDS

from dit_accel.adapters import Family
from dit_accel.adapters.embedded import assets, embedded_names
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.model_files import ModelFiles, model_source, read_model_files
from dit_accel.adapters.rotary import check_lengths
from dit_accel.attachment.backends import Dense, check_backend
from dit_accel.errors import ConfigError, UnsupportedModel
from dit_accel.estimate.hardware import QUANTIZATIONS, find_hardware
from dit_accel.estimate.sizes import advice, check_multiple, check_steps, pixel_multiples, rounded_frames, token_layout
from dit_accel.files import check_writable, read_text
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.few_steps import check_preset
from dit_accel.methods.presets import LEAST_STEPS, NAMES, NONE, preset_methods

from .few_steps import few_steps_of, proposals
from .fit import check_vae, fitted, sizes_of, vae_ways
from .inputs import CONDITIONS, arguments_of, follow_inputs, inputs_of
from .lora import Lora, check_lora, check_loras
from .media import check_even, check_output, check_quality
from .memory import check_fits
from .negative import idle_negative, negative_of_methods
from .options import RunOptions
from .pipeline_call import CallSignature, pipeline_class
from .ranges import check_choices, check_ranges
from .rates import rate_arguments, with_rate
from .solvers import SOLVERS, make_scheduler, read_scheduler
from .sound import lost_sound
from .weights import check_weight_files, check_weights, named_by_file, slow_products

EMBEDDED = "wan-tiny"
"""The embedded model that is taken where none is named."""

EMBEDDED_FPS, OTHER_FPS = 8, 16

SIZES = ("height", "width", "num_frames", "num_inference_steps")
"""What a family knows a default for."""

CALL_ARGUMENTS = ("negative_prompt", *SIZES, "guidance_scale")
"""Arguments of the pipeline's call that a request holds, and embedded models have defaults for."""

SET_ALONE = ("guidance_scale_2", "true_cfg_scale", "strength")
"""Arguments of the pipeline's call that a request holds, which are its pipeline's own where they are not set."""

OWN_SHIFT = re.compile("Flux2|QwenImageLayered")
"""Pipeline classes that hand a scheduler a mu of their own formula, which only Euler's can leave aside."""

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
OFFLOADS = ("none", "text", "model", "group", "sequential")

CHOICES: Mapping[str, Sequence[str]] = {
    "dtype": DTYPES, "offload": OFFLOADS, "solver": tuple(SOLVERS),
    "quantize": tuple(QUANTIZATIONS), "quantize_text_encoder": tuple(QUANTIZATIONS),
    "backend": BACKENDS, "preset": NAMES, "dense": get_args(Dense),
}  # fmt: skip
"""Option -> the names that it takes."""


class NamesModel:
    """What asks for a model: by a hub id, a folder or an embedded model's name; None is `EMBEDDED`."""

    __slots__ = ()
    model: str | None

    @property
    def embedded(self) -> str | None:
        """Return the name of the model if it is one that ships with the project."""
        return embedded_name(self.model)

    @property
    def source(self) -> str:
        """Return what diffusers loads: a folder or a hub id."""
        return model_source(self.model or EMBEDDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(RunOptions, NamesModel):
    """What to generate; what is None takes the model's default."""

    prompt: str  # what to show
    output: Path  # file to write
    methods: tuple[MethodConfig, ...] = ()  # method configs to attach

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ConfigError("generate needs a prompt, got none; write one in quotes, or give --prompt-file")
        check_ranges(self)
        if self.num_inference_steps is not None:
            check_steps(self.num_inference_steps)
        check_choices(self, CHOICES)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        for name, unset in (("backend", "auto"), ("dense", None), ("check", False)):
            if getattr(self, name) != unset and not self.attaches:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} was requested, but no method is attached; switch one on, such as "
                    "--radial or --preset balanced"
                )
        for text in self.lora:
            check_lora(Lora.of(text).name)
        check_weight_files(self)
        vae_ways(self.vae)
        if self.max_memory is not None:
            find_hardware(self.max_memory)
        check_output(self.output)
        check_quality(self.output, self.quality)
        check_writable(side_car_path(self.output))
        if self.check:
            check_writable(check_path(self.output), "the check's picture")

    @property
    def attaches(self) -> bool:
        """Tell whether any method is requested, by name or by a preset."""
        return bool(self.methods) or self.preset not in (None, NONE)

    @property
    def output_fps(self) -> float:
        """Return the frame rate of the file."""
        return self.fps or (EMBEDDED_FPS if self.embedded else OTHER_FPS)

    def call_arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that are set, except the prompt."""
        names = (*CALL_ARGUMENTS, *SET_ALONE)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def full_call(self, call: CallSignature, pictures: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments of the pipeline's call that are set, except the prompt, with these pictures."""
        arguments = {**self.beside(call), **self.call_arguments(), **rate_arguments(self, call), **pictures}
        arguments |= call.free_arguments(self.arg)
        if {*CONDITIONS} & {*pictures}:
            arguments.pop("strength", None)  # which each condition has
        return arguments

    def beside(self, call: CallSignature) -> dict[str, Any]:
        """Return the arguments of an embedded model's call that a request has no field for."""
        defaults = assets().model_defaults(self.embedded) if self.embedded else {}
        beside = {name: value for name, value in defaults.items() if name not in CALL_ARGUMENTS and call.takes(name)}
        if "true_cfg_scale" in beside and self.guidance_scale is not None:
            beside["true_cfg_scale"] = self.guidance_scale  # what guides this model by a negative prompt
        return beside


def embedded_name(model: str | None) -> str | None:
    """Return the name of an embedded model, `EMBEDDED` for None; None for a hub id or a folder."""
    name = model or EMBEDDED
    return name if name in embedded_names() else None


def side_car_path(output: Path) -> Path:
    """Return the path of an output's JSON side-car."""
    return output.with_name(output.name + ".json")


def check_path(output: Path) -> Path:
    """Return the path of the picture in which an output is compared with the dense run."""
    return output.with_name(f"{output.stem}.check.png")


class Resolved(NamedTuple):
    """A request that can be met."""

    request: Request  # the request, with the family's defaults filled in
    family: Family | None  # the model's sizes; None: they are not known, and all is left to the pipeline
    notes: list[str]  # what was changed
    warnings: list[str]  # what the user probably wants to change


def resolve(request: Request) -> Resolved:
    """Check a request against its model's configs and pipeline class, and fill in the family's defaults.

    Raises:
        ConfigError: for words the embedded model does not know, sizes the model can't make (with the nearest), or
            what its pipeline does not take or needs besides.
        UnsupportedModel: if the model is not found, or no adapter can take the methods requested.
    """
    if request.embedded:
        for prompt in (request.prompt, request.negative_prompt or ""):
            check_words(prompt, request.embedded, named=request.model is not None)
    request, opened = named_by_file(request)
    files = read_model_files(request.source, request.revision)
    request, call, notes = _resolve_call(request, files)
    warnings = [*slow_products(request), *proposals(request, call)]
    family = _family_of(files, request)
    request, rate = with_rate(request, call)
    notes += [*idle_negative(request, call), *rate, *lost_sound(request.output, call)]
    request, seen = follow_inputs(request, call, files, family)
    notes = opened + notes + seen
    if family is None:
        check_even(request.output, *(request.scale * (value or 0) for value in (request.height, request.width)))
        return Resolved(*fitted(request, files, None, notes, warnings))
    request, rounded = _resolve_sizes(request, family, call)
    warnings += _check_methods(files, family, request)
    sizes = sizes_of(request, family)
    check_fits(**sizes)
    check_even(request.output, sizes["height"] * request.scale, sizes["width"] * request.scale)
    return Resolved(*fitted(request, files, family, notes + rounded, warnings))


def _resolve_call(request: Request, files: ModelFiles) -> tuple[Request, CallSignature, list[str]]:
    """Check a request against its pipeline's call, and fill in an embedded model's defaults; also return notes."""
    cls = pipeline_class(files)
    call = CallSignature.of(cls)
    request, notes = negative_of_methods(request, call)
    call.check(request.full_call(call, arguments_of(inputs_of(request), call)))
    if request.guidance_scale_2 is not None and call.name.startswith("Wan") and not files.index.get("boundary_ratio"):
        raise ConfigError(
            f"guidance_scale_2 is for a model of two experts, got {request.guidance_scale_2:g} for {files.name}, which "
            "has one; leave it out"
        )
    if request.solver is not None or request.flow_shift is not None:
        make_scheduler(read_scheduler(files), request.solver, request.flow_shift)
        if request.flow_shift is not None and request.solver in ("unipc", "dpm++") and OWN_SHIFT.search(call.name):
            raise ConfigError(
                f"{call.name} works the noise shift of solver {request.solver!r} out itself, got flow_shift "
                f"{request.flow_shift:g}; leave one of both out, or take solver 'euler'"
            )
    check_weights(request, files)
    check_vae(request, files)
    check_loras(request, cls, files)
    if request.embedded:
        defaults = {"dtype": "float32", **assets().model_defaults(request.embedded)}
        names = ["dtype", *(name for name in CALL_ARGUMENTS if call.takes(name))]
        request = _filled(request, {name: defaults[name] for name in names if name in defaults})
    return request, call, notes


def _resolve_sizes(request: Request, family: Family, call: CallSignature) -> tuple[Request, list[str]]:
    """Fill in a family's sizes, refuse those that it can't make, and round the frames; also return notes."""
    request = _filled(request, {name: getattr(family, name) for name in SIZES if call.takes(name)})
    for name, multiple in zip(("height", "width"), pixel_multiples(family), strict=True):
        value = getattr(request, name)
        if value is not None:
            check_multiple(name, value, multiple, request.model or EMBEDDED)
    if request.num_frames is None:
        return request, []
    frames = rounded_frames(family, request.num_frames)
    if frames == request.num_frames:
        return request, []
    note = f"{request.num_frames} frames are rounded to {frames}, as the pipeline does"
    return dataclasses.replace(request, num_frames=frames), [note]


def _filled(request: Request, defaults: Mapping[str, Any]) -> Request:
    missing = {name: value for name, value in defaults.items() if getattr(request, name) is None}
    return dataclasses.replace(request, **missing)


def read_prompts(path: Path, named: str = "--prompt-file") -> tuple[str, ...]:
    """Read prompts from a text file, one per line; errors say how it was ``named``.

    Empty lines are left out, and those that begin with ``#``.
    """
    lines = [line.strip() for line in prompt_text(path, named).splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ConfigError(f"{named} {path} has no prompt in it; write one per line")
    return prompts


def prompt_text(path: Path, named: str) -> str:
    """Return the text of a file of prompts; errors say how it was ``named``."""
    try:
        return read_text(path, "utf-8-sig")  # some editors write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{named} {path} can't be read ({reason}); give a file of one prompt per line") from None


def check_words(prompt: str, embedded: str, *, named: bool = True) -> None:
    """Refuse words that an embedded model never saw, and signs that are no words.

    ``named``: the user chose the model, instead of naming none.
    """
    try:
        words = assets().check_prompt(prompt, embedded)
    except ValueError as error:
        default = "" if named else f"no model was named, so the tiny embedded {embedded} was taken: "
        raise ConfigError(f"{default}{error}; use these, or name another model") from None
    if prompt and not words:
        raise ConfigError(f'prompt {prompt!r} has no word in it; say what to show, such as "a red circle"')


def _check_methods(files: ModelFiles, family: Family, request: Request) -> list[str]:
    """Refuse methods, and a backend, that can't be attached; returns warnings of a size beyond the trained one."""
    layout = token_layout(family, **sizes_of(request, family))
    adapter = adapter_for(str(files.transformer.get("_class_name")))
    check_lengths(adapter.name, adapter.rope, files.transformer, layout.lengths)
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers, config=files.transformer)
    if request.preset is not None:
        check_preset(request.preset, few_steps_of(request, family, files), request.num_inference_steps, LEAST_STEPS)
    methods = [*request.methods, *preset_methods(request.preset or NONE, model, request.methods).configs]
    handlers = make_handlers(methods, model)
    check_backend(request.backend, request.dense or "auto", handlers)
    for handler in handlers:
        handler.check_layout(layout)
    return advice(adapter, family, layout, methods)


def _family_of(files: ModelFiles, request: Request) -> Family | None:
    try:
        return files.identify()[1]
    except UnsupportedModel:
        if request.attaches:
            adapter_for(str(files.transformer.get("_class_name")))  # a method needs an adapter, and no sizes
        return None
