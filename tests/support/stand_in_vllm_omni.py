"""The part of vllm-omni 0.30's diffusers backend that the plugin touches, with its names and signatures."""

from typing import Any

import torch
from torch import nn


class DiffusersAdapterPipeline(nn.Module):
    def __init__(self, *, od_config: Any, device: Any = None):
        super().__init__()
        self.od_config, self.device = od_config, device

    def load_weights(self) -> None:
        self._pipeline = self._load_pipeline_from_pretrained(self.od_config.model, {})
        self._pipeline.to(self.device)

    def _load_pipeline_from_pretrained(self, model_id: str, load_kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def forward(self, req: Any) -> Any:
        sampling = {name: value for name, value in vars(req.sampling_params).items() if value is not None}
        for name in ("seed", "generator_device", "num_outputs_per_prompt", "extra_args"):
            sampling.pop(name, None)
        prompts = [one["prompt"] for one in req.prompts]
        with torch.inference_mode():
            made = self._pipeline(prompt=prompts[0] if len(prompts) == 1 else prompts, **sampling)
        return type("DiffusionOutput", (), {"output": made.frames})()
