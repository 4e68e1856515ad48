"""Inception v3's convolutions, by the names of pytorch-fid's file: (name, in, out, height, width) of each."""

from collections.abc import Iterator

import torch
from torch import Tensor

Convolution = tuple[str, int, int, int, int]


def convolutions() -> Iterator[Convolution]:
    """Give all convolutions up to the last pool."""
    yield from (
        ("Conv2d_1a_3x3", 3, 32, 3, 3), ("Conv2d_2a_3x3", 32, 32, 3, 3), ("Conv2d_2b_3x3", 32, 64, 3, 3),
        ("Conv2d_3b_1x1", 64, 80, 1, 1), ("Conv2d_4a_3x3", 80, 192, 3, 3),
    )  # fmt: skip
    for name, wide, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        yield from _of(
            name, ("branch1x1", wide, 64, 1, 1), ("branch5x5_1", wide, 48, 1, 1), ("branch5x5_2", 48, 64, 5, 5),
            ("branch3x3dbl_1", wide, 64, 1, 1), ("branch3x3dbl_2", 64, 96, 3, 3), ("branch3x3dbl_3", 96, 96, 3, 3),
            ("branch_pool", wide, pool, 1, 1),
        )  # fmt: skip
    yield from _of(
        "Mixed_6a", ("branch3x3", 288, 384, 3, 3), ("branch3x3dbl_1", 288, 64, 1, 1),
        ("branch3x3dbl_2", 64, 96, 3, 3), ("branch3x3dbl_3", 96, 96, 3, 3),
    )  # fmt: skip
    for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        yield from _of(
            name, ("branch1x1", 768, 192, 1, 1), ("branch7x7_1", 768, inner, 1, 1),
            ("branch7x7_2", inner, inner, 1, 7), ("branch7x7_3", inner, 192, 7, 1),
            ("branch7x7dbl_1", 768, inner, 1, 1), ("branch7x7dbl_2", inner, inner, 7, 1),
            ("branch7x7dbl_3", inner, inner, 1, 7), ("branch7x7dbl_4", inner, inner, 7, 1),
            ("branch7x7dbl_5", inner, 192, 1, 7), ("branch_pool", 768, 192, 1, 1),
        )  # fmt: skip
    yield from _of(
        "Mixed_7a", ("branch3x3_1", 768, 192, 1, 1), ("branch3x3_2", 192, 320, 3, 3),
        ("branch7x7x3_1", 768, 192, 1, 1), ("branch7x7x3_2", 192, 192, 1, 7), ("branch7x7x3_3", 192, 192, 7, 1),
        ("branch7x7x3_4", 192, 192, 3, 3),
    )  # fmt: skip
    for name, wide in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        yield from _of(
            name, ("branch1x1", wide, 320, 1, 1), ("branch3x3_1", wide, 384, 1, 1),
            ("branch3x3_2a", 384, 384, 1, 3), ("branch3x3_2b", 384, 384, 3, 1),
            ("branch3x3dbl_1", wide, 448, 1, 1), ("branch3x3dbl_2", 448, 384, 3, 3),
            ("branch3x3dbl_3a", 384, 384, 1, 3), ("branch3x3dbl_3b", 384, 384, 3, 1),
            ("branch_pool", wide, 192, 1, 1),
        )  # fmt: skip


def _of(at: str, *parts: Convolution) -> Iterator[Convolution]:
    yield from ((f"{at}.{name}", *shape) for name, *shape in parts)  # type: ignore[misc]


def weights() -> dict[str, Tensor]:
    """Return random weights that keep the signal's size."""
    chance, found = torch.Generator().manual_seed(0), {}
    for name, wide, narrow, high, across in convolutions():
        shape = (narrow, wide, high, across)
        found[f"{name}.conv.weight"] = torch.randn(shape, generator=chance) * (2 / (wide * high * across)) ** 0.5
        found[f"{name}.bn.weight"] = 1 + torch.randn(narrow, generator=chance) / 10
        found[f"{name}.bn.bias"] = torch.randn(narrow, generator=chance) / 10
        found[f"{name}.bn.running_mean"] = torch.randn(narrow, generator=chance) / 10
        found[f"{name}.bn.running_var"] = 1 + torch.rand(narrow, generator=chance)
    return found
