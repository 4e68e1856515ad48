"""Sheets of samples: what the averaged weights make of some prompts, from the same noise each time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.adapters.embedded import assets
from dit_accel.files import written_whole

from ..generation.generate import frames_of
from ..generation.media import Frames, contact_sheet
from ..generation.progress import Stages
from ..generation.quiet import quiet_diffusers
from .encoded import NO_CAPTION
from .recipe import FineTuning
from .trainable import Text, Trainable

FOLDER = "samples"
FIRST = 2
"""How many of the first captions are shown where no prompt was given."""


class Sampler:
    """Makes the sheets of one training; knows its prompts, so that the text encoder can go."""

    def __init__(self, pipe: Any, trainable: Trainable, prompts: Sequence[str], recipe: FineTuning) -> None:
        self._pipe, self._prompts, self._recipe = pipe, list(prompts), recipe
        self._texts = [trainable.text(pipe, prompt) for prompt in (NO_CAPTION, *self._prompts)]

    def write(self, step: int, stages: Stages, *, first: bool) -> None:
        """Make the sheet of so many steps done; of several processes that run it together the first one writes."""
        stages.stage(f"samples of step {step}", len(self._prompts))
        videos = []
        for number in range(len(self._prompts)):
            videos.append(self._made(number))
            stages.advance()
        if first:
            folder = self._recipe.output / FOLDER
            folder.mkdir(exist_ok=True)
            with written_whole(folder / f"step-{step:08d}.png") as temporary:
                contact_sheet(videos, self._prompts).save(temporary)

    def _made(self, number: int) -> Frames:
        recipe, pipe = self._recipe, self._pipe
        defaults = assets().model_defaults(recipe.embedded) if recipe.embedded else {}
        steps = recipe.sample_steps or defaults.get("num_inference_steps")
        chosen = {"num_inference_steps": steps, "guidance_scale": defaults.get("guidance_scale")}
        text = _placed(self._texts[1 + number], device := pipe.transformer.device)
        text |= {f"negative_{name}": value for name, value in _placed(self._texts[0], device).items()}
        with quiet_diffusers(), torch.no_grad():
            output = pipe(
                **text,
                height=recipe.height,
                width=recipe.width,
                num_frames=recipe.num_frames,
                generator=torch.Generator().manual_seed(recipe.seed + number),
                output_type="np",
                **{name: value for name, value in chosen.items() if value is not None},
            )
        return np.asarray(frames_of(output))


def _placed(text: Text, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in text.items()}
