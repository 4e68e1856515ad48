"""Which tokens are foreground: those whose predicted picture moves, split off by Otsu's threshold; no segmenter."""

import math
from itertools import permutations

import torch
from torch import Tensor


def predicted(
    x: Tensor, v: Tensor, sigma: float, grid: tuple[int, int, int], before: int = 0, after: int = 0
) -> Tensor | None:
    """Return a flow model's prediction of the clean latents by token, x - sigma v, [B, F, Y, X, C].

    Args:
        x: the latents that went in, [B, ...] with a channel axis and the sizes of the patch grid, patches whole; or
            [B, tokens, C]. Channels beyond the output's are conditions.
        grid: (frames, height, width) in tokens.
        before: tokens before those of the grid; where the latents have them too, as conditions, they are left out.

    Returns:
        None where the shapes are no such grid.
    """
    frames, height, width = grid
    if x.ndim != v.ndim or any(have < need for have, need in zip(x.shape, v.shape, strict=True)):
        return None
    x = x[tuple(slice(size) for size in v.shape)]
    clean = x.float() - sigma * v.float()
    if clean.ndim == 3:
        return _of_tokens(clean, grid, before, after)
    if clean.ndim == 4 and frames == 1:
        clean = clean[:, :, None]
    if clean.ndim != 5:
        return None
    each = height * width
    around = (before // each, after // each) if before % each == after % each == 0 else (0, 0)
    for cut in ((0, 0), around):
        tokens = _of_patches(clean, (frames + sum(cut), height, width))
        if tokens is not None:
            return tokens[:, cut[0] : cut[0] + frames]
    return None


def _of_tokens(clean: Tensor, grid: tuple[int, int, int], before: int, after: int) -> Tensor | None:
    """Return [B, tokens, C] on the grid, without the tokens around it; None where it is not known which those are.

    Text is among ``before`` or ``after``, but not among the latents.
    """
    visual = math.prod(grid)
    extra = clean.shape[1] - visual
    if extra == before + after:
        start = before
    elif 0 <= extra <= before and after == 0:
        start = extra
    elif extra == 0 or (before == 0 and 0 <= extra <= after):
        start = 0
    else:
        return None
    return clean[:, start : start + visual].reshape(len(clean), *grid, -1)


def _of_patches(clean: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
    """Return latents of five axes on a grid, the channels of a token's patch together; None where they don't fit."""
    frames, height, width = grid
    for axes in sorted(permutations(range(1, 5), 3), key=lambda axes: axes != (2, 3, 4)):
        sizes = [clean.shape[axis] for axis in axes]
        whole = all(size % count == 0 for size, count in zip(sizes, grid, strict=True))
        if axes == tuple(sorted(axes)) and whole and sizes[1] // height == sizes[2] // width:
            (channels,) = {1, 2, 3, 4} - {*axes}
            tokens = clean.permute(0, channels, *axes)
            tokens = tokens.unflatten(4, (width, -1)).unflatten(3, (height, -1)).unflatten(2, (frames, -1))
            return tokens.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
    return None


def motion(clean: Tensor) -> Tensor:
    """Measure each token's distance from its place's median over the frames, [B, F, Y, X].

    ``clean``: `predicted`, [B, F, Y, X, C]. Where something passes for less than half of the frames, the median is what
    lies behind it.
    """
    return (clean - clean.median(1, keepdim=True).values).square().mean(-1).sqrt()


def otsu(values: Tensor) -> Tensor:
    """Return the threshold that splits values into the two classes of largest variance between them, 0-d.

    Source: Otsu 1979. Exact, over all splits and not a histogram's; where all are alike it is that value, which is
    above none of them.
    """
    x = values.flatten().sort().values.double()
    count, below = x.numel(), torch.arange(1, x.numel(), device=x.device)
    if count < 2:
        return values.flatten().max()
    sums = x.cumsum(0)
    low = sums[:-1] / below
    high = (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (high - low).square()
    at = between.argmax()
    return ((x[at] + x[at + 1]) / 2).to(values.dtype)


def foreground(clean: Tensor) -> Tensor:
    """Return the tokens that move, bool [F, Y, X], in the mean over one prompt's predictions [B, F, Y, X, C]."""
    moved = motion(clean).mean(0)
    return moved > otsu(moved)
