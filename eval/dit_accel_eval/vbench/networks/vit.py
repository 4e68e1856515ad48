"""DINO, DINOv2 and UMT: timm's transformers, filled from their official files.

Sources: DINO (Caron et al., arXiv 2104.14294), DINOv2 (Oquab et al., arXiv 2304.07193), UMT (Li et al., arXiv
2303.16058). Depth and width are those of the weights; heads are 64 wide.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]

HEAD = 64
"""Width of a head."""


def tower(held: Weights) -> Any:
    """Return DINO or UMT with all its weights; raises `KeyError` or `RuntimeError` for those of another network.

    DINO has a class token and trained positions; UMT has neither, biases of queries and values alone, and classes.
    """
    from timm.models.vision_transformer import VisionTransformer

    kernel, known = held["patch_embed.proj.weight"], dict(held)
    places = known.get("pos_embed") if "cls_token" in known else None
    options: dict[str, Any] = {"num_classes": 0, "global_pool": "token"}
    if places is None:
        options = {"num_classes": len(known["head.weight"]), "global_pool": "avg", "class_token": False,
                   "pos_embed": "none"}  # fmt: skip
        known["patch_embed.proj.weight"] = kernel = kernel.squeeze(2)
        known.pop("pos_embed", None)
        for at in _blocks(held, "blocks"):
            query, value = (known.pop(f"{at}.attn.{one}_bias") for one in "qv")
            known[f"{at}.attn.qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])
    side = int((places.shape[1] - 1) ** 0.5) if places is not None else 1
    made = VisionTransformer(
        img_size=side * kernel.shape[-1], patch_size=kernel.shape[-1], embed_dim=len(kernel),
        depth=len(_blocks(held, "blocks")), num_heads=len(kernel) // HEAD,
        init_values=1.0 if "blocks.0.ls1.gamma" in known else None, **options,
    )  # fmt: skip
    made.load_state_dict({name: value for name, value in known.items() if name != "mask_token"})
    made.register_buffer("places", held.get("pos_embed"))
    return made


def dino(network: Any, frames: Tensor) -> Tensor:
    """Return the features of normalized frames [F, 3, height, width], [F, D]: the class token after the last norm.

    What is left of patches at the right and below is not seen.
    """
    patches = network.patch_embed.proj(frames)
    x = torch.cat([network.cls_token.expand(len(frames), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    return network.norm(network.blocks(x + _positions(network.pos_embed, *patches.shape[2:])))[:, 0]


def _positions(trained: Tensor, down: int, right: int) -> Tensor:
    """Return DINO's positions for a grid: the trained square's, bicubic, with a tenth of a patch to be safe."""
    side = int((trained.shape[1] - 1) ** 0.5)
    if (down, right) == (side, side):
        return trained
    square = trained[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    by = ((down + 0.1) / side, (right + 0.1) / side)
    grid = F.interpolate(square, scale_factor=by, mode="bicubic")
    return torch.cat([trained[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def umt(network: Any, frames: Tensor) -> Tensor:
    """Return the logits of actions, [classes], of a clip's normalized frames [F, 3, height, width]."""
    patches = network.patch_embed.proj(frames)
    x = patches.flatten(2).transpose(1, 2).flatten(0, 1)[None]
    positions = network.places
    positions = sines(len(frames), patches.shape[2], x.shape[2]).to(x) if positions is None else positions
    return network.head(network.fc_norm(network.blocks(x + positions).mean(1)))[0]


def sines(frames: int, side: int, width: int, trained: int = 8) -> Tensor:
    """Return UMT's positions [1, frames x side x side, width]: sines over those of 8 frames, linear in between."""
    place = torch.arange(trained * side * side, dtype=torch.float64)[:, None]
    angle = place / 10000 ** (2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()
    if frames == trained:
        return table[None]
    by_place = table.reshape(trained, side * side, width).permute(1, 2, 0)
    between = F.interpolate(by_place, size=frames, mode="linear")
    return between.permute(2, 0, 1).reshape(1, -1, width)


def _linear(x: Tensor, weights: Weights, at: str) -> Tensor:
    return F.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])


def _norm(x: Tensor, weights: Weights, at: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{at}.weight"], weights[f"{at}.bias"], eps)


def _blocks(weights: Weights, at: str) -> list[str]:
    """Return the names of the blocks, in order."""
    found = (re.match(rf"{re.escape(at)}\.(\d+)\.", name) for name in weights)
    return [f"{at}.{number}" for number in sorted({int(one[1]) for one in found if one})]
