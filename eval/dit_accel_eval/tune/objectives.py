"""Objectives of the search for heads: what a clip is worth, by a name or as ``module:function``."""

import importlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from dit_accel_assets import held_out_prompts, model_closeness

from dit_accel.errors import ConfigError, did_you_mean

from ..metrics.metric import Clip, Sample
from ..metrics.registered import described, metric
from ..metrics.sharpness import sharpness
from ..runs.loaded import FIRST_PROMPT

Objective = Callable[[Clip, str], float]
"""(clip [F, height, width, 3] in [0, 1], prompt) -> a number; higher is better."""

SEARCHED = 256
"""Held-out prompts of an embedded model among which one is looked for."""

EXAMPLE = "clip-score@open_clip:ViT-L-14/openai"

SCORER_NAMES = ("aesthetic", "clip", "pickscore")


def objective_of(name: str, model: str | None, device: Any = "cpu") -> Objective:
    """Return an objective; raises `ConfigError` for one that is not known, can't be loaded, or knows other models.

    Args:
        name: ``checker``, how near a clip of an embedded model comes to its prompt; ``sharpness``; ``clip``,
            ``aesthetic`` or ``pickscore``, published models (`scorers`), with ``=FOLDER`` or ``=HUB/ID`` behind for
            other weights; a metric that takes no reference, such as ``clip-score@open_clip:ViT-L-14/openai``; or
            ``module:function``, a function of a clip and its prompt.
        model: the embedded model's name; None: another model.
        device: where a published model computes.
    """
    kind, equals, place = name.partition("=")
    if kind in SCORER_NAMES:
        from .scorers import scorer

        if equals and not place:
            raise ConfigError(f"the objective {name!r} names no folder or hub id behind =; give one, or leave = out")
        return scorer(kind, place or None, device)
    if name == "sharpness":
        return lambda clip, prompt: sharpness(clip)
    if name == "checker":
        if model is None:
            raise ConfigError(
                "the objective 'checker' knows the embedded models alone; take pickscore, clip, aesthetic "
                "or sharpness, or give module:function"
            )
        return _checker(model)
    if described(name) is not None:
        return _measured(name)
    module, colon, function = name.partition(":")
    if not colon:
        hint = did_you_mean(name, ("checker", "sharpness", *SCORER_NAMES))
        raise ConfigError(f"there is no objective {name!r}; {hint}, or give a metric's name or module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the objective {name} can't be imported: {error}; give module:function") from None
    if not callable(found):
        raise ConfigError(f"the objective {name} is {found!r}; it must be a function of a clip and its prompt")
    return cast(Objective, found)


def _measured(name: str) -> Objective:
    """Return a metric as an objective: higher is better, so one of which less is better is turned round."""
    found = metric(name)
    if found.reference or found.better == "neither":
        lack = "compares with a reference" if found.reference else "says neither more nor less is better"
        raise ConfigError(f"the objective {name!r} {lack}; take a metric of a clip alone, such as {EXAMPLE}")
    reason = found.missing()
    if reason is not None:
        raise ConfigError(f"the objective {name!r} can't be measured: {reason}")
    sign = -1 if found.better == "less" else 1
    return lambda clip, prompt: sign * found(Sample(frames=clip, prompt=prompt)).value


def _checker(model: str) -> Objective:
    numbers = {prompt: number for number, prompt in enumerate(held_out_prompts(model, FIRST_PROMPT + SEARCHED))}

    def checker(clip: Clip, prompt: str) -> float:
        if prompt not in numbers:
            raise ConfigError(
                f"the objective 'checker' has no scene for {prompt!r}; leave --prompt out, which takes held-out prompts"
            )
        return float(np.clip(model_closeness(model, numbers[prompt], clip), 0.0, 1.0))

    return checker
