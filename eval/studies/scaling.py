"""What Ulysses sends, holds and computes for released models, by their sizes alone: nothing here is measured."""

from dataclasses import dataclass

from dit_accel.adapters.adapter import Family
from dit_accel.adapters.installed import adapters
from dit_accel.errors import ConfigError
from dit_accel.estimate.sizes import rounded_frames, token_layout
from dit_accel.estimate.work import ASSUMED_BYTES, attention_flops, other_flops
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.tiling import TILE, bitmap_bytes

ROWS = (("wan2.1-14b", (81, 161, 513)), ("hunyuan-video", (81, 129, 513)))
"""Family -> output frames, all at 720 x 1280."""

DEGREES = (1, 2, 8)
LINK = 400e9
CARD = 400e12
"""Bytes a second that a card is taken to send, and FLOPs a second that it is taken to compute; both assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEstimate:
    """One process's part of a model of known sizes.

    Attributes:
        family: the sizes.
        layout: the sequence.
        degree: how many processes share it.

    Raises:
        ConfigError: for a degree that leaves processes without heads.
    """

    family: Family
    layout: TokenLayout
    degree: int

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= self.family.heads:
            raise ConfigError(
                f"a degree must be from 1 to the {self.family.heads} heads of {self.family.name}, got {self.degree}"
            )

    @property
    def heads(self) -> int:
        """Heads inside attention, at most."""
        return -(-self.family.heads // self.degree)

    @property
    def tokens(self) -> int:
        """Tokens outside attention, at most, but for one a stream."""
        return -(-self.layout.tokens // self.degree)

    @property
    def sent_bytes(self) -> int:
        """Bytes sent in a step: queries, keys, values and output of each layer, but for what stays."""
        part = self.tokens * self.family.heads * self.family.head_dim * ASSUMED_BYTES
        forwards = self.family.layers * self.family.forwards_per_step
        return 4 * part * forwards * (self.degree - 1) // self.degree

    @property
    def attention_bytes(self) -> int:
        """Bytes of one layer's queries, keys, values and output inside attention."""
        return 4 * self.layout.tokens * self.heads * self.family.head_dim * ASSUMED_BYTES

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of LiteAttention's bitmaps, from step to step."""
        layers = self.family.layers * self.family.forwards_per_step
        return layers * bitmap_bytes(-(-self.layout.tokens // TILE), self.heads, 1)

    def flops(self, density: float = 1.0) -> float:
        """Return the FLOPs of a step: attention at a density, and the rest."""
        forwards = self.family.layers * self.family.forwards_per_step
        attention = attention_flops(self.family, self.layout.tokens) * self.heads / self.family.heads
        return forwards * (density * attention + other_flops(self.family, self.layout) / self.degree)


def table() -> str:
    """Return the table of docs/scaling.md, in Markdown."""
    families = {family.name: family for adapter in adapters().values() for family in adapter.families}
    lines = [
        "| model, frames | tokens | cards | heads, tokens a card | sent a step | in attention a layer | Lite's bitmaps "
        "| PFLOP a step, dense / density .3 | sending over computing, dense / density .3 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, lengths in ROWS:
        family = families[name]
        for frames in lengths:
            layout = token_layout(family, height=720, width=1280, num_frames=rounded_frames(family, frames))
            for degree in DEGREES:
                spread = ShardEstimate(family=family, layout=layout, degree=degree)
                flops = [spread.flops(density) for density in (1.0, 0.3)]
                sending = [f"{spread.sent_bytes / LINK / (one / CARD):.1%}" for one in flops]
                lines.append(
                    f"| {name}, {frames} | {layout.tokens:,} | {degree} | {spread.heads}, {spread.tokens:,} "
                    f"| {spread.sent_bytes / 1e9:.1f} GB | {spread.attention_bytes / 1e9:.2f} GB "
                    f"| {spread.bitmap_bytes / 1e9:.2f} GB | {flops[0] / 1e15:.1f} / {flops[1] / 1e15:.1f} "
                    f"| {' / '.join(sending)} |"
                )
    return "\n".join(lines)
