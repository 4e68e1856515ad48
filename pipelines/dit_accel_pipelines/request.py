"""What `generate` is asked for, and every check that can be made before weights are loaded."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dit_accel_assets
from dit_accel_kernels import BACKENDS

from dit_accel.adapters.adapter import Family
from dit_accel.adapters.model_files import ModelFiles, read_model_files
from dit_accel.errors import ConfigError, UnsupportedModel, did_you_mean
from dit_accel.estimate.sizes import check_multiple, pixel_multiples, rounded_frames
from dit_accel.methods.config import MethodConfig

from .media import check_output

EMBEDDED = "wan-tiny"
"""Name of the model that ships with the project."""

EMBEDDED_FPS, OTHER_FPS = 8, 16
EMBEDDED_GUIDANCE = 4.0
"""The guidance that the embedded model was trained to be judged at."""
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential", "group")
MAX_SCALE = 64

Offload = Literal["none", "model", "sequential", "group"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to generate; what is None takes the model's default.

    Attributes:
        prompts: one video (or image) each.
        output: file to write; with several prompts a number is put before the suffix.
        negative_prompt: what guidance leads away from.
        model: hub id or folder; None is the embedded model.
        height: output height in pixels.
        width: output width in pixels.
        num_frames: output frames.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 switches it off.
        seed: seed of the noise, the same for every prompt.
        dtype: number format of the weights; None: float32 on a CPU, else bfloat16.
        device: torch device; None: the accelerator if there is one.
        offload: how weights wait in main memory.
        compile: compile the transformer's repeated blocks.
        fps: frames a second of the file.
        scale: whole number by which every pixel is enlarged.
        methods: method configs to attach.
        backend: kernel backend of the methods.

    Raises:
        ConfigError: for a value out of range, or an output that can't be written.
    """

    prompts: tuple[str, ...]
    output: Path
    negative_prompt: str | None = None
    model: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    dtype: Dtype | None = None
    device: str | None = None
    offload: Offload = "none"
    compile: bool = False
    fps: float | None = None
    scale: int = 1
    methods: tuple[MethodConfig, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("generate needs a prompt, got none; write one in quotes, or give --prompt-file")
        for name, known in (("dtype", DTYPES), ("offload", OFFLOADS), ("backend", BACKENDS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"there is no {name} {value!r}; {did_you_mean(value, known)}")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps must be >= 1, got {self.num_inference_steps}")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise ConfigError(f"fps must be above 0 and at most 240, got {self.fps:g}")
        if not 1 <= self.scale <= MAX_SCALE:
            raise ConfigError(f"scale must be a whole number from 1 to {MAX_SCALE}, got {self.scale}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.backend != "auto" and not self.methods:
            raise ConfigError(
                f"backend {self.backend!r} was asked for and no method would use it; switch one on, say --radial"
            )
        check_output(self.output)

    @property
    def is_embedded(self) -> bool:
        """Tell whether the model is the one that ships with the project."""
        return self.model in (None, EMBEDDED)

    @property
    def source(self) -> str:
        """Return what diffusers loads: a folder or a hub id."""
        return str(dit_accel_assets.model_path()) if self.model in (None, EMBEDDED) else str(self.model)

    @property
    def output_fps(self) -> float:
        """Return the frame rate of the file."""
        return self.fps or (EMBEDDED_FPS if self.is_embedded else OTHER_FPS)

    def outputs(self) -> list[Path]:
        """Return one path a prompt: the output itself, or with a number before its suffix."""
        if len(self.prompts) == 1:
            return [self.output]
        digits = max(2, len(str(len(self.prompts))))
        names = [f"{self.output.stem}-{n:0{digits}d}{self.output.suffix}" for n in range(1, len(self.prompts) + 1)]
        return [self.output.with_name(name) for name in names]


def settle(request: Request) -> tuple[Request, Family | None, list[str]]:
    """Check a request against its model's configs, and fill in the family's defaults.

    Returns:
        The request, the family (None where no adapter knows the model), and notes on what was changed.

    Raises:
        ConfigError: for words the embedded model does not know, or sizes the model can't make (with the nearest).
        UnsupportedModel: if the model is not found, or no adapter can take the methods asked for.
    """
    if request.is_embedded:
        _check_words(request)
    files = read_model_files(request.source)
    family = _family_of(files, request)
    if family is None:
        return request, None, []
    notes: list[str] = []
    fills: dict[str, Any] = {
        name: getattr(request, name) if getattr(request, name) is not None else getattr(family, name)
        for name in ("height", "width", "num_frames", "num_inference_steps")
    }
    model = request.model or EMBEDDED
    for name, multiple in zip(("height", "width"), pixel_multiples(family), strict=True):
        check_multiple(name, fills[name], multiple, model)
    frames = rounded_frames(family, fills["num_frames"])
    if frames != fills["num_frames"]:
        notes.append(f"{fills['num_frames']} frames are rounded to {frames}, as the pipeline does")
    if request.is_embedded:
        fills["dtype"] = request.dtype or "float32"
        fills["guidance_scale"] = EMBEDDED_GUIDANCE if request.guidance_scale is None else request.guidance_scale
    return dataclasses.replace(request, **{**fills, "num_frames": frames}), family, notes


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one a line; empty lines are left out.

    Raises:
        ConfigError: if the file can't be read or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--prompt-file {path} can't be read ({reason}); give a text file, one prompt a line"
        ) from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompt-file {path} holds no prompt; write one a line")
    return prompts


def _check_words(request: Request) -> None:
    for prompt in (*request.prompts, request.negative_prompt or ""):
        try:
            dit_accel_assets.check_prompt(prompt)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _family_of(files: ModelFiles, request: Request) -> Family | None:
    try:
        return files.identify()[1]
    except UnsupportedModel:
        if request.methods:
            raise
        return None
