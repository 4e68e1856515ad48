"""Asks a judge about an arm's clips beside others', in both orders, and says what its answers are worth.

Of a pair asked twice, half the sum of the two differences is the preference, half their difference the position bias.
"""

import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """What a judge's answers to one question say.

    Attributes:
        preference: by how much the arm's score is above the other's.
        bias: by how much the clip that is shown first gains.
        turned: share of the pairs that the order alone turns round.
        agreement: metric -> rank correlation of the preference with the metric's own; None where there is none.
    """

    preference: Judged
    bias: ClipMean
    turned: float
    agreement: Mapping[str, ClipMean | None]


def judge_named(text: str, device: str | None = None) -> ClipJudge:
    """Return a judge by what ``--judge`` says: ``likert=MODEL``, ``videoscore2``, ``FILE.py:CLASS`` or a command."""
    kind, _, model = text.partition("=")
    if kind in ("likert", "videoscore2"):
        from .vision import LikertJudge, VideoScore2Judge

        if kind == "likert" and not model:
            raise ConfigError("likert asks a model; name its folder or hub id: likert=Qwen/Qwen2.5-VL-7B-Instruct")
        return LikertJudge(model, device) if kind == "likert" else VideoScore2Judge(model, device)
    path, _, name = text.rpartition(":")
    if path.endswith(".py"):
        found: Any = runpy.run_path(path).get(name) if Path(path).is_file() else None
        if found is None:
            raise ConfigError(f"there is no class {name!r} in {path}, which the judge names; correct it")
        return found()
    return CommandJudge(text)


def pairs_of(
    lines: Sequence[ResultLine], folder: Path, arm: str, against: str | None, count: int, fps: float
) -> list[ClipPair]:
    """Return an arm's clips beside another arm's of the same prompt and seed, None: beside their references.

    Args:
        folder: from which the lines name files.
        count: frames of each clip that are shown.
        fps: frames per second of the clips.
    """
    names = {line.arm for line in lines}
    for name in (arm, against):
        if name is not None and name not in names:
            raise ConfigError(f"the results have no arm {name!r}; {did_you_mean(name, sorted(names))}")
    others = {line.clip: line for line in lines if line.arm == against}
    pairs, missing = list[ClipPair](), list[str]()
    for line in (line for line in lines if line.arm == arm and (against is None or line.clip in others)):
        other = others.get(line.clip)
        beside = (other.kept, run_of(other.raw)) if other else (line.kept_reference, reference_of(line.raw))
        shown = []
        for kept, made_by in ((line.kept, run_of(line.raw)), beside):
            try:
                frames = kept_shape(folder / str(kept), made_by)[0]
                shown.append(ShownClip(folder / str(kept), count, fps * min(count, frames) / frames))
            except ConfigError as error:
                missing.append(str(error))
        if not missing:
            better = _better(line, other)
            pairs.append(ClipPair(clip=line.clip, prompt=line.prompt, arm=shown[0], other=shown[1], better=better))
    if missing:
        raise ConfigError(f"{len(missing)} clips can't be shown; run again with frames kept; first: {missing[0]}")
    if not pairs:
        raise ConfigError(f"{arm!r} and {against!r} share no clip; name two arms of the same prompts")
    return pairs


def _better(line: ResultLine, other: ResultLine | None) -> dict[str, float]:
    """Return metric -> by how much a line is better than another, or how good where there is none."""
    better = {}
    for name in (*PIXELS, *line.metrics):
        value, beside = line.value(name), other.value(name) if other else 0.0
        if value is not None and beside is not None and better_of(name) != "neither":
            better[name] = (value - beside) * (1 if better_of(name) == "more" else -1)
    return better


def ask(
    judge: ClipJudge, pairs: Sequence[ClipPair], questions: Sequence[str], advance: Callable[[], None] = lambda: None
) -> list[Line]:
    """Return a line for each question, clip and order, with the scores of the arm and of the other."""
    asked, lines = list[Question](), list[Line]()
    for question in questions:
        for pair in pairs:
            for first, clips in (("arm", (pair.arm, pair.other)), ("other", (pair.other, pair.arm))):
                asked.append(Question(question=question, prompt=pair.prompt, first=clips[0], second=clips[1]))
                lines.append({"judge": judge.name, "question": question, "clip": pair.clip, "first": first})
    for line, scores in zip(lines, judge.answers(asked), strict=True):
        ours, other = scores if line["first"] == "arm" else scores[::-1]
        line |= {"arm": ours, "other": other}
        advance()
    return lines


def answers_of(lines: Sequence[Line], pairs: Sequence[ClipPair]) -> dict[str, JudgedQuestion]:
    """Return question -> what the lines of `ask` say of it; preferences are judged together."""
    gaps: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        gaps.setdefault(line["question"], {}).setdefault(line["clip"], {})[line["first"]] = line["arm"] - line["other"]
    liked = {name: [(gap["arm"] + gap["other"]) / 2 for gap in each.values()] for name, each in gaps.items()}
    preferences = judge(liked)
    metrics = dict.fromkeys(name for pair in pairs for name in pair.better)
    return {
        name: JudgedQuestion(
            preference=preferences[name],
            bias=clip_mean([(gap["arm"] - gap["other"]) / 2 for gap in each.values()]),
            turned=sum(gap["arm"] * gap["other"] < 0 for gap in each.values()) / len(each),
            agreement={metric: _agreement(liked[name], pairs, metric) for metric in metrics},
        )
        for name, each in gaps.items()
    }


def _agreement(liked: Sequence[float], pairs: Sequence[ClipPair], metric: str) -> ClipMean | None:
    both = [(value, pair.better[metric]) for value, pair in zip(liked, pairs, strict=True) if metric in pair.better]
    return rank_correlation(*zip(*both, strict=True)) if both else None
