"""Tunes SoftPAG: searches the heads to perturb on a model's own generations, by greedy rounds with an objective.

Source: HeadHunter (arXiv 2506.10978), its algorithm 1. Where we depart from it: heads that are selected are not
evaluated again, nor is a set that was in another order; ties go to the head that comes first.
"""

import dataclasses
import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from dit_accel_pipelines.generation.generate import attached
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import embedded_name
from dit_accel_pipelines.processes.ranks import Ranks

from dit_accel.adapters.embedded import assets
from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.files import write_json
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.methods.guidance.softpag import SoftPAG

from ..metrics.metric import Clip, Sample
from ..metrics.registered import metric, metric_about, metrics
from ..runs.loaded import FIRST_PROMPT, TuningRequest
from .base import Tuned, TuningRun, replaced_method

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


Trial = tuple[tuple[str, ...], int]  # heads, such as ``L3H1``, in their usual order, and a prompt's number


def tune_heads(
    request: TuningRequest, output: Path, *, objective: str = "checker", rounds: int = 1, per_round: int = 3,
    stages: Stages | None = None, ranks: Ranks | None = None,
) -> Tuned:  # fmt: skip
    """Search heads on the prompts of a request, which may hold a `SoftPAG` with u and a scale.

    Found are ``heads`` in the order of selection, with ``scores`` and ``rounds``, and how many ``clips`` were judged.
    """
    for name, value in (("rounds", rounds), ("per_round", per_round)):
        if value < 1:
            raise ConfigError(f"tune heads needs {name} >= 1, got {value}")
    selection = HeadSelection.of(objective)
    judges = [objective_of(part, embedded_name(request.model)) for part in selection.objectives]
    config, rest = replaced_method(request, SoftPAG, SoftPAG(u=1.0))
    if config.heads is not None:
        raise ConfigError(f"tune heads finds the heads itself, got softpag.heads = {config.heads!r}; leave them out")
    scale = 1.0 if request.guidance_scale is None else request.guidance_scale  # 1: without guidance
    ranks, request = ranks or Ranks(), dataclasses.replace(request, methods=rest, guidance_scale=scale)
    softpag = {**config.to_dict(), "heads": None}
    runs = TuningRun(request, output, ".json", stages, ranks, objective=objective, softpag=softpag)
    transformers = find_transformers(runs.pipe)
    known = resolve_model(next(iter(transformers)), transformers)
    heads = [f"L{layer}H{head}" for layer in range(known.layers) for head in range(known.heads)]
    most = cost(len(heads), rounds, per_round, len(request.prompts))
    runs.stages.note(f"{len(heads)} heads: at most {most} clips, each step of two forwards or less")
    score = lambda trial: _judged(runs, config, judges, trial)  # noqa: E731
    words = lambda trial: f"{'+'.join(trial[0])}, prompt {trial[1] + 1}"  # noqa: E731
    counts = {"prompts": len(request.prompts), "rounds": rounds, "per_round": per_round}
    ranking = search(heads, lambda trials: runs.search(trials, score, words), **counts, worth=selection.worth)
    ranks.close()
    if not ranking:
        raise ConfigError(f"no head passes the objective {objective!r}; lower what it asks for")
    chosen = {"heads": [entry[1] for entry in ranking], "objective": objective, "model": known.name}
    chosen["scores"] = [entry[2] for entry in ranking]
    if ranks.first:
        write_json(output, chosen)
    return Tuned(
        found={**chosen, "rounds": [entry[0] for entry in ranking], "clips": runs.scored},
        columns=("round", "head", objective),
        rows=[(str(number), head, f"{score:.4f}") for number, head, score in ranking],
        remarks=[f"{runs.scored} clips were judged"],
    )


def _judged(runs: TuningRun, config: SoftPAG, judges: Sequence[Objective], trial: Trial) -> list[float]:
    """Return what a set of heads is worth on a prompt, by each objective."""
    chosen, prompt = trial
    text, softpag = runs.prompts[prompt], dataclasses.replace(config, heads=chosen)
    with attached(runs.pipe, (*runs.request.methods, softpag), runs.request.backend):
        clip = runs.run(text, seed=runs.request.seed + prompt)
    score = [float(judge(clip.frames.astype(np.float32) / 255.0, text)) for judge in judges]
    if not all(map(math.isfinite, score)):
        raise ConfigError(f"the objective gave {score} for {chosen}; it must give a finite number")
    return score


def cost(heads: int, rounds: int, per_round: int, prompts: int) -> int:
    """Return the most clips that a search generates; those that repeat are not generated."""
    return sum(max(0, heads - done * per_round) * prompts for done in range(rounds))


def search(
    heads: Sequence[str], evaluate: Callable[[Sequence[Trial]], Sequence[Any]], *, prompts: int, rounds: int,
    per_round: int, worth: Callable[[Sequence[Any]], float] = statistics.fmean,
) -> list[tuple[int, str, float]]:  # fmt: skip
    """Select heads round by round, until none is left: round from 1, head, and its worth, the best of a round first."""
    order = {head: at for at, head in enumerate(heads)}
    ranking: list[tuple[int, str, float]] = []
    for number in range(1, rounds + 1):
        selected = [head for _, head, _ in ranking]
        left = [head for head in heads if head not in selected]
        sets = [tuple(sorted((*selected, head), key=order.__getitem__)) for head in left]
        values = evaluate([(chosen, prompt) for chosen in sets for prompt in range(prompts)])
        scores = {head: worth(values[at * prompts : (at + 1) * prompts]) for at, head in enumerate(left)}
        best = sorted(left, key=lambda head: (-scores[head], order[head]))[:per_round]
        ranking += [(number, head, scores[head]) for head in best if scores[head] > -math.inf]
    return ranking
