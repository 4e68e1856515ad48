"""How the pipelines that can be trained encode a clip and its caption, and predict the velocity at a noise level."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError, UnsupportedModel

from ..pipeline_call import PipelineCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainable:
    """What training must know of one pipeline class.

    Attributes:
        latents: (pipeline, video [B, 3, F, height, width] in [-1, 1]) -> normalised latents [B, C, F', h, w].
        text: (pipeline, caption) -> what the transformer takes of it, [1, tokens, D].
        velocity: (transformer, noisy latents, noise levels [B] in 0..1, text) -> noise less clip, like the latents.
        projections: the linear layers of an attention module that a LoRA changes.
    """

    latents: Callable[[Any, Tensor], Tensor]
    text: Callable[[Any, str], Tensor]
    velocity: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    projections: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


def trainable_of(files: ModelFiles) -> Trainable:
    """Return how a model's pipeline is trained.

    Raises:
        UnsupportedModel: for a pipeline class that is not among them.
        ConfigError: for one of two transformers, or with a timestep for each token.
    """
    name = str(files.index.get("_class_name"))
    if name not in TRAINABLE:
        raise UnsupportedModel(
            f"{files.name} is made for {name}, which finetune can't train; it trains {', '.join(TRAINABLE)}"
        )
    if files.has("transformer_2"):
        raise ConfigError(f"{files.name} has two transformers for different noise levels; finetune trains one alone")
    if files.index.get("expand_timesteps"):
        raise ConfigError(f"{files.name} has a timestep for each token, which finetune does not give; train another")
    return TRAINABLE[name]


def shift_of(scheduler: Any) -> float:
    """Return the shift of the noise levels that a model's scheduler denoises with; 1 where it has none."""
    config = scheduler.config
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


@torch.no_grad()
def _wan_latents(pipe: Any, video: Tensor) -> Tensor:
    vae = pipe.vae
    found = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (torch.tensor(vae.config[f"latents_{part}"], device=found.device) for part in ("mean", "std"))
    shape = (1, -1, 1, 1, 1)
    return (found - mean.view(shape)) / std.view(shape)


@torch.no_grad()
def _wan_text(pipe: Any, caption: str) -> Tensor:
    length = PipelineCall.of(type(pipe)).default("max_sequence_length")
    return pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, max_sequence_length=length, device=pipe.text_encoder.device
    )[0]


def _wan_velocity(transformer: Any, noisy: Tensor, levels: Tensor, text: Tensor) -> Tensor:
    return transformer(hidden_states=noisy, timestep=1000 * levels, encoder_hidden_states=text, return_dict=False)[0]


TRAINABLE = {"WanPipeline": Trainable(latents=_wan_latents, text=_wan_text, velocity=_wan_velocity)}
"""Name of a pipeline class -> how it is trained."""
