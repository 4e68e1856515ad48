"""Models that were distilled to few steps: how one is told, and which presets fit its runs."""

import re
from typing import Any

from ..errors import ConfigError

FEW = "few-steps"  # the preset for runs of `MOST` steps or fewer
MOST = 8
LORAS = re.compile(  # whole words: a LoRA for hyperrealism is none
    r"(?<!\d)[1-8][-_ ]?steps?(?![a-z])"
    r"|(?<![a-z])(lightning|lcm|causvid|\w*forcing|dmd2?|turbo|hyper[-_ ]?(sd|sdxl|flux))(?![a-z])",
    re.IGNORECASE,
)
SCHEDULERS = re.compile("(FlowMatch)?LCM|TCD|SCM|HeliosDMD")  # with which only such models run


def few_steps_sign(transformers: Any, scheduler: Any) -> str:
    """Return what tells that a loaded model was distilled to few steps, in words; empty: nothing does."""
    names = (name for part in transformers for name in getattr(part, "peft_config", None) or ())
    lora, kind = next(filter(LORAS.search, names), None), type(scheduler).__name__
    return f"the LoRA {lora}" if lora else kind if SCHEDULERS.match(kind) else ""


def adds_noise(scheduler: Any) -> bool:
    """Tell whether a scheduler, or a class of this name, adds noise anew in each step: no prediction holds for two."""
    kind = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    sampled = getattr(config, "stochastic_sampling", False) or "sde" in str(getattr(config, "algorithm_type", ""))
    return bool(sampled or SCHEDULERS.match(kind) or re.search("Ancestral|SDE|DDPM|CogVideoXDPM", kind))


def check_preset(level: str, sign: str, steps: int | None, least: int) -> None:
    """Refuse a preset for few steps in a run of many, and one that waits for ``least`` steps where a sign tells of few.

    ``steps``: of the run; None: not known.
    """
    if level == FEW and (steps or 0) > MOST:
        raise ConfigError(f"preset {FEW} is for runs of {MOST} steps or fewer, and this one has {steps}; take balanced")
    if level not in (FEW, "none") and sign and (steps or 0) < least:
        found = "" if steps is None else f", and the run has {steps}"
        raise ConfigError(f"preset {level} waits for {least} steps, {sign} is for few{found}; take preset {FEW}")
