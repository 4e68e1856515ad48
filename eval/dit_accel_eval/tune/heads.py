"""Tunes SoftPAG: searches the heads to perturb on a model's own generations, and shows what they do.

Every clip that was judged is one JSON line beside the output, so that a search that was stopped goes on, and nothing is
generated twice.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.generate import attached, run
from dit_accel_pipelines.generation.loading import load_pipeline, pick_device
from dit_accel_pipelines.generation.media import contact_sheet, upscale
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, embedded_name, settle
from dit_accel_pipelines.processes.ranks import Ranks

from dit_accel import ConfigError
from dit_accel.files import check_writable, json_text, written_whole
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.methods.guidance.softpag import SoftPAG

from ..metrics.metric import Clip
from ..runs.loaded import FIRST_PROMPT, embedded_prompts
from ..runs.results import Line, append_line, read_lines, write_lines
from .base import Table, Tuned, check_output, check_settings, run_settings
from .head_search import Job, Round, Rung, cost, rungs_of, search
from .objectives import objective_of

NO_GUIDANCE = {"guidance_scale": 1.0}
"""The search guides by the perturbed branch alone, as the paper's does."""

SHOWN = 3
"""Prompts on the contact sheet; of an embedded model, others than those of the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundHeads(Tuned):
    """What `tune_heads` found and wrote.

    Attributes:
        output: the file, for ``softpag.heads``.
        sheet: the contact sheet: each prompt without and with the heads.
        model: what was searched.
        objective: by what.
        rounds: what each round selected.
        clips: clips that were generated for it, all runs of the search together.
        steps: their denoising steps.
    """

    output: Path
    sheet: Path
    model: str
    objective: str
    rounds: tuple[Round, ...]
    clips: int
    steps: int

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads, in the order of their selection."""
        return tuple(head for one in self.rounds for head in one.heads)

    def table(self) -> Table:
        """Return the heads by round."""
        rows = [
            (str(number), head, f"{score:.4f}")
            for number, one in enumerate(self.rounds, 1)
            for head, score in zip(one.heads, one.scores, strict=True)
        ]
        remarks = [f"{self.clips} clips of {self.steps} steps in all were judged", f"before and after: {self.sheet}"]
        return ("round", "head", self.objective), rows, remarks

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {**Tuned.to_dict(self), "heads": list(self.heads)}


def tune_heads(
    request: Request,
    output: Path,
    *,
    objective: str = "checker",
    rounds: int = 1,
    per_round: int = 3,
    halvings: int = 1,
    stages: Stages | None = None,
    ranks: Ranks | None = None,
) -> FoundHeads:
    """Search heads on the prompts of a request, which may hold a `SoftPAG` with u and a scale.

    Args:
        request: what to generate; without a guidance scale of its own it is guided by the perturbed branch alone.
        output: JSON file for ``softpag.heads``.
        objective: see `objective_of`.
        rounds: greedy rounds.
        per_round: heads that a round adds.
        halvings: earlier judgements of a round, each on half of the prompts and steps of the next.
        stages: progress bars; None shows none.
        ranks: the processes that share the clips; the first writes. None: this one alone.
    """
    for name, value, least in (("rounds", rounds, 1), ("per_round", per_round, 1), ("halvings", halvings, 0)):
        if value < least:
            raise ConfigError(f"tune heads needs {name} >= {least}, got {value}")
    check_output(output, ".json")
    model = embedded_name(request.model)
    judge = objective_of(objective, model, pick_device(request.device))
    request, config = _settled(request)
    stages = stages or Stages(quiet=True)
    stages.stage("loading")
    pipe = load_pipeline(request)
    transformers = find_transformers(pipe)
    known = resolve_model(next(iter(transformers)), transformers)
    heads = [f"L{layer}H{head}" for layer in range(known.layers) for head in range(known.heads)]
    rungs = rungs_of(len(request.prompts), request.num_inference_steps or 20, halvings)
    most, steps = cost(len(heads), rounds, per_round, rungs)
    stages.note(f"{len(heads)} heads: at most {most} clips, {steps} steps, each of two forwards or less")
    generator = _Generator(pipe, request, config, stages)
    ranks = ranks or Ranks()
    settings = {**run_settings(request, objective=objective), "softpag": {**config.to_dict(), "heads": None}}
    memory = _Memory(output.with_name(f"{output.name}l"), settings, ranks)

    def prepare(jobs: Sequence[Job]) -> None:
        missing = [job for job in jobs if job not in memory]
        ranks.spread(missing, lambda job: generator.judged(job, judge, objective), memory.add)

    selected = search(heads, lambda *job: memory.find(job), rungs, rounds=rounds, per_round=per_round, prepare=prepare)
    ranks.close()
    found = FoundHeads(
        output=output, sheet=output.with_suffix(".png"), model=known.name, objective=objective, rounds=tuple(selected),
        clips=len(memory.lines) - 1, steps=sum(line["steps"] for line in memory.lines[1:]),
    )  # fmt: skip
    if ranks.first:
        scores = [score for one in found.rounds for score in one.scores]
        about = {"heads": found.heads, "objective": objective, "model": found.model, "scores": scores}
        with written_whole(output) as temporary:
            temporary.write_text(json_text(about) + "\n", encoding="utf-8")
        _show(found, generator, request, model, rungs[-1])
    return found


