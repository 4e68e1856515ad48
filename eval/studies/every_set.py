"""Holds what HeadHunter selects beside every head and every pair: `python eval/studies/every_set.py`.

On an embedded model all sets of one head and of two can be judged, on prompts of tuning, so that the best of them is
known. What a search selects and the best sets are then judged on held-out prompts. Layers for PAG and SLG are judged on
the prompts of tuning as well. Every picture is one JSON line; a run that was stopped goes on.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from dit_accel_assets import model_closeness, model_path
from dit_accel_eval.metrics.sharpness import sharpness
from dit_accel_eval.runs.loaded import FIRST_PROMPT, EmbeddedModel, weights_hash
from dit_accel_eval.runs.results import Line, append_line, read_lines, write_lines
from dit_accel_eval.statistics import clip_mean
from dit_accel_eval.tune.greedy import Job, search
from dit_accel_pipelines.generation.solvers import BEST

from dit_accel import PAG, SLG, ConfigError, SoftPAG
from dit_accel.adapters.model_files import read_model_files
from dit_accel.methods.config import MethodConfig

NONE = "none"
PLAIN = {"wan-plain": {"guidance_scale": 1.0}, "flux-tiny": {"true_cfg_scale": 1.0}}
"""Embedded model -> the call without a negative prompt: the perturbed branch alone guides, as in the paper's search."""

