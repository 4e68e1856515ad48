"""The part of SGLang 0.5.23's diffusers backend that the plugin touches, with its names and signatures."""

import warnings
from typing import Any

import torch
from diffusers import DiffusionPipeline


class DiffusersExecutionStage:
    def __init__(self, diffusers_pipe: Any):
        self.diffusers_pipe = diffusers_pipe

    def forward(self, batch: Any, server_args: Any) -> Any:
        names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "num_frames")
        kwargs = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
        kwargs["generator"] = batch.generator or torch.Generator().manual_seed(batch.seed)
        kwargs |= batch.extra.get("diffusers_kwargs", {})
        with torch.no_grad(), warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            batch.output = self.diffusers_pipe(**kwargs).frames.clamp(0, 1)
        return batch


class DiffusersPipeline:
    def _load_diffusers_pipeline(self, model_path: str, server_args: Any) -> Any:
        return DiffusionPipeline.from_pretrained(model_path)
