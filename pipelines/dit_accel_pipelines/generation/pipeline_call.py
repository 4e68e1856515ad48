"""What a pipeline can be called with, read off its class, so that a request is refused before weights are loaded."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError, UnsupportedModel

from .quiet import quiet_diffusers

ALWAYS_GIVEN = ("self", "prompt", "generator", "output_type")
PICTURES = ("image", "video")
"""Arguments that hold pictures to start from; `generate` has an option of the same name for each."""

STARTS_FROM_PICTURES = re.compile(r"Img2Img|Image(To|2)Video|VideoToVideo|VideoToWorld|(?<!T)I2[IV]")
"""Names of pipeline classes that need pictures although their signature makes them optional."""


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
        beyond = [name for name in missing if name not in PICTURES]
        if beyond:
            raise ConfigError(f"{self.name} needs {', '.join(beyond)}, which generate can't give; call it from Python")
        taken = [name for name in PICTURES if self.takes(name)]
        if not missing and STARTS_FROM_PICTURES.search(self.name) and not any(name in arguments for name in taken):
            missing = taken
        if missing:
            options = " or ".join(f"--{name} FILE" for name in missing)
            pictures = " or ".join("an image" if name == "image" else "a video" for name in missing)
            raise ConfigError(f"{self.name} starts from {pictures}, got none; give generate {options}")

    def _instead(self, argument: str) -> str:
        """Say what to do about an argument that is not taken."""
        if argument == "guidance_scale":
            scales = [name for name in self.parameters if name.endswith(("guidance_scale", "cfg_scale"))]
            guidance = " and ".join(scales) or "a guider"
            return f"leave it out, or call the pipeline from Python: its guidance is set by {guidance}"
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


def _shown(value: Any) -> str:
    """Return a value as errors show it: pictures are too long to print."""
    return repr(value) if isinstance(value, (str, int, float)) else str(value)[:80]
