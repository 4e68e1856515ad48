"""Objectives of the search for heads: what a clip is worth, by a metric's name or as ``module:function``."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from dit_accel.adapters.embedded import assets
from dit_accel.errors import ConfigError, did_you_mean

from ..metrics.metric import Clip, Sample
from ..metrics.registered import metric, metric_about, metrics
from ..runs.loaded import FIRST_PROMPT

Objective = Callable[[Clip, str], float]  # (clip [F, height, width, 3] in [0, 1], prompt) -> a number; higher is better

SEARCHED = 256  # held-out prompts of an embedded model among which one is looked for

EXAMPLE = "clip-score@open_clip:ViT-L-14/openai"


def objective_of(name: str, model: str | None) -> Objective:
    """Return an objective: ``checker``, a metric's name, turned round where less is better, or a function."""
    if name == "checker":
        return _checker(model)
    if metric_about(name) is not None:
        quality = metric(name)
        if quality.reference or quality.better == "neither":
            lack = "compares with a reference" if quality.reference else "says neither more nor less is better"
            raise ConfigError(f"the objective {name!r} {lack}; take a metric of a clip alone, such as {EXAMPLE}")
        if (reason := quality.missing()) is not None:
            raise ConfigError(f"the objective {name!r} can't be measured: {reason}")
        sign = -1 if quality.better == "less" else 1
        return lambda clip, prompt: sign * quality(Sample(frames=clip, prompt=prompt)).value
    module, colon, function = name.partition(":")
    if not colon:
        hint = did_you_mean(name, ("checker", *metrics())).replace("dit-accel models", "dit-accel eval metrics")
        raise ConfigError(f"there is no objective {name!r}; {hint}, or give module:function")
    try:
        value = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the objective {name} can't be imported: {error}; give module:function") from None
    if not callable(value):
        raise ConfigError(f"the objective {name} is {value!r}; it must be a function of a clip and its prompt")
    return cast(Objective, value)


def _checker(model: str | None) -> Objective:
    if model is None:
        others = f"take a metric, such as {EXAMPLE} or sharpness, or give module:function"
        raise ConfigError(f"the objective 'checker' knows the embedded models alone; {others}")
    prompts = assets().held_out_prompts(model, FIRST_PROMPT + SEARCHED)
    numbers = {prompt: number for number, prompt in enumerate(prompts)}

    def checker(clip: Clip, prompt: str) -> float:
        if prompt not in numbers:
            raise ConfigError(f"the objective 'checker' has no scene for {prompt!r}; leave --prompt out")
        return float(np.clip(assets().model_closeness(model, numbers[prompt], clip), 0.0, 1.0))

    return checker


KINDS = ("harmonic", "threshold")


@dataclass(frozen=True, slots=True)
class HeadSelection:
    """How the mean scores of a head become what it is ranked by: of one objective, or of several.

    Source: the released code of HeadHunter (arXiv 2506.10978): the harmonic mean of PickScore and CLIP's score, or
    CLIP's of the heads with a PickScore of 20 and an aesthetic score of 6 or more.
    """

    kind: str
    objectives: tuple[str, ...]
    least: tuple[float, ...]

    @classmethod
    def of(cls, text: str) -> "HeadSelection":
        """Read an objective, ``harmonic: A, B`` or ``threshold: A, B >= 20, C >= 6``; the first of these ranks."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            return cls("", (text,), (-math.inf,))
        parts = [part.partition(">=") for part in rest.split(",")]
        names = tuple(name.strip() for name, _, _ in parts)
        try:
            least = tuple(float(number) if sign else -math.inf for _, sign, number in parts)
        except ValueError:
            least = ()
        bounded = [number > -math.inf for number in least]
        wanted = [False] * len(names) if kind == "harmonic" else [False] + [True] * (len(names) - 1)
        if len(names) < 2 or not all(names) or bounded != wanted:
            raise ConfigError(
                f"an objective of several reads 'harmonic: A, B' or 'threshold: A, B >= 20, C >= 6', whose first ranks "
                f"what passes the others, got {text!r}; write it so"
            )
        return cls(kind, names, least)

    def worth(self, scores: Sequence[Sequence[float]]) -> float:
        """Return what a head is ranked by, from each clip's scores; -inf: it does not pass."""
        means = [math.fsum(values) / len(scores) for values in zip(*scores, strict=True)]
        if self.kind != "harmonic":
            return means[0] if all(map(float.__ge__, means, self.least)) else -math.inf
        if min(means) <= 0:
            raise ConfigError(
                f"harmonic means are of numbers above 0, got {', '.join(f'{mean:.4g}' for mean in means)} for "
                f"{', '.join(self.objectives)}; take objectives that are positive, or threshold"
            )
        return len(means) / math.fsum(1 / mean for mean in means)
