"""What a pipeline can be called with, read off its class, so that a request is refused before weights are loaded."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.adapters.model_files import ModelFiles, read_model_files
from dit_accel.errors import ConfigError, UnsupportedModel, did_you_mean
from dit_accel.methods.toml import parse_value

from .quiet import quiet_diffusers

ALWAYS_GIVEN = ("self", "prompt", "generator", "output_type")

PICTURES: Mapping[str, Sequence[str]] = {
    "image": (
        "image", "images", "cond_image", "last_image", "mask_image", "mask", "control_image", "control_mask",
        "reference_images", "image_reference", "reference_image", "conditions",
    ),
    "video": (
        "video", "control_video", "mask", "mask_video", "pose_video", "face_video", "background_video", "conditions",
        "reference_conditions",
    ),
}  # fmt: skip
"""Option -> the arguments of diffusers' pipelines that hold what it names."""

SHORT: Mapping[str, Sequence[str]] = {
    "first": ("conditions", "image", "cond_image"),
    "last": ("conditions", "last_image"),
    "mask": ("mask", "mask_image", "mask_video", "control_mask"),
    "control": ("control_image", "control_video"),
    "reference": (
        "reference_images", "image_reference", "reference_image", "reference_conditions", "images", "image",
    ),
    "pose": ("pose_video",), "face": ("face_video",), "background": ("background_video",),
}  # fmt: skip
"""What a file may be named -> the arguments that mean it, of which a pipeline has one."""

PLAIN: Mapping[str, Sequence[str]] = {
    "image": ("conditions", "image", "images", "cond_image", "reference_images", "control_image"),
    "video": ("reference_conditions", "conditions", "video", "control_video"),
}
"""Option -> the argument that a file without a name is for."""

TENSORS = re.compile("EasyAnimate|AnyFlow")
"""Pipeline classes that take tensors in place of pictures."""

OPTIONS: Mapping[str, str] = {
    "prompt": "the prompt", "generator": "--seed", "flow_shift": "--shift", "frame_rate": "--fps", "fps": "--fps",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
            "guidance_scale_2", "true_cfg_scale", "strength",
        )
    },
}  # fmt: skip
"""Arguments of the call that options set."""

NOT_TEXT = re.compile(
    "^(self|return_dict|output_type)$|embeds|latents|callback|_mask(_2)?$|_per_prompt$|kwargs$|images?$|_ids$|thw$|tiles$"
)
"""Arguments of the call that no text can hold, or that decide what comes back."""

NEEDED: Sequence[tuple[re.Pattern[str], Sequence[str]]] = (
    (re.compile(r"Img2Img|Inpaint|Fill|ImageEdit|Image(To|2)Video|(?<!T)I2[IV]"), PLAIN["image"][:3]),
    (re.compile("VideoToVideo"), ("video",)),
    (re.compile("VideoToWorld"), ("image", "video")),
    (re.compile("Inpaint|Fill"), SHORT["mask"]),
    (re.compile("Control"), SHORT["control"]),
)
"""Names of pipeline classes, and the arguments of which they need one although their signature makes it optional."""


