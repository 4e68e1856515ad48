"""The page about masks: its code runs, computes the masks that it speaks of, and its pictures are drawn from it."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.states import list_states, pair_mask
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

PAGE = Path(__file__).parents[2] / "docs" / "masks.md"
SECTIONS = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROW, J = torch.arange(512)[:, None], torch.arange(512)


def sequences() -> torch.Tensor:
    number = torch.bucketize(torch.arange(512), torch.tensor([150, 200]), right=True)
    return (number[:, None] == number) & (ROW >= J)


def neighbours() -> torch.Tensor:
    seen = torch.ones(512, 512, dtype=torch.bool)
    spots = torch.unravel_index(torch.arange(512), (4, 8, 16))
    for spot, length, count in zip(spots, (4, 8, 16), (3, 3, 5), strict=True):
        first = (spot - count // 2).clamp(0, length - count)
        seen &= (spot >= first[:, None]) & (spot < first[:, None] + count)
    return seen


def video() -> torch.Tensor:
    seen = torch.zeros(512, 512, dtype=torch.bool)
    for frame, other in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
        apart = abs(frame - other)
        width = 0 if apart in (5, 7) else 64 // 2 ** (apart // 2)
        near = (torch.arange(64)[:, None] - torch.arange(64)).abs() < width
        seen[frame * 64 : frame * 64 + 64, other * 64 : other * 64 + 64] = near
    return seen


def prompts() -> torch.Tensor:
    seen = torch.ones(512, 512, dtype=torch.bool)
    seen[:64, 64:] = False
    for row in range(448):
        seen[64 + row, slice(40, 64) if row % 28 < 14 else slice(0, 40)] = False
    return seen


EXPECTED: dict[str, Callable[[], torch.Tensor]] = {
    "Causal": lambda: ROW >= J,
    "Sliding window": lambda: (ROW - J).abs() <= 100,
    "Packed sequences": sequences,
    "Neighbourhood": neighbours,
    "A static mask for video": video,
    "A mask that is a tensor": prompts,
    "FlexAttention's BlockMask": lambda: ROW >= J,
}


@pytest.fixture(scope="module")
def ran() -> dict[str, dict]:
    """What each section's code leaves, run after that of the sections before it."""
    text, names, results = PAGE.read_text(encoding="utf-8"), {}, {}
    torch.manual_seed(0)
    exec(CODE.findall(text.partition("\n## ")[0])[0], names)
    for title, body in SECTIONS.findall(text):
        for code in CODE.findall(body):
            exec(code, names)
            results[title] = dict(names)
    return results


def test_every_section_with_code_is_checked_and_short(ran):
    assert set(ran) == set(EXPECTED)
    for title, body in SECTIONS.findall(PAGE.read_text(encoding="utf-8")):
        for code in CODE.findall(body):
            assert len([line for line in code.splitlines() if line.strip()]) <= 8, title


@pytest.mark.parametrize("title", EXPECTED)
def test_the_code_computes_the_mask_of_its_section(ran, title):
    names, mask = ran[title], EXPECTED[title]()
    q, k, v = (names[name].transpose(1, 2) for name in "qkv")
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(names["out"], expected)
    problem = problem_of(names["q"], names["k"], names["v"], names["tiles"])
    seen = list_states(problem).repeat_interleave(64, 2).repeat_interleave(64, 3) >= 2
    seen = seen if pair_mask(problem) is None else seen & pair_mask(problem)
    order = names["order"] if title == "Neighbourhood" else torch.arange(512)
    assert torch.equal(seen[0, 0], mask[order][:, order])


def test_the_pictures_are_those_of_the_code():
    pictures = SimpleNamespace(**runpy.run_path(str(PAGE.parents[1] / "eval" / "studies" / "mask_pictures.py")))
    lists = pictures.lists_of_page(PAGE.read_text(encoding="utf-8"))
    assert len(lists) == len(EXPECTED) - 1
    assert {path.stem for path in PAGE.with_suffix("").glob("*.png")} == set(lists)
    for name, tiles in lists.items():
        drawn = pictures.picture(tiles)
        with Image.open(PAGE.with_suffix("") / f"{name}.png") as committed:
            assert drawn.tobytes() == committed.convert("RGB").tobytes(), f"{name}: run eval/studies/mask_pictures.py"
