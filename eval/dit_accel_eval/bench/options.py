"""The options of the command `bench`, and which models at which sizes are timed: those with a name, and a user's."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_args

from dit_accel_pipelines.generation.options import Device, Dtype, Json, Pixels, Quiet, option

from dit_accel.errors import ConfigError, did_you_mean

SHAPES = {
    "flux-1mp": "flux.1-dev:1024x1024",
    "flux-4mp": "flux.1-dev:2048x2048",
    "wan-480p": "wan2.1-1.3b:480x832x81",
    "wan-720p": "wan2.1-14b:720x1280x81",
    "hunyuan-720p": "hunyuan-video:720x1280x129",
}
"""Name -> FAMILY:HEIGHTxWIDTHxFRAMES."""

_SIZES = re.compile(r"([^:]+):(\d+)x(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Shape:
    """A released model at one size of its output, in pixels and frames; None: the model's own."""

    name: str
    family: str
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    @property
    def sizes(self) -> dict[str, int | None]:
        """Height, width and frames, by the names that estimates give them."""
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}


def named_shapes(text: str) -> list[Shape]:
    """Return the shapes that a user names: ``all``, or a comma list of names and of FAMILY:HEIGHTxWIDTHxFRAMES."""
    names = SHAPES if text.strip() == "all" else dict.fromkeys(filter(None, map(str.strip, text.split(","))))
    if not names:
        raise ConfigError(f"--shapes names none; say all, or some of {', '.join(SHAPES)}")
    shapes = []
    for name in names:
        match = _SIZES.fullmatch(SHAPES.get(name, name))
        if match is None:
            spelled = "give one as FAMILY:HEIGHTxWIDTHxFRAMES, such as wan2.1-1.3b:480x832x81"
            raise ConfigError(f"no shape is called {name!r}; {did_you_mean(name, [*SHAPES, 'all'])}, or {spelled}")
        family, *sizes = match.groups(default="1")
        shapes.append(Shape(name, family, *map(int, sizes)))
    return shapes


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of the command `bench`; each is described by its help."""

    family: Annotated[str | None, option("A model family, such as wan2.1-1.3b.", metavar="NAME")] = None
    shapes: Annotated[str | None, option("Models at real sizes instead: all, or some.", metavar="NAMES")] = None
    layers: Annotated[int, option("Blocks that are made.", min=1)] = 2
    heads: Annotated[int | None, option("Heads of each block; default: all, with --shapes 2.", min=1)] = None
    height: Pixels = None
    width: Pixels = None
    num_frames: Annotated[int | None, option("Output frames.")] = None
    num_inference_steps: Annotated[int | None, option("Steps of a run; default: 4, with --shapes 1.", min=1)] = None
    rounds: Annotated[int, option("Runs of every arm at most, in turn.", min=1)] = 3
    budget: Annotated[float, option("Seconds behind which no shape or round begins.", min=1)] = 1500
    threads: Annotated[int | None, option("Threads of torch.", min=1)] = None
    output: Annotated[Path | None, option("JSON lines to append to.", "--output", "-o", metavar="FILE")] = None
    dtype: Dtype = None
    device: Device = None
    quiet: Quiet = False
    json: Json = False

    def settled(self) -> "BenchOptions":
        """Return the options with what they are by default."""
        from dit_accel_pipelines.generation.request import Dtype as DtypeName  # loads torch, which --help need not

        known = get_args(DtypeName)
        if self.dtype is not None and self.dtype not in known:
            raise ConfigError(f"there is no dtype {self.dtype!r}; {did_you_mean(self.dtype, known)}")
        if (self.shapes is None) == (self.family is None):
            raise ConfigError("bench needs either --family NAME, such as wan2.1-1.3b, or --shapes all; give one")
        names = [name for name in ("height", "width", "num_frames") if getattr(self, name) is not None]
        if self.shapes is not None and names:
            option = names[0].replace("_", "-")
            raise ConfigError(f"--shapes have sizes of their own, got --{option}; write FAMILY:HEIGHTxWIDTHxFRAMES")
        of_shapes = self.shapes is not None
        return replace(
            self, heads=self.heads or (2 if of_shapes else None),
            num_inference_steps=self.num_inference_steps or (1 if of_shapes else 4),
        )  # fmt: skip

    def wanted(self) -> list[Shape]:
        """Return the shapes that are requested; `ConfigError` for an unknown one."""
        if self.family is None:
            return named_shapes(self.shapes or "")
        sizes = {name: getattr(self, name) for name in ("height", "width", "num_frames")}
        return [Shape(name=self.family, family=self.family, **sizes)]
