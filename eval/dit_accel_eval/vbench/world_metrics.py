"""VBench's names on the embedded world as metrics of suites and reports: ``color@world`` and kin."""

from functools import partial

from ..metrics.metric import Clip, Metric, NotMeasured, Sample
from .scenes import model_scores, scene_of
from .world_scores import MEASURES, WORDS

WORLD = "@world"
"""What the names of these metrics end in."""


def _measure(name: str, sample: Sample) -> float:
    if sample.held_out is None:
        raise NotMeasured("it judges what a held-out prompt of an embedded model asks for, and the clip is of none")
    model, number = sample.held_out
    if scene_of(model, number) is None:
        raise NotMeasured("the prompt asks for a white object, which the world does not know")
    found = _scores(model, number, sample.frames)
    if name not in found:
        raise NotMeasured("the prompt does not ask for it, or nothing shows that could tell")
    return found[name]


_last: list[tuple[Clip, str, int, dict[str, float]]] = []
"""The clip measured last and its scores: all names are read off one clip taken apart once."""


def _scores(model: str, number: int, frames: Clip) -> dict[str, float]:
    if not _last or _last[0][0] is not frames or _last[0][1:3] != (model, number):
        _last[:] = [(frames, model, number, model_scores(model, number, frames))]
    return _last[0][3]


WORLD_METRICS = tuple(
    Metric(
        name=f"{name}{WORLD}",
        words=f"{name.replace('_', ' ')} on the embedded world: {WORDS[name]}",
        better="more",
        bounds=(0.0, 1.0),
        reference=False,
        source="VBench's name and rule (arXiv 2311.17982), by what the held-out prompt of an embedded model asks for",
        measure=partial(_measure, name),
        decimals=2,
    )
    for name in MEASURES
)
"""One for each name that a generated clip can be judged by; imaging quality takes a drawing, aesthetics more."""
