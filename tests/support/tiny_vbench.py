"""Tiny random weights in VBench's files, of the same names and forms as the published ones."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit_accel_eval.vbench import weight_files
from torch import Tensor, nn

WIDTH = 64
"""One head wide."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def norm(at: str, width: int = WIDTH) -> dict[str, Tensor]:
    return {f"{at}.weight": 1 + random(width), f"{at}.bias": random(width, seed=1)}


def linear(at: str, wide: int, narrow: int, seed: int = 0) -> dict[str, Tensor]:
    return {f"{at}.weight": random(wide, narrow, seed=seed), f"{at}.bias": random(wide, seed=seed)}


def timm_block(at: str, *, umt: bool = False) -> dict[str, Tensor]:
    found = norm(f"{at}.norm1") | norm(f"{at}.norm2") | linear(f"{at}.attn.qkv", 3 * WIDTH, WIDTH)
    if umt:
        del found[f"{at}.attn.qkv.bias"]
        found |= {f"{at}.attn.q_bias": random(WIDTH), f"{at}.attn.v_bias": random(WIDTH, seed=2)}
    found |= linear(f"{at}.attn.proj", WIDTH, WIDTH)
    return found | linear(f"{at}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{at}.mlp.fc2", WIDTH, 4 * WIDTH)


def clip_block(at: str) -> dict[str, Tensor]:
    found = norm(f"{at}.ln_1") | norm(f"{at}.ln_2") | linear(f"{at}.attn.out_proj", WIDTH, WIDTH)
    found |= {f"{at}.attn.in_proj_weight": random(3 * WIDTH, WIDTH), f"{at}.attn.in_proj_bias": random(3 * WIDTH)}
    return found | linear(f"{at}.mlp.c_fc", 4 * WIDTH, WIDTH) | linear(f"{at}.mlp.c_proj", WIDTH, 4 * WIDTH)


def dino(side: int = 14) -> dict[str, Tensor]:
    found = {"cls_token": random(1, 1, WIDTH), "pos_embed": random(1, side * side + 1, WIDTH)}
    found |= {"patch_embed.proj.weight": random(WIDTH, 3, 16, 16), "patch_embed.proj.bias": random(WIDTH)}
    return found | timm_block("blocks.0") | timm_block("blocks.1") | norm("norm")


def dinov2(side: int = 37) -> dict[str, Tensor]:
    """As DINO with patches of 14 pixels, one block, and scales of what that adds."""
    found = {name: value for name, value in dino(side).items() if not name.startswith("blocks.1.")}
    found |= {"patch_embed.proj.weight": random(WIDTH, 3, 14, 14), "mask_token": random(1, WIDTH)}
    return found | {f"blocks.0.ls{number}.gamma": random(WIDTH, seed=number) for number in (1, 2)}


def umt(classes: int = 400) -> dict[str, Tensor]:
    found = {"patch_embed.proj.weight": random(WIDTH, 3, 1, 16, 16), "patch_embed.proj.bias": random(WIDTH)}
    return found | timm_block("blocks.0", umt=True) | norm("fc_norm") | linear("head", classes, WIDTH)


def picture_tower(at: str, patch: int, features: int, frames: int = 0) -> dict[str, Tensor]:
    kernel = random(WIDTH, 3, 1, patch, patch) if frames else random(WIDTH, 3, patch, patch)
    found = {f"{at}conv1.weight": kernel, f"{at}class_embedding": random(WIDTH), f"{at}proj": random(WIDTH, features)}
    found[f"{at}positional_embedding"] = random((224 // patch) ** 2 + 1, WIDTH)
    if frames:
        found[f"{at}temporal_positional_embedding"] = random(1, frames, WIDTH)
    return found | clip_block(f"{at}transformer.resblocks.0") | norm(f"{at}ln_pre") | norm(f"{at}ln_post")


def text_tower(at: str, features: int, words: int = 49408) -> dict[str, Tensor]:
    found = {f"{at}token_embedding.weight": random(words, WIDTH), f"{at}positional_embedding": random(77, WIDTH)}
    found[f"{at}text_projection"] = random(WIDTH, features)
    return found | clip_block(f"{at}transformer.resblocks.0") | norm(f"{at}ln_final")


def clip(patch: int, features: int = 32) -> dict[str, Tensor]:
    return picture_tower("visual.", patch, features) | text_tower("", features) | {"logit_scale": torch.tensor(4.6)}


def viclip(features: int = 32) -> dict[str, Tensor]:
    return picture_tower("vision_encoder.", 56, features, frames=8) | text_tower("text_encoder.", features)


def scripted(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as OpenAI's files hold them, a TorchScript module's."""
    root = nn.Module()
    for name, value in tensors.items():
        at, *inner = root, *name.split(".")
        for part in inner[:-1]:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(inner[-1], nn.Parameter(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), path)


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Write the named files of weights into a folder, and let their hashes be what they are."""
    made = {
        "dino": dino, "dinov2": dinov2, "umt": umt, "viclip": lambda: {"model": viclip()}, "clip-b32": lambda: clip(32),
        "clip-l14": lambda: clip(56), "aesthetic": lambda: linear_plain(32),
    }  # fmt: skip
    for name in names:
        one = weight_files.WEIGHT_FILES[name]
        path = folder / one.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("clip-"):
            scripted(made[name](), path)
        else:
            torch.save(made[name](), path)
        monkeypatch.setitem(weight_files.WEIGHT_FILES, name, replace(one, sha256=""))


def linear_plain(features: int) -> dict[str, Tensor]:
    return {"weight": random(1, features), "bias": random(1)}
