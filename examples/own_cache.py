"""A step cache of your own, on FLUX.1-dev and a card of 32 GB: a step is skipped while the latents hardly moved.

Prediction of what was skipped, guards, branches of guidance and the report come with the base class.
"""

from dataclasses import dataclass

import torch
from diffusers import FluxPipeline

import dit_accel
from dit_accel.methods import MeasuredCacheConfig, StepCacheHandler, mean_change, mean_size, register


@dataclass(frozen=True, slots=True, kw_only=True)
class StillCache(MeasuredCacheConfig):
    name = "my-cache"
    defaults = {"threshold": 0.1, "warmup_steps": 2, "last_steps": 1}  # noqa: RUF012


@register
class StillHandler(StepCacheHandler):
    config_type = StillCache

    def indicator(self, context, decision):
        if (before := decision.kept) is None:
            return None  # nothing was computed yet
        change, size = self.numbers(context, mean_change(self.latents(context), before), mean_size(before))
        return change / size

    def computed(self, context, decision, output):
        decision.kept = self.latents(context)


pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
attachment = dit_accel.attach(pipe, StillCache(threshold=0.15, predictor="taylor"))
pipe("a fox in fresh snow", height=1024, width=1024, num_inference_steps=28).images[0].save("fox.png")
print(attachment.report())
