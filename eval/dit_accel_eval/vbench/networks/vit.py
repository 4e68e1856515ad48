"""The transformers behind VBench, as functions of their published weights: DINO, UMT, CLIP, OpenCLIP and ViCLIP.

Sources: DINO (Caron et al., arXiv 2104.14294), DINOv2 (Oquab et al., arXiv 2304.07193), UMT (Li et al., arXiv
2303.16058), ViCLIP (Wang et al., arXiv 2307.06942), CLIP (Radford et al., arXiv 2103.00020). Depth and width are those
of the weights; heads are 64 wide in all but OpenCLIP's larger towers.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
Act = Callable[[Tensor], Tensor]

HEAD = 64
"""Width of a head."""


def quick_gelu(x: Tensor) -> Tensor:
    """Return CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def dino(frames: Tensor, weights: Weights, head: int = HEAD) -> Tensor:
    """Return the features of frames, [F, D]: the class token after the last norm.

    Args:
        frames: normalized [F, 3, height, width]; what is left of patches at the right and below is not seen.
        weights: of DINO's or DINOv2's own checkpoint.
        head: width of a head.
    """
    kernel = weights["patch_embed.proj.weight"]
    patches = F.conv2d(frames, kernel, weights["patch_embed.proj.bias"], kernel.shape[2:])
    x = torch.cat([weights["cls_token"].expand(len(frames), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + _positions(weights["pos_embed"], *patches.shape[2:])
    for at in _blocks(weights, "blocks"):
        x = _timm_block(x, weights, at, head)
    return _norm(x[:, 0], weights, "norm", 1e-6)


def umt(clips: Tensor, weights: Weights, head: int = HEAD) -> Tensor:
    """Return the logits of actions, [B, classes].

    Args:
        clips: normalized [B, 3, frames, height, width].
        weights: of a finetuned checkpoint; without ``pos_embed``, positions are UMT's sines.
        head: width of a head.
    """
    kernel = weights["patch_embed.proj.weight"]
    patches = F.conv3d(clips, kernel, weights["patch_embed.proj.bias"], kernel.shape[2:])
    x = patches.flatten(2).transpose(1, 2)
    positions = weights.get("pos_embed")
    x = x + (sines(patches.shape[2], patches.shape[3], x.shape[2]) if positions is None else positions)
    for at in _blocks(weights, "blocks"):
        x = _timm_block(x, weights, at, head)
    return _linear(_norm(x.mean(1), weights, "fc_norm", 1e-6), weights, "head")


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


def clip_video(clips: Tensor, weights: Weights, at: str, head: int = HEAD, act: Act = quick_gelu) -> Tensor:
    """Return the embeddings of clips, [B, D], by CLIP's picture tower or ViCLIP's of clips.

    Args:
        clips: normalized [B, 3, frames, height, width]; CLIP's tower takes single frames.
        weights: of the checkpoint.
        at: what the tower's names begin with: ``visual.`` or ``vision_encoder.``.
        head: width of a head.
        act: OpenCLIP's towers have GELU itself.
    """
    kernel = weights[f"{at}conv1.weight"]
    kernel = kernel[:, :, None] if kernel.ndim == 4 else kernel
    patches = F.conv3d(clips, kernel, None, kernel.shape[2:])
    x = patches.flatten(3).permute(0, 2, 3, 1)  # [B, frames, patches, width]
    place = weights[f"{at}positional_embedding"]
    x = x + place[1:]
    if f"{at}temporal_positional_embedding" in weights:
        x = x + weights[f"{at}temporal_positional_embedding"][:, :, None]
    first = (weights[f"{at}class_embedding"] + place[0]).expand(len(x), 1, -1)
    x = torch.cat([first, x.flatten(1, 2)], 1)
    x = _norm(x, weights, f"{at}ln_pre", 1e-5)
    for block in _blocks(weights, f"{at}transformer.resblocks"):
        x = _clip_block(x, weights, block, head, act)
    return _norm(x[:, 0], weights, f"{at}ln_post", 1e-5) @ weights[f"{at}proj"]


def clip_text(tokens: Tensor, weights: Weights, at: str, head: int = HEAD, act: Act = quick_gelu) -> Tensor:
    """Return the embeddings of texts, [B, D], at the last token, by CLIP's or ViCLIP's text tower; see `clip_video`.

    Tokens are int64 [B, T], zeros behind the last one, which is the greatest; names begin with nothing or
    ``text_encoder.``.
    """
    x = F.embedding(tokens, weights[f"{at}token_embedding.weight"])
    x = x + weights[f"{at}positional_embedding"][: tokens.shape[1]]
    for block in _blocks(weights, f"{at}transformer.resblocks"):
        x = _clip_block(x, weights, block, head, act, causal=True)
    x = _norm(x, weights, f"{at}ln_final", 1e-5)
    return x[torch.arange(len(x)), tokens.argmax(1)] @ weights[f"{at}text_projection"]


def _positions(trained: Tensor, down: int, right: int) -> Tensor:
    """Return DINO's positions for a grid: the trained square's, bicubic, with a tenth of a patch to be safe."""
    count = trained.shape[1] - 1
    side = int(count**0.5)
    if (down, right) == (side, side):
        return trained
    square = trained[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    by = ((down + 0.1) / side, (right + 0.1) / side)
    grid = F.interpolate(square, scale_factor=by, mode="bicubic")
    return torch.cat([trained[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _timm_block(x: Tensor, weights: Weights, at: str, head: int) -> Tensor:
    """Return a block of DINO's or UMT's, which has biases of queries and values alone; DINOv2 scales what each adds."""
    kernel, bias = weights[f"{at}.attn.qkv.weight"], weights.get(f"{at}.attn.qkv.bias")
    if bias is None:
        query, value = weights[f"{at}.attn.q_bias"], weights[f"{at}.attn.v_bias"]
        bias = torch.cat([query, torch.zeros_like(value), value])
    mixed = F.linear(_norm(x, weights, f"{at}.norm1", 1e-6), kernel, bias)
    x = x + weights.get(f"{at}.ls1.gamma", 1.0) * _linear(_attention(mixed, head), weights, f"{at}.attn.proj")
    more = _mlp(_norm(x, weights, f"{at}.norm2", 1e-6), weights, f"{at}.mlp.fc1", f"{at}.mlp.fc2", F.gelu)
    return x + weights.get(f"{at}.ls2.gamma", 1.0) * more


def _clip_block(x: Tensor, weights: Weights, at: str, head: int, act: Act, *, causal: bool = False) -> Tensor:
    inner = _norm(x, weights, f"{at}.ln_1", 1e-5)
    mixed = F.linear(inner, weights[f"{at}.attn.in_proj_weight"], weights[f"{at}.attn.in_proj_bias"])
    x = x + _linear(_attention(mixed, head, causal=causal), weights, f"{at}.attn.out_proj")
    return x + _mlp(_norm(x, weights, f"{at}.ln_2", 1e-5), weights, f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", act)


def _attention(mixed: Tensor, head: int, *, causal: bool = False) -> Tensor:
    """Return the attention's output [B, T, D] of queries, keys and values beside each other, [B, T, 3 D]."""
    query, key, value = (one.unflatten(2, (-1, head)).transpose(1, 2) for one in mixed.chunk(3, 2))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)


def _mlp(x: Tensor, weights: Weights, wide: str, narrow: str, act: Act) -> Tensor:
    return _linear(act(_linear(x, weights, wide)), weights, narrow)


def _linear(x: Tensor, weights: Weights, at: str) -> Tensor:
    return F.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])


def _norm(x: Tensor, weights: Weights, at: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{at}.weight"], weights[f"{at}.bias"], eps)


def _blocks(weights: Weights, at: str) -> list[str]:
    """Return the names of the blocks, in order."""
    found = (re.match(rf"{re.escape(at)}\.(\d+)\.", name) for name in weights)
    return [f"{at}.{number}" for number in sorted({int(one[1]) for one in found if one})]