SCALES = {"pag": 3.0, "slg": 1.0}
"""Method -> the scale at which its layers are judged: PAG's own, and that of spatio-temporal skip guidance."""

ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is judged on which model.

    Attributes:
        model: the embedded model.
        prompts: prompts of tuning.
        steps: denoising steps.
        held_out: held-out prompts.
    """

    model: str = "flux-tiny"
    prompts: int = 1
    steps: int = 4
    held_out: int = 8

    @property
    def out(self) -> Path:
        """The file of the lines, below the project's root."""
        return Path(f"eval/results/every-set-{self.model}.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge what the file lacks, then print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = Setting()
    parser.add_argument("--model", default=usual.model, choices=sorted(PLAIN))
    parser.add_argument("--prompts", type=int, default=usual.prompts)
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--held-out", type=int, default=usual.held_out)
    parser.add_argument("--out", type=Path, help="JSON lines; default: eval/results/every-set-MODEL.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, generate nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    setting = Setting(model=options.model, prompts=options.prompts, steps=options.steps, held_out=options.held_out)
    out = options.out or setting.out
    judged = Judged(setting, out, generate=not options.table)
    try:
        if not options.table:
            run(judged)
        print(table(judged))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


class Judged:
    """The pictures that were judged, by what was attached; those that a file lacks are made and appended.

    Args:
        setting: what is judged.
        out: the file.
        generate: make what it lacks; False: that is an error.
    """

    def __init__(self, setting: Setting, out: Path, generate: bool = True) -> None:
        self.setting, self._out, self._generate = setting, out, generate
        self._model: EmbeddedModel | None = None
        self._about = {"model": setting.model, "weights": weights_hash(setting.model)}
        lines = [line for line in read_lines(out) if all(line[name] == self._about[name] for name in self._about)]
        if generate:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_lines(out, lines)  # without a last line that was cut off
        self._known = {(line["set"], line["clip"], line["steps"]): line for line in lines}

    def line(self, name: str, clip: int) -> Line:
        """Return the line of a set, `method_of`, on one prompt."""
        key = name, clip, self.setting.steps
        if key not in self._known:
            if not self._generate:
                raise ConfigError(f"{self._out} lacks the set {name} on clip {clip} in {key[2]} steps; drop --table")
            self._known[key] = self._made(name, clip)
            append_line(self._out, self._known[key])
        return self._known[key]

    def tuning(self, name: str) -> float:
        """Return the mean closeness of a set on the prompts of tuning."""
        clips = range(FIRST_PROMPT, FIRST_PROMPT + self.setting.prompts)
        return float(np.mean([self.line(name, clip)["closeness"] for clip in clips]))

    def _made(self, name: str, clip: int) -> Line:
        model = self._model = self._model or EmbeddedModel(self.setting.model, PLAIN[self.setting.model])
        method = method_of(name)
        made = model.run(clip, steps=self.setting.steps, solver=BEST, methods=() if method is None else (method,))
        return {
            "set": name, "clip": clip, "steps": self.setting.steps, "prompt": model.prompt(clip), **self._about,
            "forwards": made.counts.blocks / model.family.layers,
            "closeness": model_closeness(model.name, clip, made.frames), "sharpness": sharpness(made.frames),
            "torch": torch.__version__,
        }  # fmt: skip


def method_of(name: str) -> MethodConfig | None:
    """Return what a set's name stands for: ``none``, heads ``L3H1+L5H0``, or ``pag L3 1.0`` and ``slg L3 1.0``."""
    if name == NONE:
        return None
    kind, _, rest = name.partition(" ")
    if kind in ("pag", "slg"):
        layer, scale = rest.split()
        kinds = {
            "pag": PAG(layers=layer, scale=float(scale)),
            "slg": SLG(layers=layer, scale=float(scale), start=0.0, stop=1.0),
        }
        return kinds[kind]
    return SoftPAG(heads=tuple(name.split("+")), u=1.0)


def heads_of(setting: Setting) -> list[str]:
    """Return all heads of the model."""
    _, family = read_model_files(str(model_path(setting.model))).identify()
    return [f"L{layer}H{head}" for layer in range(family.layers) for head in range(family.heads)]


def layers_of(heads: Sequence[str]) -> list[str]:
    """Return the layers of heads, in their order."""
    return list(dict.fromkeys(head.partition("H")[0] for head in heads))


def sets_of(heads: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the names of all single heads, all pairs, and all layers with either method."""
    pairs = ["+".join(pair) for pair in combinations(heads, 2)]
    layers = [f"{kind} {layer} {scale}" for kind, scale in SCALES.items() for layer in layers_of(heads)]
    return list(heads), pairs, layers


def hunted(judged: Judged, heads: Sequence[str]) -> tuple[list[str], list[Line]]:
    """Return what HeadHunter selects, one head a round, round by round, and the lines of all that it tried."""
    requested: dict[Job, Line] = {}

    def evaluate(jobs: Sequence[Job]) -> list[float]:
        for chosen, prompt in jobs:
            requested[chosen, prompt] = judged.line("+".join(chosen), FIRST_PROMPT + prompt)
        return [requested[job]["closeness"] for job in jobs]

    rounds = search(heads, evaluate, prompts=judged.setting.prompts, rounds=ROUNDS, per_round=1)
    order = {head: at for at, head in enumerate(heads)}
    found = [head for _, head, _ in rounds]
    return ["+".join(sorted(found[:many], key=order.__getitem__)) for many in (1, 2)], list(requested.values())


def run(judged: Judged) -> None:
    """Judge HeadHunter's sets first, then every set, then the best ones and the search's on held-out prompts."""
    heads = heads_of(judged.setting)
    hunted(judged, heads)
    for part in sets_of(heads):
        for at, name in enumerate(part):
            value = judged.tuning(name)
            if at % 20 == 0:
                print(f"{name}: closeness {value:.3f}", file=sys.stderr)
    for name in shown(judged, heads).values():
        for clip in range(judged.setting.held_out):
            judged.line(name, clip)
    judged.tuning(NONE)


def shown(judged: Judged, heads: Sequence[str]) -> dict[str, str]:
    """Return what the table shows -> the set's name."""
    singles, pairs, layers = sets_of(heads)
    found, _ = hunted(judged, heads)
    best = {
        f"best {kind} layer": max((one for one in layers if one.startswith(kind)), key=judged.tuning)
        for kind in ("pag", "slg")
    }
    return {
        "no guidance": NONE, "HeadHunter's first head": found[0], "best single head": max(singles, key=judged.tuning),
        "HeadHunter's two heads": found[1], "best pair": max(pairs, key=judged.tuning), **best,
    }  # fmt: skip


def table(judged: Judged) -> str:
    """Return the Markdown table: what was selected, its rank among its like, and its closeness."""
    return "\n".join(_rows(judged, heads_of(judged.setting)))


def _rows(judged: Judged, heads: Sequence[str]) -> Iterator[str]:
    singles, pairs, _ = sets_of(heads)
    clips = range(judged.setting.held_out)
    yield "| what | set | rank by tuning | closeness, tuning | closeness, held out | gained over no guidance, points |"
    yield "|---" * 6 + "|"
    for what, name in shown(judged, heads).items():
        alike = next((part for part in (singles, pairs) if name in part), None)
        rank = "" if alike is None else f"{1 + sum(judged.tuning(one) > judged.tuning(name) for one in alike)}"
        rank += "" if alike is None else f" of {len(alike)}"
        values, plain = ([judged.line(one, clip)["closeness"] for clip in clips] for one in (name, NONE))
        gained = [100 * (one - other) for one, other in zip(values, plain, strict=True)]
        text = "" if name == NONE else f"{clip_mean(gained):+}"
        yield f"| {what} | {name} | {rank} | {judged.tuning(name):.3f} | {np.mean(values):.3f} | {text} |"
    tuning = range(FIRST_PROMPT, FIRST_PROMPT + judged.setting.prompts)
    every = sum(judged.line(name, clip)["forwards"] for name in (*singles, *pairs) for clip in tuning)
    requested = sum(line["forwards"] for line in hunted(judged, heads)[1])
    yield ""
    yield (
        f"HeadHunter ran {requested:.0f} forwards for its two rounds, all heads and pairs take {every:.0f}: "
        f"{every / requested:.1f} times as many."
    )


if __name__ == "__main__":
    raise SystemExit(main())
