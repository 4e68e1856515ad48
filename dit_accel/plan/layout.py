"""Token layout: where the visual tokens and the text tokens of one attention call lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """The patch grid of a sequence and the text tokens around it, in tokens.

    The visual tokens are frame-major and raster-ordered inside a frame: token ``(f * height + y) * width + x``.

    Attributes:
        frames: F, latent frames after patching; 1 for an image.
        height: Y, patch rows of a frame.
        width: X, patch columns of a frame.
        text_before: text (or audio, or reference) tokens in front of the visual ones.
        text_after: the same, behind them.

    Raises:
        ConfigError: for a size that is not a whole number, or too small.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text_before", 0), ("text_after", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"a token layout needs {name} to be a whole number >= {least}, got {value!r}; check the latents' "
                    "shape and the adapter's grid"
                )

    @property
    def grid(self) -> tuple[int, int, int, int, int]:
        """The sizes as adapters give them: frames, height, width, text before, text after."""
        return self.frames, self.height, self.width, self.text_before, self.text_after

    @property
    def lengths(self) -> dict[str, int]:
        """Axis (frames, height, width) -> tokens along it."""
        return {"frames": self.frames, "height": self.height, "width": self.width}

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of one frame, s = Y * X."""
        return self.height * self.width

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all frames, n = F * Y * X."""
        return self.frames * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """Length S of the sequence, text included."""
        return self.text_before + self.visual_tokens + self.text_after

    @property
    def visual(self) -> slice:
        """The visual tokens' place in the sequence."""
        return slice(self.text_before, self.text_before + self.visual_tokens)


def layout_of(grid: Sequence[int]) -> TokenLayout:
    """Return an adapter's grid (frames, height, width, text before, text after) as a layout."""
    frames, height, width, before, after = (int(size) for size in grid)
    return TokenLayout(frames=frames, height=height, width=width, text_before=before, text_after=after)


def length_of(grid: Sequence[int]) -> int:
    """Return the tokens of a grid, text included; inside a graph its sizes stay unknown."""
    frames, height, width, before, after = grid
    return before + frames * height * width + after


def with_valid_text(layout: TokenLayout, length: int) -> TokenLayout:
    """Return ``layout`` less the text that a sequence of this length left out, padded or all; itself if none fits."""
    if length == layout.visual_tokens:
        return replace(layout, text_before=0, text_after=0)
    dropped = layout.tokens - length
    fits = dropped in range(layout.text_after + 1)
    return replace(layout, text_after=layout.text_after - dropped) if fits else layout
