"""What `generate` takes, and every check that can be made before weights are loaded."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from dit_accel_kernels import BACKENDS

from dit_accel.adapters.adapter import Family
from dit_accel.adapters.embedded import assets, embedded_names
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.model_files import ModelFiles, model_source, read_model_files
from dit_accel.adapters.rotary import check_lengths
from dit_accel.attachment.backends import Backend, Dense, check_backend
from dit_accel.errors import ConfigError, UnsupportedModel, did_you_mean
from dit_accel.estimate.sizes import advice, check_multiple, check_steps, pixel_multiples, rounded_frames, token_layout
from dit_accel.files import check_writable
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.presets import LEVELS, NONE, preset_methods

from .lora import check_lora
from .media import check_even, check_output, read_image, read_video
from .memory import check_fits
from .negative import idle_negative, negative_of_methods
from .pipeline_call import PICTURES, PipelineCall, pipeline_class
from .solvers import check_solver

EMBEDDED = "wan-tiny"
"""The embedded model that is taken where none is named."""

EMBEDDED_FPS, OTHER_FPS = 8, 16
LEAST_FPS = 0.01
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential", "group")
MAX_SCALE = 64

SIZES = ("height", "width", "num_frames", "num_inference_steps")
"""What a family knows a default for."""

CALL_ARGUMENTS = ("negative_prompt", *PICTURES, *SIZES, "guidance_scale")
"""Arguments of the pipeline's call that a request holds."""

Offload = Literal["none", "model", "sequential", "group"]
Dtype = Literal["float32", "bfloat16", "float16"]


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
class Request(NamesModel):
    """What to generate; what is None takes the model's default.

    Attributes:
        prompts: one video (or image) each.
        output: file to write; with several prompts a number is put before the suffix.
        negative_prompt: what guidance leads away from.
        image: image file to start from.
        video: video file to start from.
        model: hub id, folder or an embedded model's name; None is `EMBEDDED`.
        height: output height in pixels.
        width: output width in pixels.
        num_frames: output frames.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 switches it off.
        seed: seed of the first prompt's noise; each prompt after it has the next.
        same_seed: all prompts have the first one's, to be compared.
        dtype: number format of the weights; None: float32 on a CPU, else bfloat16.
        device: torch device; None: the accelerator if there is one.
        offload: which weights wait in main memory until they are needed: ``none``; a component at a time (``model``);
            a layer at a time (``sequential``); layers, fetched ahead (``group``).
        compile: compile the transformer's repeated blocks.
        fps: frames per second of the file.
        scale: whole number by which every pixel is enlarged.
        solver: a name of `solvers.SOLVERS` that takes the place of the model's own; None: that.
        flow_shift: noise shift of that solver; None: the model's own.
        lora: a LoRA to load: a file, a folder that holds one, or a hub id.
        methods: method configs to attach.
        preset: level of methods that are chosen for the model beside these, which win; None and ``none``: none are.
        check: generate dense too, from the same seed, and write how far apart the two are, `check_path`.
        backend: kernel backend of the methods.
        dense: what computes dense attention beside them, as `attach` has it; None: its own choice.

    Raises:
        ConfigError: for a value out of range, or an output that can't be written.
    """

    prompts: tuple[str, ...]
    output: Path
    negative_prompt: str | None = None
    image: Path | None = None
    video: Path | None = None
    model: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    same_seed: bool = False
    dtype: Dtype | None = None
    device: str | None = None
    offload: Offload = "none"
    compile: bool = False
    fps: float | None = None
    scale: int = 1
    solver: str | None = None
    flow_shift: float | None = None
    lora: str | None = None
    methods: tuple[MethodConfig, ...] = ()
    preset: str | None = None
    check: bool = False
    backend: Backend = "auto"
    dense: Dense | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("generate needs a prompt, got none; write one in quotes, or give --prompt-file")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        for name, known in (
            ("dtype", DTYPES), ("offload", OFFLOADS), ("backend", BACKENDS), ("preset", (*LEVELS, NONE)),
            ("dense", get_args(Dense)),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"there is no {name} {value!r}; {did_you_mean(value, known)}")
        if self.num_inference_steps is not None:
            check_steps(self.num_inference_steps)
        if self.fps is not None and not LEAST_FPS <= self.fps <= 240:
            raise ConfigError(f"fps must be from {LEAST_FPS} to 240, got {self.fps:g}")
        if self.solver is not None:
            check_solver(self.solver)
        if self.flow_shift is not None and (self.solver is None or not 0 < self.flow_shift < math.inf):
            raise ConfigError(
                f"flow_shift must be above 0, and goes with a solver, got {self.flow_shift}, {self.solver}"
            )
        if not 1 <= self.scale <= MAX_SCALE:
            raise ConfigError(f"scale must be a whole number from 1 to {MAX_SCALE}, got {self.scale}")
        if not (self.seed >= 0 and self.seeds()[-1] < 2**63):
            raise ConfigError(
                f"seeds must be from 0 to 2**63 - 1, got {self.seed} for the first of {len(self.prompts)} prompts"
            )
        if self.backend != "auto" and not self.attaches:
            raise ConfigError(
                f"backend {self.backend!r} was requested, but no method would use it; switch one on, such as --radial"
            )
        if self.dense is not None and not self.attaches:
            raise ConfigError(
                f"dense {self.dense!r} was requested, but no method is attached; switch one on, such as --radial"
            )
        if self.check and not self.attaches:
            raise ConfigError(
                "check compares methods with the dense run, and no method was requested; switch one on, such as "
                "--preset balanced"
            )
        if self.lora is not None:
            check_lora(self.lora)
        for output in self.outputs():
            check_output(output)
            check_writable(side_car_path(output))
            if self.check:
                check_writable(check_path(output), "the check's picture")

    @property
    def attaches(self) -> bool:
        """Return whether any method is requested, by name or by a preset."""
        return bool(self.methods) or self.preset not in (None, NONE)

    @property
    def output_fps(self) -> float:
        """Return the frame rate of the file."""
        return self.fps or (EMBEDDED_FPS if self.embedded else OTHER_FPS)

    def outputs(self) -> list[Path]:
        """Return one path per prompt: the output itself, or with a number before its suffix."""
        if len(self.prompts) == 1:
            return [self.output]
        digits = max(2, len(str(len(self.prompts))))
        names = [f"{self.output.stem}-{n:0{digits}d}{self.output.suffix}" for n in range(1, len(self.prompts) + 1)]
        return [self.output.with_name(name) for name in names]

    def seeds(self) -> list[int]:
        """Return one seed per prompt."""
        return [self.seed + (0 if self.same_seed else place) for place in range(len(self.prompts))]

    def call_arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that are set, except the prompt."""
        return {name: getattr(self, name) for name in CALL_ARGUMENTS if getattr(self, name) is not None}

    def beside(self, call: PipelineCall) -> dict[str, Any]:
        """Return what an embedded model's call is made with besides, which a request has no field for."""
        own = assets().model_defaults(self.embedded) if self.embedded else {}
        beside = {name: value for name, value in own.items() if name not in CALL_ARGUMENTS and call.takes(name)}
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


