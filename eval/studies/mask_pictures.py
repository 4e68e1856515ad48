"""Draws the pictures of docs/masks.md from the code on that page: `python eval/studies/mask_pictures.py`."""

import re
from pathlib import Path
from typing import Any

import torch
from dit_accel_kernels import TileLists, unpack_bits
from PIL import Image, ImageDraw

PAGE = Path(__file__).parents[2] / "docs" / "masks.md"
PARTS = re.compile(r"```python\n(.*?)```(?:\n\n!\[.*?\]\(masks/(.*?)\.png\))?", re.DOTALL)
"""A part's code, and the name of the picture below it, if there is one."""

SIDE, GAP = 256, 24
COLOURS = {0: "#dcdcdc", 1: "#8fb8de", 2: "#1f4e79", 3: "#f2a33a"}
"""Colours of skipped, pooled, exact and partial tiles."""


def lists_of_page(text: str) -> dict[str, TileLists]:
    """Run a page's code, part by part, and return the lists of each part that has a picture."""
    names: dict[str, Any] = {}
    lists = {}
    for code, picture in PARTS.findall(text):
        exec(code, names)
        if picture:
            lists[picture] = names["tiles"]
    return lists


def picture(tiles: TileLists) -> Image.Image:
    """Draw the states of all tiles of the first list set, and the pairs of the tile whose mask has most edges."""
    states = tiles.states()[0]
    cells = [_squares(states, COLOURS)]
    if tiles.mask_ids is not None and tiles.mask_bits is not None:
        ids = torch.full(states.shape, -1, dtype=torch.int32)
        ids[states >= 2] = tiles.mask_ids[: int((states >= 2).sum())]
        masks = unpack_bits(tiles.mask_bits, tiles.block_k)
        edges = masks.int().diff(dim=1).abs().sum((1, 2)) + masks.int().diff(dim=2).abs().sum((1, 2))
        number = int(edges.argmax())
        places = (ids == number).nonzero()
        row, column = places[len(places) // 2].tolist()
        width, height = SIDE / states.shape[1], SIDE / states.shape[0]
        frame = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
        ImageDraw.Draw(cells[0]).rectangle(frame, outline="#d62728", width=3)
        cells.append(_squares(masks[number].int() * 2, COLOURS, line=False))
    whole = Image.new("RGB", (SIDE * len(cells) + GAP * (len(cells) - 1), SIDE), "white")
    for number, cell in enumerate(cells):
        whole.paste(cell, (number * (SIDE + GAP), 0))
    return whole


def _squares(values: torch.Tensor, colours: dict[int, str], *, line: bool = True) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    height, width = (SIDE / size for size in values.shape)
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            box = [j * width, i * height, (j + 1) * width - 1, (i + 1) * height - 1]
            draw.rectangle(box, fill=colours[value], outline="white" if line else None)
    return image


def main() -> None:
    """Draw every picture that the page names into the folder beside it."""
    for name, tiles in lists_of_page(PAGE.read_text(encoding="utf-8")).items():
        states = tiles.states()
        path = PAGE.with_suffix("") / f"{name}.png"
        picture(tiles).save(path, optimize=True)
        exact, partial, skipped = (int((states == state).sum()) for state in (2, 3, 0))
        masks = 0 if tiles.mask_bits is None else len(tiles.mask_bits)
        print(f"{path}: {exact} exact, {partial} partial, {skipped} skipped tiles, {masks} masks")


if __name__ == "__main__":
    main()
