"""Asks a judge about an arm's clips beside others', in both orders, and says what its answers are worth.

Of a pair asked twice, half the sum of the two differences is the preference, half their difference the position bias.
"""

import itertools
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from ..report.lines import better_of
from ..runs.results import Line, ResultLine, kept_shape, reference_of, run_of
from ..statistics import ClipMean, Judged, clip_mean, judge, rank_correlation
from .contract import ClipJudge, CommandJudge, Question, ShownClip

PIXELS = ("psnr", "ssim")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPair:
    """An arm's clip and the one beside it, and metric -> by how much the arm's is better."""

    clip: int
    prompt: str
    arm: ShownClip
    other: ShownClip
    better: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedQuestion:
    """What a judge's answers to one question say."""

    preference: Judged  # by how much the arm's score is above the other's
    bias: ClipMean  # by how much the clip that is shown first gains
    turned: float  # share of the pairs that the order alone turns round
    agreement: Mapping[str, ClipMean | None]  # metric -> rank correlation of the preference with it, None: none


def judge_named(text: str, device: str | None = None) -> ClipJudge:
    """Return a judge by what ``--judge`` says: ``likert=MODEL``, ``videoscore2``, ``FILE.py:CLASS`` or a command."""
    kind, _, model = text.partition("=")
    if kind in ("likert", "videoscore2"):
        from .vision import LikertJudge, VideoScore2Judge

        if kind == "likert" and not model:
            raise ConfigError("likert asks a model; name its folder or hub id: likert=Qwen/Qwen2.5-VL-7B-Instruct")
        return LikertJudge(model, device) if kind == "likert" else VideoScore2Judge(model, device)
    path, _, name = text.rpartition(":")
    if not path.endswith(".py"):
        return CommandJudge(text)
    made: Any = runpy.run_path(path).get(name) if Path(path).is_file() else None
    if made is None:
        raise ConfigError(f"there is no class {name!r} in {path}, which the judge names; correct it")
    return made()


def pairs_of(
    lines: Sequence[ResultLine], folder: Path, arm: str, against: str | None, count: int, fps: float
) -> list[ClipPair]:
    """Return an arm's clips beside another arm's of the same prompt and seed, None: beside their references.

    Args:
        folder: from which the lines name files.
        count: frames of each clip that are shown.
        fps: frames per second of the clips.
    """
    by_arm: dict[str | None, dict[int, ResultLine]] = {}
    for line in lines:
        by_arm.setdefault(line.arm, {})[line.clip] = line
    for name in (arm, against):
        if name is not None and name not in by_arm:
            raise ConfigError(f"the results have no arm {name!r}; {did_you_mean(name, sorted(map(str, by_arm)))}")
    others = by_arm.get(against, {})
    pairs, missing = list[ClipPair](), list[str]()
    for clip, line in by_arm[arm].items():
        other = others.get(clip)
        if against is not None and other is None:
            continue
        shown, beside = [], (other.kept, run_of(other.raw)) if other else (line.kept_reference, reference_of(line.raw))
        for kept, made_by in ((line.kept, run_of(line.raw)), beside):
            try:
                frames = kept_shape(folder / str(kept), made_by)[0]
                shown.append(ShownClip(folder / str(kept), count, fps * min(count, frames) / frames))
            except ConfigError as error:
                missing.append(str(error))
        if not missing:
            values = {
                name: (line.value(name), other.value(name) if other else 0.0) for name in (*PIXELS, *line.metrics)
            }
            better = {name: (ours - theirs) * (1 if better_of(name) == "more" else -1)
                      for name, (ours, theirs) in values.items()
                      if ours is not None and theirs is not None and better_of(name) != "neither"}  # fmt: skip
            pairs.append(ClipPair(clip=clip, prompt=line.prompt, arm=shown[0], other=shown[1], better=better))
    if missing:
        raise ConfigError(f"{len(missing)} clips can't be shown; run again with frames kept; first: {missing[0]}")
    if not pairs:
        raise ConfigError(f"{arm!r} and {against!r} share no clip; name two arms of the same prompts")
    return pairs


def ask(
    judge: ClipJudge, pairs: Sequence[ClipPair], questions: Sequence[str], advance: Callable[[], None] = lambda: None
) -> list[Line]:
    """Return a line for each question, clip and order, with the scores of the arm and of the other."""
    shown, lines = list[Question](), list[Line]()
    for question, pair, first in itertools.product(questions, pairs, ("arm", "other")):
        clips = (pair.arm, pair.other) if first == "arm" else (pair.other, pair.arm)
        shown.append(Question(question=question, prompt=pair.prompt, first=clips[0], second=clips[1]))
        lines.append({"judge": judge.name, "question": question, "clip": pair.clip, "first": first})
    for line, scores in zip(lines, judge.answers(shown), strict=True):
        ours, other = scores if line["first"] == "arm" else scores[::-1]
        line |= {"arm": ours, "other": other}
        advance()
    return lines


def answers_of(lines: Sequence[Line], pairs: Sequence[ClipPair]) -> dict[str, JudgedQuestion]:
    """Return question -> what the lines of `ask` say of it; preferences are judged together."""
    names = [*dict.fromkeys(line["question"] for line in lines)]
    gaps = np.array([line["arm"] - line["other"] for line in lines]).reshape(len(names), len(pairs), 2)  # by order
    liked, biases = dict(zip(names, gaps.mean(-1), strict=True)), (gaps[..., 0] - gaps[..., 1]) / 2
    preferences = judge(liked)
    metrics = {metric: [place for place, pair in enumerate(pairs) if metric in pair.better]
               for metric in dict.fromkeys(name for pair in pairs for name in pair.better)}  # fmt: skip
    return {
        name: JudgedQuestion(
            preference=preferences[name], bias=clip_mean(bias), turned=float((gap.prod(-1) < 0).mean()),
            agreement={
                metric: rank_correlation(liked[name][places].tolist(), [pairs[at].better[metric] for at in places])
                for metric, places in metrics.items()
            },
        )
        for name, gap, bias in zip(names, gaps, biases, strict=True)
    }  # fmt: skip