class Settled(NamedTuple):
    """A request that can be met.

    Attributes:
        request: the request, with the family's defaults filled in.
        family: the model's sizes; None: they are not known, and all is left to the pipeline.
        notes: what was changed.
        warnings: what the user probably wants to change.
    """

    request: Request
    family: Family | None
    notes: list[str]
    warnings: list[str]


def settle(request: Request) -> Settled:
    """Check a request against its model's configs and pipeline class, and fill in the family's defaults.

    Raises:
        ConfigError: for words the embedded model does not know, sizes the model can't make (with the nearest), or
            what its pipeline does not take or needs besides.
        UnsupportedModel: if the model is not found, or no adapter can take the methods requested.
    """
    embedded = request.embedded
    if embedded:
        for prompt in (*request.prompts, request.negative_prompt or ""):
            check_words(prompt, embedded, named=request.model is not None)
    files = read_model_files(request.source)
    cls = pipeline_class(files)
    call = PipelineCall.of(cls)
    request, notes = negative_of_methods(request, call)
    call.check(request.call_arguments())
    if request.lora is not None and not hasattr(cls, "load_lora_weights"):
        raise ConfigError(f"{cls.__name__} takes no LoRA, got {request.lora}; leave it out")
    if embedded:
        own = assets().model_defaults(embedded)
        fills = {name: own[name] for name in CALL_ARGUMENTS if name in own and call.takes(name)}
        fills = {name: value for name, value in fills.items() if getattr(request, name) is None}
        request = dataclasses.replace(request, dtype=request.dtype or "float32", **fills)
    family = _family_of(files, request)
    notes += idle_negative(request, call)
    if family is None:
        check_even(request.output, *(request.scale * (value or 0) for value in (request.height, request.width)))
        return Settled(request, None, notes, [])
    fills = {name: getattr(family, name) for name in SIZES if call.takes(name) and getattr(request, name) is None}
    request = dataclasses.replace(request, **fills)
    for name, multiple in zip(("height", "width"), pixel_multiples(family), strict=True):
        value = getattr(request, name)
        if value is not None:
            check_multiple(name, value, multiple, request.model or EMBEDDED)
    if request.num_frames is not None:
        frames = rounded_frames(family, request.num_frames)
        if frames != request.num_frames:
            notes.append(f"{request.num_frames} frames are rounded to {frames}, as the pipeline does")
        request = dataclasses.replace(request, num_frames=frames)
    warnings = _check_methods(files, family, request)
    height, width = request.height or family.height, request.width or family.width
    check_fits(height=height, width=width, num_frames=request.num_frames or 1)
    check_even(request.output, height * request.scale, width * request.scale)
    return Settled(request, family, notes, warnings)


def read_pictures(request: Request) -> dict[str, Any]:
    """Read the files that a request starts from: ``image``, a PIL image; ``video``, a list of them."""
    pictures: dict[str, Any] = {}
    if request.image is not None:
        pictures["image"] = read_image(request.image)
    if request.video is not None:
        pictures["video"] = read_video(request.video)
    return pictures


def read_prompts(path: Path, named: str = "--prompt-file") -> tuple[str, ...]:
    """Read prompts from a text file, one per line; errors say how it was ``named``.

    Empty lines are left out, and those that begin with ``#``.

    Raises:
        ConfigError: if the file can't be read or has no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{named} {path} can't be read ({reason}); give a text file with one prompt per line"
        ) from None
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise ConfigError(f"{named} {path} has no prompt in it; write one per line")
    return prompts


def check_words(prompt: str, embedded: str, *, named: bool = True) -> None:
    """Refuse words that an embedded model never saw, and signs that are no words.

    Args:
        named: the user chose the model, instead of naming none.

    Raises:
        ConfigError: with the words, and those that it knows.
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
    frames = family.num_frames if request.num_frames is None else request.num_frames
    layout = token_layout(
        family, height=request.height or family.height, width=request.width or family.width, num_frames=frames
    )
    adapter = adapter_for(str(files.transformer.get("_class_name")))
    check_lengths(adapter.name, adapter.rope, files.transformer, layout.lengths)
    model = Model(
        adapter=adapter, family=family, heads=family.heads, layers=family.layers, config=files.transformer
    )  # fmt: skip
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