@dataclass(frozen=True, slots=True)
class CallSignature:
    """The call of one pipeline class: its name and its parameters."""

    name: str
    parameters: Mapping[str, inspect.Parameter]

    @classmethod
    def of(cls, pipeline: type) -> "CallSignature":
        """Read the call of a pipeline class."""
        return cls(pipeline.__name__, inspect.signature(pipeline.__call__).parameters)

    def takes(self, argument: str) -> bool:
        """Tell whether the pipeline has a parameter of this name."""
        return argument in self.parameters

    def default(self, argument: str) -> Any:
        """Return a parameter's default; None where there is no such parameter, or it has no default."""
        parameter = self.parameters.get(argument)
        return None if parameter is None or parameter.default is parameter.empty else parameter.default

    def argument_of(self, option: str, name: str | None) -> str | None:
        """Return the argument that a file of an option is for: a short name, its own, or None of a file without one."""
        if TENSORS.search(self.name):
            return None
        if name is not None and name.isdecimal():
            name = "first"  # a frame of conditions
        names = PLAIN[option] if name is None else SHORT.get(name, (name,))
        frames = self.takes("video")  # without which a mask is one picture
        known = PICTURES[option] if option == "image" or frames else set(PICTURES[option]) - {"mask"}
        argument = next((argument for argument in names if argument in known and self.takes(argument)), None)
        return "conditions" if argument in PICTURES and self.takes("conditions") else argument

    def files(self) -> dict[str, str]:
        """Return the arguments that files are for, with the option for each, such as ``--image last=FILE``."""
        options: dict[str, str] = {}
        for option in ("video", "image"):
            for name in (None, *SHORT):
                if argument := self.argument_of(option, name):
                    options.setdefault(argument, f"--{option} {name}=FILE" if name else f"--{option} FILE")
        if "conditions" in options:
            options["conditions"] = "--image [first|last|NUMBER=]FILE, --video [NUMBER=]FILE"
        return options

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that the pipeline does not take, and a call that lacks what it needs."""
        if not self.takes("prompt"):
            raise ConfigError(f"{self.name} takes no prompt, so generate can't run it; call it from Python")
        for argument, value in arguments.items():
            if not self.takes(argument):
                raise ConfigError(f"{self.name} takes no {argument}, got {_shown(value)}; {self._instead(argument)}")
        needed = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        missing = [name for name in needed if name not in {*ALWAYS_GIVEN, *arguments}]
        beyond = [name for name in missing if not _option_of(name)]
        if beyond:
            raise ConfigError(f"{self.name} needs {', '.join(beyond)}, which generate can't give; call it from Python")
        groups = [[name] for name in missing] + [
            [name for name in needed if self.takes(name)]
            for names, needed in NEEDED
            if names.search(self.name) and not TENSORS.search(self.name) and not {*needed} & {*missing, *arguments}
        ]
        if groups := [names for names in groups if names]:
            options = " and ".join(" or ".join(self.files()[name] for name in names) for names in groups)
            words = {"image": "an image", "video": "a video"}
            pictures = " and ".join(" or ".join(words.get(name, name) for name in names) for names in groups)
            raise ConfigError(f"{self.name} starts from {pictures}, got none; give generate {options}")

    def free_arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return arguments of the call that no option is for, from texts such as ``max_sequence_length=256``."""
        arguments: dict[str, Any] = {}
        for text in texts:
            name, sign, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if not sign:
                raise ConfigError(f"arg takes NAME=VALUE, got {text!r}; write, say, max_sequence_length=256")
            if option := _option_for(name):
                raise ConfigError(f"arg {name} has an option, got {text!r}; use {option}")
            if not self.takes(name):
                free = [known for known in self.parameters if not _option_for(known) and not NOT_TEXT.search(known)]
                raise ConfigError(f"{self.name} takes no {name!r}; {did_you_mean(name, free)}")
            if NOT_TEXT.search(name):
                raise ConfigError(f"arg {name} can't be given as text, got {text!r}; call the pipeline from Python")
            arguments[name] = parse_value(value.strip())
            self._check_kind(name, arguments[name])
        return arguments

    def _check_kind(self, name: str, value: Any) -> None:
        """Refuse a value of another kind than the parameter's default."""
        default = self.default(name)
        if not isinstance(default, (bool, int, float, str)):
            return
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ConfigError(f"arg {name} is {default!r} by default, got {value!r}, which is of another kind")

    def _instead(self, argument: str) -> str:
        """Say what to do about an argument that is not taken."""
        if argument == "guidance_scale":
            names = [name for name in self.parameters if name.endswith(("guidance_scale", "cfg_scale"))]
            scales = " and ".join(OPTIONS.get(name, f"--arg {name}=VALUE") for name in names)
            return f"its guidance is set by {scales}" if scales else "leave it out: its guidance is set by a guider"
        return "leave it out"


def pipeline_class(files: ModelFiles) -> type:
    """Return the diffusers class that a model's ``model_index.json`` names."""
    import diffusers

    name = files.index.get("_class_name")
    with quiet_diffusers():
        cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type):
        raise UnsupportedModel(
            f"{files.name} is made for the pipeline class {name!r}, which diffusers {diffusers.__version__} does not "
            "have; update diffusers, or load the model in Python"
        )
    return cls


def files_taken(source: str) -> list[str]:
    """Return the files that a model's pipeline takes, as options; none for a class that diffusers does not have."""
    try:
        return list(CallSignature.of(pipeline_class(read_model_files(source))).files().values())
    except UnsupportedModel:
        return []


def _shown(value: Any) -> str:
    """Return a value as errors show it: pictures are too long to print."""
    return repr(value) if isinstance(value, (str, int, float)) else str(value)[:80]


def _option_for(argument: str) -> str | None:
    """Return the option that sets an argument of the call; None where there is none."""
    if option := _option_of(argument):
        return f"--{option} NAME=FILE"
    return OPTIONS.get(argument)


def _option_of(argument: str) -> str | None:
    """Return the option whose files an argument takes."""
    return next((option for option, names in PICTURES.items() if argument in names), None)
