"""Strips of pictures with their names, maps of small squares and bars of steps, as `method_pictures` draws them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = ImageFont.load_default(size=14)
DARK, LIGHT, GREY, INK = "#1f4e79", "#8fb8de", "#dcdcdc", "#222222"
NAMES, GAP = 126, 4
"""Pixels that the names on the left take, and those between pictures."""

Rows = Sequence[tuple[str, Sequence[np.ndarray] | np.ndarray]]
"""Name of a row -> its pictures [height, width, 3] from 0 to 1."""


def rows_picture(rows: Rows, *, scale: float, below: Callable[[int], Image.Image] | None = None) -> Image.Image:
    """Return pictures in rows, each row's name on the left, and below all what a function of their width draws."""
    height, width = (round(scale * size) for size in rows[0][1][0].shape[:2])
    across = len(rows[0][1]) * (width + GAP) - GAP
    foot = below(across) if below else None
    whole = Image.new("RGB", (NAMES + across, len(rows) * (height + GAP) + (foot.height + GAP if foot else 0)), "white")
    draw = ImageDraw.Draw(whole)
    how = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
    for row, (name, pictures) in enumerate(rows):
        top = row * (height + GAP)
        draw.text((2, top + height // 2), name, fill=INK, font=FONT, anchor="lm")
        for column, picture in enumerate(pictures):
            image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype("uint8"))
            whole.paste(image.resize((width, height), how), (NAMES + column * (width + GAP), top))
    if foot:
        whole.paste(foot, (NAMES, whole.height - foot.height))
        draw.text((2, whole.height - foot.height + 8), "what ran", fill=INK, font=FONT)
    return whole


def map_picture(values: np.ndarray, names: Mapping[int, str], title: str, side: int = 252) -> Image.Image:
    """Return a map of small squares [rows, columns], its title and the meaning of its colours, the last darkest."""
    cell = max(1, side // max(values.shape))
    shades = dict(zip(names, (GREY, LIGHT, DARK) if len(names) == 3 else (GREY, DARK), strict=True))
    whole = Image.new("RGB", (cell * values.shape[1], cell * values.shape[0] + 46), "white")
    draw = ImageDraw.Draw(whole)
    draw.text((0, 2), title, fill=INK, font=FONT)
    for (row, column), value in np.ndenumerate(values):
        left, top = column * cell, 22 + row * cell
        draw.rectangle([left, top, left + cell - 1, top + cell - 1], fill=shades[int(value)])
    _legend(
        draw, [(shades[value], name) for value, name in names.items() if (values == value).any()], whole.height - 20
    )
    return whole


def block_strip(computed: np.ndarray, width: int, names: tuple[str, str] = ("computed", "reused")) -> Image.Image:
    """Return what ran at each step [blocks, steps]: one bar where all blocks agree, else a row a block."""
    rows = computed[:1] if (computed == computed[:1]).all() else computed
    tall = 18 if len(rows) == 1 else 9
    whole = Image.new("RGB", (width, len(rows) * tall + 30), "white")
    draw, step = ImageDraw.Draw(whole), width / computed.shape[1]
    for (row, column), ran in np.ndenumerate(rows):
        box = [column * step, 6 + row * tall, (column + 1) * step - 2, 6 + (row + 1) * tall - 2]
        draw.rectangle(box, fill=DARK if ran else LIGHT)
    what = "steps, left to right" if len(rows) == 1 else "steps, left to right; blocks, first on top"
    _legend(draw, [(DARK, names[0]), (LIGHT, names[1])], whole.height - 20, f"{what}:")
    return whole


def _legend(draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, str]], top: int, before: str = "") -> None:
    left = 0.0
    if before:
        draw.text((left, top), before, fill=INK, font=FONT)
        left += draw.textlength(before, font=FONT) + 10
    for colour, name in entries:
        draw.rectangle([left, top + 3, left + 12, top + 15], fill=colour)
        draw.text((left + 17, top), name, fill=INK, font=FONT)
        left += 17 + draw.textlength(name, font=FONT) + 14


def beside(left: Image.Image, right: Image.Image, gap: int = 16) -> Image.Image:
    """Return two pictures side by side on white, the lower one in the middle."""
    tall = max(left.height, right.height)
    whole = Image.new("RGB", (left.width + gap + right.width, tall), "white")
    whole.paste(left, (0, (tall - left.height) // 2))
    whole.paste(right, (left.width + gap, (tall - right.height) // 2))
    return whole


def save(picture: Image.Image, path: Path, most: int = 60_000) -> None:
    """Write a PNG of at most so many bytes, with as many colours as that allows."""
    for colours in (None, 256, 128, 64, 32):
        fewer = picture if colours is None else picture.quantize(colours, kmeans=2, dither=Image.Dither.NONE)
        fewer.save(path, optimize=True)
        if path.stat().st_size <= most:
            break
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size} bytes, {colours or 'all'} colours")
