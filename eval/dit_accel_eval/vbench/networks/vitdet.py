"""The vision transformer behind GRiT and its pyramid of features, as functions of their published weights.

Source: ViTDet (Li et al., arXiv 2203.16527), its base model: windows of 14 x 14 patches but in every third block, with
relative positions (MViTv2, arXiv 2112.01526). Depth and width are those of the weights; heads are 64 wide.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .vit import Weights, _blocks, _linear, _mlp, _norm

EPS, PYRAMID_EPS = 1e-6, 1e-5

WINDOW = 14
"""Patches of a window's side."""

WHOLE = 3
"""Every how manieth block looks at the whole picture."""

STRIDES = (8, 16, 32, 64, 128)
"""Pixels between the places of each level."""


def pyramid(picture: Tensor, weights: Weights, head: int) -> list[Tensor]:
    """Return the features of a picture by level, each [1, D, Y, X].

    Args:
        picture: normalized [1, 3, height, width], both multiples of 32.
        weights: of the checkpoint.
        head: width of a head.
    """
    x = _seen(picture, weights, head).permute(0, 3, 1, 2)
    finer = F.conv_transpose2d(x, weights["backbone.fpn_stride_16_8.weight"], stride=2)
    levels = [
        _level(one, weights, f"backbone.fpn_stride{stride}")
        for one, stride in ((finer, 8), (x, 16), (F.max_pool2d(x, 2), 32))
    ]
    for name in ("p6", "p7"):
        given = levels[-1] if name == "p6" else F.relu(levels[-1])
        levels.append(convolved(given, weights, f"backbone.top_block.{name}", stride=2))
    return levels


def convolved(x: Tensor, weights: Weights, at: str, stride: int = 1) -> Tensor:
    """Return x [B, D, Y, X] convolved by a kernel of odd size, zeros around; with a bias where there is one."""
    kernel = weights[f"{at}.weight"]
    return F.conv2d(x, kernel, weights.get(f"{at}.bias"), stride, kernel.shape[-1] // 2)


def _level(x: Tensor, weights: Weights, at: str) -> Tensor:
    for number in (1, 2):
        x = convolved(x, weights, f"{at}_conv{number}").permute(0, 2, 3, 1)
        x = _norm(x, weights, f"{at}_norm{number}", PYRAMID_EPS).permute(0, 3, 1, 2)
    return x


def _seen(picture: Tensor, weights: Weights, head: int) -> Tensor:
    """Return the transformer's features of a picture, [1, Y, X, D]."""
    at = "backbone.bottom_up"
    kernel = weights[f"{at}.patch_embed.proj.weight"]
    x = F.conv2d(picture, kernel, weights[f"{at}.patch_embed.proj.bias"], kernel.shape[2:]).permute(0, 2, 3, 1)
    x = x + _places(weights[f"{at}.pos_embed"], x.shape[1], x.shape[2])
    for number, block in enumerate(_blocks(weights, f"{at}.blocks"), 1):
        inner = _norm(x, weights, f"{block}.norm1", EPS)
        if number % WHOLE:
            x = x + _in_windows(inner, weights, f"{block}.attn", head)
        else:
            x = x + _attention(inner, weights, f"{block}.attn", head)
        inner = _norm(x, weights, f"{block}.norm2", EPS)
        x = x + _mlp(inner, weights, f"{block}.mlp.fc1", f"{block}.mlp.fc2", F.gelu)
    return x


def _places(trained: Tensor, down: int, right: int) -> Tensor:
    """Return the positions [1, down, right, D]: the trained square's without that of a class token, bicubic."""
    side = int((trained.shape[1] - 1) ** 0.5)
    square = trained[:, 1:].unflatten(1, (side, side))
    if (down, right) == (side, side):
        return square
    grid = F.interpolate(square.permute(0, 3, 1, 2), size=(down, right), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)


def _in_windows(x: Tensor, weights: Weights, at: str, head: int) -> Tensor:
    """Return the attention within windows of x [1, Y, X, D], which zeros fill up at the right and below."""
    down, right = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -right % WINDOW, 0, -down % WINDOW))
    grid = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)  # [1, windows down, right, ...]
    mixed = _attention(grid.flatten(0, 2), weights, at, head)
    return mixed.unflatten(0, grid.shape[:3]).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :down, :right]


def _attention(x: Tensor, weights: Weights, at: str, head: int) -> Tensor:
    """Return the attention of x [B, Y, X, D] to itself, its logits raised by how far down and right a key stands."""
    down, right = x.shape[1:3]
    mixed = _linear(x.flatten(1, 2), weights, f"{at}.qkv")
    query, key, value = (one.unflatten(2, (-1, head)).transpose(1, 2) for one in mixed.chunk(3, 2))
    grid = query.unflatten(2, (down, right))
    bias = torch.einsum("bnyxd,ykd->bnyxk", grid, _relative(weights[f"{at}.rel_pos_h"], down))[..., None]
    bias = bias + torch.einsum("bnyxd,xkd->bnyxk", grid, _relative(weights[f"{at}.rel_pos_w"], right))[..., None, :]
    found = F.scaled_dot_product_attention(query, key, value, bias.flatten(4, 5).flatten(2, 3))
    return _linear(found.transpose(1, 2).flatten(2), weights, f"{at}.proj").unflatten(1, (down, right))


def _relative(table: Tensor, length: int) -> Tensor:
    """Return the relative positions [length, length, D] of queries and keys, linear where fewer were trained."""
    if len(table) != 2 * length - 1:
        table = F.interpolate(table.T[None], size=2 * length - 1, mode="linear")[0].T
    place = torch.arange(length, device=table.device)
    return table[place[:, None] - place + length - 1]
