"""What training must know of a pipeline class: how it encodes a clip and its caption, and predicts the velocity."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Text = Mapping[str, Tensor]
"""A caption as the pipeline's own call takes it, encoded: name of the argument -> [B, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainable:
    """What training must know of one pipeline class."""

    # (pipeline, video [B, 3, F, height, width] in [-1, 1]) -> normalised latents [B, C, F', h, w]
    latents: Callable[[Any, Tensor], Tensor]
    text: Callable[[Any, str], Text]  # (pipeline, caption) -> the caption, encoded, of a batch of one
    # (transformer, pipeline, noisy latents, noise levels [B] in 0..1, text) -> noise less clip, like the latents,
    # whatever shape and sign the transformer has
    velocity: Callable[[Any, Any, Tensor, Tensor, Text], Tensor]
    # the linear layers of an attention module that a LoRA changes
    projections: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    # layer of the block that gives attention's output where the module has none of its own
    joined_output: str | None = None


def text_parts(pipe: Any) -> dict[str, Any]:
    """Return the components of a pipeline that encode text: encoders and tokenizers, by name."""
    there = {name: part for name, part in pipe.components.items() if part is not None}
    return {name: part for name, part in there.items() if name.startswith(("text_encoder", "tokenizer"))}


def shift_at(scheduler: Any, tokens: int) -> float:
    """Return the shift of the noise levels that a model's scheduler denoises with; 1 where it has none.

    ``tokens``: of the latents, by which some schedulers' shift grows.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    tokens_there = config["max_image_seq_len"] - config["base_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / tokens_there
    mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
