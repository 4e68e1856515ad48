"""The page on what is not as published: its figures come from our own code."""

import re
from pathlib import Path

import numpy as np
import pytest

from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.methods.attention.sparsed import SparseD
from dit_accel.plan.layout import TokenLayout
from dit_accel.rules.rotary_frequencies import edited, frequencies

PAGE = (Path(__file__).parents[2] / "docs" / "published.md").read_text()
SIDES = {3840: (48, 80), 3600: (45, 80), 1560: (30, 52)}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.search(r"\| \d+ x \d+ \|", line)
]


def test_the_table_is_there():
    assert len(ROWS) == 7
    assert len({tuple(row[1:3]) for row in ROWS}) == 7


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[1]}, {row[2]}" for row in ROWS])
def test_radials_figures(row):
    _, size, options, published, default, more = row
    frames, tokens = map(int, size.split(" x "))
    decay, near, sink = options.split(", ")
    layout = TokenLayout(frames=frames, height=SIDES[tokens][0], width=SIDES[tokens][1])
    kept = {}
    for boundary in ("published", "any"):
        config = RadialAttention(
            block_size=128, decay_factor=float(decay), near=near, sink=sink == "true", boundary=boundary
        )
        whole = layout.tokens // 128
        kept[boundary] = config.filled().kept(layout)[:whole, :whole]
    assert f"{1 - kept['published'].mean():.4f}" == published
    assert f"{1 - kept['any'].mean():.4f}" == default
    assert f"{kept['any'].sum() / kept['published'].sum() - 1:.0%}".replace("%", " %") == more
    assert (kept["any"] >= kept["published"]).all()


def test_the_docstring_has_the_range_of_the_table():
    shares = [int(row[-1].removesuffix(" %")) for row in ROWS]
    assert f"{min(shares)} to {max(shares)} % more tiles" in " ".join(RadialAttention.__doc__.split())


@pytest.mark.parametrize(("tiles", "density", "kept"), [(10, 0.3, 3), (10, 0.31, 4), (591, 0.3, 178), (3, 0.01, 1)])
def test_sparsed_keeps_a_share_rounded_up(tiles, density, kept):
    settings = SparseD(density=density, block_size=16).filled()
    assert settings.kept_tiles(tiles) == kept
    assert kept in (int(density * tiles), int(density * tiles) + 1)


def test_qwen_images_periods_under_ultraimage():
    """Our rule is the paper's; the released code's is what the page says of it."""
    own = frequencies(56, 10000.0)
    new = edited("ultraimage", own, trained=83, length=256, indices=(8, 9))
    periods = 2 * np.pi / new[[8, 9]]
    released = 2 * np.pi / own[[8, 9]] * 4096 / 1328
    assert periods.round().tolist() == [256, 256]
    assert released.round().tolist() == [269, 374]
    assert all(text in " ".join(PAGE.split()) for text in ("periods of 256 and 256 tokens", "gives 269 and 374"))
