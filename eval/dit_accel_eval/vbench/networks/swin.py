"""The Swin transformer behind Tag2Text, as a function of its published weights.

Source: Swin (Liu et al., arXiv 2103.14030), with 12 x 12 windows over pictures of 384 x 384 pixels. Depth, width and
heads are those of the weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .vit import Weights, _blocks, _linear, _mlp, _norm

EPS = 1e-5

MASKED = -100.0
"""What is added to the logits of tokens that stand in one window only because the grid was rolled."""


def swin(pictures: Tensor, weights: Weights, at: str) -> Tensor:
    """Return the features of pictures, [B, 1 + tokens, D]: their mean, then those of each place.

    Args:
        pictures: normalized [B, 3, side, side], whose grids divide into windows at each stage.
        weights: of the checkpoint.
        at: what the tower's names begin with, such as ``visual_encoder.``.
    """
    kernel = weights[f"{at}patch_embed.proj.weight"]
    x = F.conv2d(pictures, kernel, weights[f"{at}patch_embed.proj.bias"], kernel.shape[2:]).permute(0, 2, 3, 1)
    x = _norm(x, weights, f"{at}patch_embed.norm", EPS)
    for stage in _blocks(weights, f"{at}layers"):
        for number, block in enumerate(_blocks(weights, f"{stage}.blocks")):
            x = _block(x, weights, block, odd=number % 2 == 1)
        if f"{stage}.downsample.reduction.weight" in weights:
            x = _merged(x, weights, f"{stage}.downsample")
    x = _norm(x, weights, f"{at}norm", EPS).flatten(1, 2)
    return torch.cat([x.mean(1, keepdim=True), x], 1)


def _block(x: Tensor, weights: Weights, at: str, *, odd: bool) -> Tensor:
    """Return a block of x [B, Y, X, D]; odd ones roll the grid by half a window, where there is more than one."""
    table = weights[f"{at}.attn.relative_position_bias_table"]
    window = (int(table.shape[0] ** 0.5) + 1) // 2
    rolled = window // 2 if odd and x.shape[1] > window else 0
    inner = _norm(x, weights, f"{at}.norm1", EPS).roll((-rolled, -rolled), (1, 2))
    bias = _bias(table, window)
    if rolled:
        bias = bias + _rolled_mask(x.shape[1], x.shape[2], window, rolled).to(bias)[:, None]
    mixed = _attention(_windows(inner, window), weights, at, bias)
    x = x + _grid(mixed, window, x.shape[1], x.shape[2]).roll((rolled, rolled), (1, 2))
    inner = _norm(x, weights, f"{at}.norm2", EPS)
    return x + _mlp(inner, weights, f"{at}.mlp.fc1", f"{at}.mlp.fc2", F.gelu)


def _attention(x: Tensor, weights: Weights, at: str, bias: Tensor) -> Tensor:
    """Return the attention within windows [B, windows, tokens, D], its logits raised by [..., H, tokens, tokens]."""
    query, key, value = (
        one.unflatten(3, (bias.shape[-3], -1)).transpose(2, 3)
        for one in _linear(x, weights, f"{at}.attn.qkv").chunk(3, 3)
    )
    seen = F.scaled_dot_product_attention(query, key, value, bias)
    return _linear(seen.transpose(2, 3).flatten(3), weights, f"{at}.attn.proj")


def _merged(x: Tensor, weights: Weights, at: str) -> Tensor:
    """Return x [B, Y, X, D] with squares of 2 x 2 tokens as one of width 2 D; columns change slowest in a square."""
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return F.linear(_norm(x, weights, f"{at}.norm", EPS), weights[f"{at}.reduction.weight"])


def _windows(x: Tensor, window: int) -> Tensor:
    """Return a grid [B, Y, X, D] as windows [B, windows, tokens, D]."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _grid(x: Tensor, window: int, down: int, right: int) -> Tensor:
    """Return windows [B, windows, tokens, D] as a grid [B, down, right, D]."""
    x = x.unflatten(1, (down // window, right // window)).unflatten(3, (window, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _bias(table: Tensor, window: int) -> Tensor:
    """Return what the logits within a window are raised by, [H, tokens, tokens], by how far apart two tokens stand."""
    row, column = (one.flatten() for one in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    down, right = (one[:, None] - one[None] + window - 1 for one in (row, column))
    return table[(down * (2 * window - 1) + right).to(table.device)].permute(2, 0, 1)


def _rolled_mask(down: int, right: int, window: int, rolled: int) -> Tensor:
    """Return `MASKED` for tokens that the roll brought into one window, 0 for others: [windows, tokens, tokens]."""

    def parts(length: int) -> Tensor:
        place = torch.arange(length)
        return (place >= length - window).long() + (place >= length - rolled).long()

    part = (3 * parts(down)[:, None] + parts(right)[None])[None, :, :, None]
    part = _windows(part, window)[0, :, :, 0]
    return MASKED * (part[:, :, None] != part[:, None]).float()
