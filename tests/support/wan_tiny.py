"""Tiny Wan transformers with random weights and a short run of them, for the tests."""

from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel

import dit_accel
from dit_accel import RadialAttention
from dit_accel.methods.config import MethodConfig
from dit_accel.report.report import Report
from dit_accel.testing.tiny_models import tiny_wan

TINY = {**tiny_wan().config, "in_channels": 12, "out_channels": 12, "text_dim": 64}

RADIAL = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0)
"""Lists that leave tiles out of a tiny model's attention."""


def tiny_transformer(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**TINY, **changes}).eval()


def sharp_transformer(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    """A tiny model that attends sharply enough for votes to drop something."""
    transformer = tiny_transformer(seed, **changes)
    for block in transformer.blocks:
        block.attn1.norm_q.weight.data.mul_(8.0)
    return transformer


def generate(pipe: WanPipeline, **changes: object) -> torch.Tensor:
    """Return the latents of a short run: 9 frames of 32 x 32, 5 x 4 x 4 tokens, 4 steps, guidance in two calls."""
    call = dict(
        prompt="a red circle moving right", num_frames=9, height=32, width=32, num_inference_steps=4,
        guidance_scale=3.0, output_type="latent", max_sequence_length=16,
    )  # fmt: skip
    call.update(changes)
    if "generator" not in call:
        call["generator"] = torch.Generator().manual_seed(0)
    return pipe(**call).frames


def denoise(
    transformer: WanTransformer3DModel, steps: int = 4, *, seed: int = 0, frames: int = 5,
    branches: tuple[str, ...] = ("cond", "uncond"), until: int | None = None, **told: float,
) -> torch.Tensor:  # fmt: skip
    """Return the latents after some told steps without a pipeline, [1, 12, F, 8, 8]: F x 4 x 4 tokens, no text.

    The run is stopped before step ``until``; None: it goes to its end. With ``sigma`` the noise level is told, which
    falls evenly from that to 0.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 12, frames, 8, 8, generator=generator)
    texts = {name: torch.randn(1, 6, 64, generator=generator) for name in ("cond", "uncond")}
    with torch.no_grad():
        for step in range(steps if until is None else until):
            found = []
            for branch in branches:
                levels = {name: top * (1 - step / steps) for name, top in told.items()}
                with transformer.cache_context(branch, step_index=step, num_inference_steps=steps, **levels):
                    time = torch.tensor([1000.0 - 100 * step])
                    found.append(transformer(x, time, texts[branch], return_dict=False)[0])
            x = x - 0.3 * sum(found)
    return x


def guided(transformer: WanTransformer3DModel, *methods: MethodConfig, **run: Any) -> tuple[torch.Tensor, Report, int]:
    """Return the latents of `denoise` under methods alone, the report, and how many forwards ran."""
    with dit_accel.attach(transformer, *methods, preset="none") as attachment:
        out = denoise(transformer, **run)
        return out, attachment.report(), attachment.engine.recorder.forwards_run
