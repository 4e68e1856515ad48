"""Token layout: where the visual tokens and the text tokens of one attention call lie."""

from dataclasses import dataclass

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
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"a token layout needs {name} >= 1, got {getattr(self, name)}; check the latents' shape"
                )
        for name in ("text_before", "text_after"):
            if getattr(self, name) < 0:
                raise ConfigError(f"a token layout needs {name} >= 0, got {getattr(self, name)}")

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
