"""Which models at which sizes are timed: those with a name, and a user's own."""

import re
from dataclasses import dataclass, fields

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


@dataclass(frozen=True, kw_only=True)
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
        return {one.name: getattr(self, one.name) for one in fields(self)[2:]}


def named_shapes(text: str) -> list[Shape]:
    """Return the shapes that a user names: ``all``, or a comma list of names and of FAMILY:HEIGHTxWIDTHxFRAMES."""
    names = SHAPES if text.strip() == "all" else dict.fromkeys(filter(None, map(str.strip, text.split(","))))
    if not names:
        raise ConfigError(f"--shapes names none; say all, or some of {', '.join(SHAPES)}")
    return [_shape_of(name) for name in names]


def _shape_of(name: str) -> Shape:
    found = _SIZES.fullmatch(SHAPES.get(name, name))
    if found is None:
        raise ConfigError(
            f"no shape is called {name!r}; {did_you_mean(name, [*SHAPES, 'all'])}, or give one as "
            "FAMILY:HEIGHTxWIDTHxFRAMES, such as wan2.1-1.3b:480x832x81"
        )
    family, height, width, frames = found.groups(default="1")
    return Shape(name=name, family=family, height=int(height), width=int(width), num_frames=int(frames))
