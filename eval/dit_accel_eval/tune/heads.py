"""Tunes SoftPAG: searches the heads to perturb on a model's own generations, by greedy rounds with an objective.

Source: HeadHunter (arXiv 2506.10978), its algorithm 1. Where we depart from it: heads that are selected are not
evaluated again, nor is a set that was in another order; ties go to the head that comes first.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.generate import attached
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import embedded_name
from dit_accel_pipelines.processes.ranks import Ranks

from dit_accel import ConfigError
from dit_accel.files import write_json
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.methods.guidance.softpag import SoftPAG

from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, replaced_method
from .objectives import HeadSelection, Objective, objective_of

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
