"""What Ulysses sends, holds and computes for released models, by their sizes alone: nothing here is measured."""

from shards import ShardEstimate

from dit_accel.adapters.registry import adapters
from dit_accel.estimate.sizes import rounded_frames, token_layout

ROWS = (("wan2.1-14b", (81, 161, 513)), ("hunyuan-video", (81, 129, 513)))
"""Family -> output frames, all at 720 x 1280."""

DEGREES = (1, 2, 8)
LINK = 400e9
CARD = 400e12
"""Bytes a second that a card is taken to send, and FLOPs a second that it is taken to compute; both assumed."""


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