def _settled(request: Request) -> tuple[Request, SoftPAG]:
    """Return the settled request without SoftPAG, and the SoftPAG whose heads are searched."""
    config = next((one for one in request.methods if isinstance(one, SoftPAG)), SoftPAG(u=1.0))
    if config.heads is not None:
        raise ConfigError(f"tune heads finds the heads itself, got softpag.heads = {config.heads!r}; leave them out")
    others = tuple(one for one in request.methods if not isinstance(one, SoftPAG))
    request = dataclasses.replace(request, methods=others)
    if request.guidance_scale is None:
        request = dataclasses.replace(request, **NO_GUIDANCE)
    return settle(request)[0], config


class _Generator:
    """Generates clips of a loaded pipeline with some heads perturbed."""

    def __init__(self, pipe: Any, request: Request, config: SoftPAG, stages: Stages) -> None:
        self._pipe, self._request, self._config, self._stages = pipe, request, config, stages

    def clip(self, prompt: str, seed: int, heads: Sequence[str], steps: int) -> Clip:
        """Return a clip [F, height, width, 3] in [0, 1]."""
        request = dataclasses.replace(self._request, seed=seed, num_inference_steps=steps)
        softpag = (dataclasses.replace(self._config, heads=tuple(heads)),) if heads else ()
        with attached(self._pipe, (*request.methods, *softpag), request.backend):
            made = run(self._pipe, prompt, request, stages=self._stages)
        return made.frames.astype(np.float32) / 255.0

    def judged(self, job: Job, judge: Callable[[Clip, str], float], objective: str) -> float:
        """Return what some heads are worth on one prompt, a finite number."""
        chosen, prompt, steps = job
        self._stages.stage(f"{'+'.join(chosen)}, prompt {prompt + 1}, {steps} steps")
        text = self._request.prompts[prompt]
        found = float(judge(self.clip(text, self._request.seed + prompt, chosen, steps), text))
        if not np.isfinite(found):
            raise ConfigError(f"the objective {objective} gave {found} for {chosen}; it must give a finite number")
        return found


class _Memory:
    """What was judged: one JSON line a clip, behind one with the search's settings; the first process writes them."""

    def __init__(self, path: Path, settings: dict[str, Any], ranks: Ranks) -> None:
        self._path, self._first = path, ranks.first
        self.lines = ranks.shared(lambda: _lines(path, json.loads(json.dumps(settings))))
        known = ((line["heads"], line["prompt"], line["steps"], line["score"]) for line in self.lines[1:])
        self._known = {self._key(job): score for *job, score in known}

    def __contains__(self, job: Job) -> bool:
        return self._key(job) in self._known

    def find(self, job: Job) -> float:
        """Return what a set was worth, in whatever order its heads were judged."""
        return self._known[self._key(job)]

    def add(self, job: Job, score: float) -> None:
        """Keep what a set is worth."""
        chosen, prompt, steps = job
        self._known[self._key(job)] = score
        self.lines.append({"heads": list(chosen), "prompt": prompt, "steps": steps, "score": score})
        if self._first:
            append_line(self._path, self.lines[-1])

    def _key(self, job: Sequence[Any]) -> tuple[frozenset[str], int, int]:
        return frozenset(job[0]), job[1], job[2]


def _lines(path: Path, settings: dict[str, Any]) -> list[Line]:
    """Return the lines of a search that goes on, or begins; a last line that was cut off is taken out of the file."""
    check_writable(path, "tune's lines")
    lines = read_lines(path) or [settings]
    check_settings(path, "clips", lines[0], settings)
    write_lines(path, lines)
    return lines


def _show(found: FoundHeads, generator: _Generator, request: Request, model: str | None, rung: Rung) -> None:
    """Write the contact sheet: prompts that the search did not use, where the model has some, without and with."""
    prompts = request.prompts[:SHOWN]
    if model is not None:
        known = embedded_prompts(model, len(request.prompts) + SHOWN + FIRST_PROMPT)
        prompts = tuple(prompt for prompt in known if prompt not in request.prompts)[:SHOWN]
    videos, labels = [], []
    for number, prompt in enumerate(prompts):
        for heads in ((), found.heads):
            clip = generator.clip(prompt, request.seed + FIRST_PROMPT + number, heads, rung.steps)
            frames = (clip * 255).round().astype(np.uint8)
            videos.append(upscale(frames, max(1, 128 // frames.shape[1])))
            labels.append(f"{'with' if heads else 'without'}: {prompt}")
    with written_whole(found.sheet) as temporary:
        contact_sheet(videos, labels).save(temporary)
