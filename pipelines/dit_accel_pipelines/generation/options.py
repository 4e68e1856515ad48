"""The options of a run: each is declared once, with its flag, help and range, for `Request` and for all commands.

A command takes those that it has by inheriting from one of the classes here. This file loads no torch.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from dit_accel.cli.method_options import PANEL
from dit_accel.cli.run_options import Frames, InferenceSteps, Pixels
from dit_accel.errors import ConfigError

from .ranges import ABOVE_ZERO, FINITE, between

LOAD, RUN = "Weights and memory", "Running"
PANELS = (None, LOAD, RUN, PANEL)
"""The groups of options in the help, in its order."""


def option(help: str, *flags: str, panel: str | None = None, **more: Any) -> Any:
    """Return an option's flag for its annotation, below a panel of the help."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


_MODEL = "A hub id, a folder, or an embedded model that `dit-accel models` lists; default: wan-tiny."
Model = Annotated[str | None, option(_MODEL, "--model", "-m", metavar="MODEL")]
ModelBesideMetrics = Annotated[str | None, option(_MODEL, "--model", metavar="MODEL")]
"""Of commands whose -m is a metric."""
Guidance = Annotated[float | None, option("Guidance scale; 1 switches guidance off."), FINITE]
Seed = Annotated[int, option("Seed of the noise.")]
Dtype = Annotated[
    str | None,
    option(
        "float32, bfloat16 or float16; default: float32 on a CPU and for embedded models, else bfloat16.", panel=LOAD,
        metavar="DTYPE",
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    option("cpu, cuda, cuda:1, mps ...; default: the accelerator if there is one.", panel=RUN, metavar="DEVICE"),
]
Offload = Annotated[
    str,
    option(
        "What waits in main memory: none, text (its encoders), model, group or sequential.", panel=LOAD, metavar="HOW"
    ),
]
Backend = Annotated[str, option("Kernel backend of the methods.", panel=RUN, metavar="NAME")]
Quiet = Annotated[bool, option("No progress, notes or report.", "--quiet", "-q", panel=RUN)]
Json = Annotated[bool, option("Print JSON.", "--json")]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedOptions:
    """How large what is made is, and where: options of all commands that run a model."""

    height: Pixels = None
    width: Pixels = None
    num_frames: Frames = None
    guidance_scale: Guidance = None
    device: Device = None
    dtype: Dtype = None
    offload: Offload = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedOptions(PlacedOptions):
    """What is made whatever the prompt, and where: options of all commands that do not search it."""

    negative_prompt: Annotated[str | None, option("What guidance should lead away from.", metavar="TEXT")] = None
    solver: Annotated[
        str | None, option("unipc, euler or dpm++ in place of the model's own.", panel=RUN, metavar="NAME")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(SharedOptions):
    """All options that `generate` and its `Request` share."""

    model: Model = None
    preset: Annotated[
        str | None,
        option("Methods chosen for the model: careful, balanced, fast or none; those that are named win.",
               metavar="LEVEL", panel=PANEL),
    ] = None  # fmt: skip
    check: Annotated[
        bool, option("Generate dense too, and compare: PSNR, SSIM, FILE.check.png.", "--check", panel=PANEL)
    ] = False
    num_inference_steps: InferenceSteps = None
    guidance_scale_2: Annotated[
        float | None, option("Guidance scale of the second of two experts; default: the first's."), FINITE
    ] = None
    true_cfg_scale: Annotated[
        float | None, option("Scale of a negative prompt, of models that have both this and a guidance scale."), FINITE
    ] = None
    seed: Seed = 0
    image: Annotated[
        Sequence[str],
        option(
            "Image to start from; NAME says what for: first, last, mask, control, reference, or a frame's number.",
            metavar="[NAME=]FILE",
        ),
    ] = ()
    video: Annotated[
        Sequence[str], option("Video to start from; NAME: mask, control, pose, face ...", metavar="[NAME=]FILE")
    ] = ()
    strength: Annotated[
        float | None,
        option("How far an image or video to start from is changed; how firmly a frame of LTX is held."),
        between(0, 1),
    ] = None
    lora: Annotated[
        Sequence[str],
        option(
            "A LoRA: a file, its folder or a hub id, with a weight; transformer_2:FILE for the second expert.",
            panel=LOAD,
            metavar="FILE[=WEIGHT]",
        ),
    ] = ()
    fuse_lora: Annotated[bool, option("Add the LoRAs to the model's weights.", "--fuse-lora", panel=LOAD)] = False
    transformer: Annotated[
        Sequence[str],
        option("The transformer's weights, .safetensors or .gguf; transformer_2:FILE likewise.", panel=LOAD,
               metavar="FILE"),
    ] = ()  # fmt: skip
    variant: Annotated[str | None, option("Files of the model to load, such as fp16.", panel=LOAD, metavar="NAME")] = (
        None
    )
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", panel=LOAD, metavar="NAME")] = None
    quantize: Annotated[
        str | None,
        option("Bits of the transformer's weights: fp8, int8 (activations too), fp8-weights, int8-weights, int4, nf4.",
               panel=LOAD, metavar="KIND"),
    ] = None  # fmt: skip
    quantize_text_encoder: Annotated[
        str | None, option("The same of the text encoders' weights.", panel=LOAD, metavar="KIND")
    ] = None
    vae: Annotated[
        str | None, option("Autoencoder in parts: tile, slice or tile,slice.", panel=LOAD, metavar="HOW")
    ] = None
    max_memory: Annotated[
        str | None,
        option("Stay below it, such as 16GB: picks --offload and --vae tile as needed.", panel=LOAD, metavar="SIZE"),
    ] = None
    fps: Annotated[
        float | None,
        option("Frames per second, of the model where it has a rate; default: its own, else 16 (embedded: 8)."),
        between(0.01, 240),
    ] = None
    quality: Annotated[
        float | None,
        option("Of an .mp4 or .webm, from 1 to 10, as diffusers' export_to_video; default: 7.25."),
        between(1, 10),
    ] = None
    scale: Annotated[int, option("Enlarge every pixel so many times."), between(1, 64, "a whole number ")] = 1
    flow_shift: Annotated[
        float | None, option("Noise shift; default: the model's own.", "--shift", panel=RUN), ABOVE_ZERO
    ] = None
    arg: Annotated[
        Sequence[str],
        option("Any other argument of the pipeline's call; VALUE as in TOML.", panel=RUN, metavar="NAME=VALUE"),
    ] = ()
    compile: Annotated[bool, option("Compile the transformer's blocks.", "--compile", panel=RUN)] = False
    backend: Backend = "auto"
    attention_backend: Annotated[
        str | None, option("Attention of what no method touches, by diffusers' names.", panel=RUN, metavar="NAME")
    ] = None
    dense: Annotated[
        str | None, option("Dense attention: user (yours) or auto (the faster on a CPU).", panel=RUN, metavar="HOW")
    ] = None


def with_option_fields(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command whose first parameter is a dataclass of options as one that has an option for each field.

    In the help the class's own fields stand before those of its bases, by `PANELS`.
    """
    signature = inspect.signature(command, eval_str=True)
    taken, *parameters = signature.parameters.values()
    hints = typing.get_type_hints(taken.annotation, include_extras=True)
    declared = [inspect.get_annotations(cls) for cls in taken.annotation.__mro__]
    panels = {name: _panel(hint) for name, hint in hints.items()}
    fields = sorted(
        dataclasses.fields(taken.annotation),
        key=lambda field: (panels[field.name], [field.name in names for names in declared].index(True)),
    )

    @functools.wraps(command)
    def run(**arguments: Any) -> Any:
        options = taken.annotation(**{field.name: arguments.pop(field.name) for field in fields})
        return command(options, **arguments)

    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=_for_typer(hints[field.name]))
        for field in fields
    ]
    run.__signature__ = signature.replace(parameters=[*options, *parameters])  # type: ignore[attr-defined]
    return run


def _for_typer(hint: Any) -> Any:
    """Return the annotation of an option that may be repeated as Typer knows it: a list."""
    kind, *more = typing.get_args(hint) or [hint]
    return Annotated[list[str], *more] if kind == Sequence[str] else hint


def _panel(hint: Any) -> int:
    """Return the place of an option's group in the help."""
    panels = [part.rich_help_panel for part in typing.get_args(hint) if isinstance(part, OptionInfo)]
    return PANELS.index(panels[0]) if panels and panels[0] in PANELS else 0


def help_and_default(name: str) -> tuple[str, Any]:
    """Return the help and the default of a request's option."""
    hint = typing.get_type_hints(RunOptions, include_extras=True)[name]
    (text,) = (part.help or "" for part in typing.get_args(hint) if isinstance(part, OptionInfo))
    return text, next(field.default for field in dataclasses.fields(RunOptions) if field.name == name)


def require_one_document(json: bool, count: int) -> None:
    """Raise `ConfigError` if several processes would print JSON."""
    if json and count > 1:
        raise ConfigError(
            f"--json prints one document, and {count} processes would print as many; leave it out, and read what lies "
            "beside the outputs"
        )


def fields_of(target: type[Any], options: Any) -> dict[str, Any]:
    """Return the options of whose names a dataclass has fields."""
    fields = (field.name for field in dataclasses.fields(target))
    return {name: getattr(options, name) for name in fields if hasattr(options, name)}
