"""Queries and keys of the embedded models' own runs, recorded once a process, and what attention makes of them."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from dit_accel_assets import held_out_prompts, model_defaults, model_path
from torch import Tensor

from dit_accel.adapters.installed import adapter_for
from dit_accel.rules.ultravico import DecayRule
from dit_accel.testing.everything import planned
from dit_accel.testing.recording import RecordedCall, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """An embedded video model, in latent frames.

    Attributes:
        trained: of the clips that it was trained on.
        period: of the frequency that carries most of its attention over frames.
        gamma: half the width of a band around multiples of the period.
        frames: of a clip long enough for the period to come again in it.
    """

    trained: int
    period: float
    gamma: float
    frames: int


VIDEOS = {
    "wan-plain": Video(trained=17, period=29.16, gamma=2.0, frames=68),
    "wan-tiny": Video(trained=9, period=13.54, gamma=1.0, frames=41),
}
PICTURE = {"height": 120, "width": 120}
"""Of flux-tiny: 15 x 15 tokens, trained on 12 x 12."""


def loaded(name: str) -> Any:
    """An embedded model's pipeline, as users load it."""
    pipe = DiffusionPipeline.from_pretrained(model_path(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe: Any, name: str, steps: int, **size: int) -> Tensor:
    """The latents of the first held-out prompt."""
    call = {**model_defaults(name), "num_inference_steps": steps, **size}
    generator = torch.Generator().manual_seed(0)
    return pipe(held_out_prompts(name, 1)[0], **call, generator=generator, output_type="latent")[0]


def clip_size(frames: int) -> dict[str, int]:
    """A clip of so many latent frames of 2 x 2 tokens."""
    return {"height": 16, "width": 16, "num_frames": 2 * frames - 1}


@functools.cache
def calls_of(name: str, frames: int = 1) -> list[RecordedCall]:
    """The self-attention calls of one step on the prompt, a layer each; of a video model with so many latent frames."""
    pipe = loaded(name)
    adapter = adapter_for(type(pipe.transformer).__name__)
    with planned(pipe.transformer, adapter) as attachment, recorded(attachment) as calls:
        generated(pipe, name, 1, **(PICTURE if name == "flux-tiny" else clip_size(frames)))
    return [call for call in calls if call.context.branch != "uncond"]


# What attention makes of a recorded call


def centred_logits(call: RecordedCall) -> Tensor:
    """Logits less their row's mean, float64 [1, H, S, S]: what decay goes by."""
    q, k = call.q.double(), call.k.double()
    return (q @ (k - k.mean(2, keepdim=True)).mT) * call.q.shape[-1] ** -0.5


def frame_distance(call: RecordedCall) -> Tensor:
    """The distance of two tokens' frames, int64 [S, S]."""
    layout = call.context.layout
    frame = torch.arange(layout.visual_tokens) // layout.tokens_per_frame
    return (frame[:, None] - frame).abs()


def decayed(logits: Tensor, distance: Tensor, rule: DecayRule | None) -> Tensor:
    """Logits under a rule: min(x, t x); None leaves them."""
    if rule is None:
        return logits
    t = torch.from_numpy(rule.table(int(distance.max()) + 1)).double()[distance]
    return torch.minimum(logits, t * logits)


def between_frames(calls: list[RecordedCall], rule: DecayRule | None = None) -> np.ndarray:
    """The share of a frame's attention that each frame gets, [F, F]: mean over layers, heads and tokens."""
    size = calls[0].context.layout.tokens_per_frame
    found = []
    for call in calls:
        p = decayed(centred_logits(call), frame_distance(call), rule).softmax(-1)
        by_key = p.unflatten(-1, (-1, size)).sum(-1)
        found.append(by_key.unflatten(2, (-1, size)).mean((0, 1, 3)).numpy())
    return np.mean(found, 0)


def by_distance(shares: np.ndarray) -> np.ndarray:
    """The attention of all frames by distance, [F], of a sum of 1: its curve, from shares [F, F]."""
    distance = np.abs(np.subtract.outer(np.arange(len(shares)), np.arange(len(shares))))
    return np.bincount(distance.ravel(), weights=shares.ravel()) / len(shares)


def alike(shares: np.ndarray, period: float) -> float:
    """The mean correlation of two frames' rows of shares [F, F], one period apart: 1 where attention repeats."""
    turn = round(period)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(shares, shares[turn:], strict=False)]))


def in_bands(curve: np.ndarray, period: float, gamma: float) -> float:
    """The share of a curve [F] within ``gamma`` frames of the multiples of the period, itself not 0."""
    distance = np.arange(len(curve))
    multiple = np.maximum(1, np.rint(distance / period))
    return float(curve[np.abs(distance - multiple * period) <= gamma].sum())
