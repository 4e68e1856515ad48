"""Models that were distilled to few steps: how one is told, and which presets fit its runs."""

import re
from typing import Any

from ..errors import ConfigError

FEW = "few-steps"
"""The preset for runs of `MOST` steps or fewer."""

MOST = 8
"""Steps of the longest run that counts as one of few."""

LORAS = re.compile(
    r"(?<!\d)[1-8][-_ ]?steps?(?![a-z])|lightning|lcm|causvid|self_?forcing|dmd|turbo|hyper", re.IGNORECASE
)
"""Pattern in the names of LoRAs that are made for few steps."""

SCHEDULERS = re.compile("(FlowMatch)?LCM|TCD|SCM|HeliosDMD")
"""Beginning of the names of diffusers' schedulers that only such models run with."""


def few_steps_sign(transformers: Any, scheduler: Any) -> str:
    """Return what tells that a loaded model was distilled to few steps, in words; empty: nothing does."""
    names = (name for part in transformers for name in getattr(part, "peft_config", None) or ())
    lora, kind = next(filter(LORAS.search, names), None), type(scheduler).__name__
    return f"the LoRA {lora}" if lora else kind if SCHEDULERS.match(kind) else ""


def check_preset(level: str, sign: str, steps: int | None, least: int) -> None:
    """Refuse a preset for few steps in a run of many, and one that waits for ``least`` steps on a model for few.

    ``sign``: what tells of few steps, empty: nothing; ``steps``: of the run, None: not known.
    """
    if level == FEW and (steps or 0) > MOST:
        raise ConfigError(
            f"preset {FEW} is for models distilled to {MOST} steps or fewer, and this run has {steps}; take balanced, "
            "or set num_inference_steps"
        )
    if level not in (FEW, "none") and sign and (steps or 0) < least:
        run = "run" if steps is None else f"run of {steps} steps"
        raise ConfigError(
            f"preset {level} skips steps in runs of {least} or more, and {sign} is for few: none are skipped in such a "
            f"{run}; take {FEW}"
        )
