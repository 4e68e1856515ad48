"""Measures how well metrics stand in for VBench's names: `python eval/studies/vbench_proxies.py`.

Drawn clips of the embedded world are damaged in known ways. Of each, the world's own scores are computed
(`world_scores`), which know what the clip should show, and the metrics that one might take for them where VBench's
networks are missing. The figure is Spearman's rank correlation within a scene, over its damaged clips: whether a metric
orders the damage to one clip as the world does.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from dit_accel_assets import painter, world
from dit_accel_assets.world import Scene
from dit_accel_eval.metrics import Sample, metric, scores
from dit_accel_eval.runs.results import Line
from dit_accel_eval.statistics import clip_mean, rank_correlation
from dit_accel_pipelines.generation.media import Frames
from study import study
from world_scores import WORDS, world_scores

PROXIES: dict[str, tuple[str, ...]] = {
    "temporal_flickering": ("flickering", "warp-error@dis"),
    "motion_smoothness": ("warp-error@dis",),
    "dynamic_degree": ("dynamic@dis", "motion"),
    "imaging_quality": ("sharpness",),
}
"""Dimension -> metrics that one might take for it; for the others there is none without a network of VBench's."""

NAMES = tuple(dict.fromkeys(name for names in PROXIES.values() for name in names))

SEED = 19
"""Of the scenes, which no model was trained on."""

FRAMES, FPS = 17, 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A damaged clip, and what each of its frames shows, drawn without damage to the picture."""

    frames: Frames
    drawn: Frames


Damage = Callable[[Scene, np.random.Generator], Damaged]


def _pictures(change: Callable[[npt.NDArray[np.float64], np.random.Generator], npt.NDArray[np.float64]]) -> Damage:
    """Return a damage to the pictures, float [F, height, width, 3] in 0..255."""

    def damage(scene: Scene, rng: np.random.Generator) -> Damaged:
        drawn = painter.draw(scene, FRAMES)
        changed = change(drawn.astype(np.float64), rng)
        return Damaged(frames=np.rint(np.clip(changed, 0, 255)).astype(np.uint8), drawn=drawn)

    return damage


def _order(places: Callable[[np.random.Generator], Sequence[int]]) -> Damage:
    """Return a damage to the order of frames, which themselves stay whole."""

    def damage(scene: Scene, rng: np.random.Generator) -> Damaged:
        frames = painter.draw(scene, FRAMES)[list(places(rng))]
        return Damaged(frames=frames, drawn=frames)

    return damage


def _recolored(first: int) -> Damage:
    """Return a damage to the first object's colour, from a frame on."""

    def damage(scene: Scene, rng: np.random.Generator) -> Damaged:
        taken = {thing.color for thing in scene.things}
        other = str(rng.choice([color for color in world.COLORS if color not in taken]))
        wrong = [
            replace(thing, color=other) if thing.color == scene.things[0].color else thing for thing in scene.things
        ]
        frames = painter.draw(scene, FRAMES)
        frames[first:] = painter.draw(replace(scene, things=tuple(wrong)), FRAMES)[first:]
        return Damaged(frames=frames, drawn=frames)

    return damage


def _blurred(sigma: float) -> Damage:
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    kernel /= kernel.sum()

    def blur(clip: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
        for axis in (1, 2):
            pad = [(0, 0)] * 4
            pad[axis] = (6, 6)
            wide = np.pad(clip, pad, mode="edge")
            clip = sum(w * np.take(wide, range(k, k + clip.shape[axis]), axis) for k, w in enumerate(kernel))  # type: ignore[assignment]
        return clip

    return _pictures(blur)


def _noisy(sigma: float) -> Damage:
    return _pictures(lambda clip, rng: clip + rng.normal(0, sigma, clip.shape))


def _flickering(share: float) -> Damage:
    return _pictures(lambda clip, rng: clip * (1 + rng.uniform(-share, share, (len(clip), 1, 1, 1))))


def _swapped(rng: np.random.Generator) -> list[int]:
    """Return frames 1 and 2, 5 and 6, and so on in each other's place."""
    return [place + {1: 1, 2: -1}.get(place % 4, 0) if place + 1 < FRAMES else place for place in range(FRAMES)]


DAMAGES: dict[str, Damage] = {
    "none": _order(lambda rng: range(FRAMES)),
    "noise 8": _noisy(8), "noise 24": _noisy(24),
    "blur 1": _blurred(1.0), "blur 2": _blurred(2.0),
    "flicker 5 %": _flickering(0.05), "flicker 15 %": _flickering(0.15),
    "freeze half": _order(lambda rng: [min(place, FRAMES // 2) for place in range(FRAMES)]),
    "freeze": _order(lambda rng: [0] * FRAMES),
    "swapped": _order(_swapped), "shuffled": _order(lambda rng: rng.permutation(FRAMES).tolist()),
    "recoloured half": _recolored(FRAMES // 2), "recoloured": _recolored(0),
}  # fmt: skip
"""Sigma of noise in grey levels, of blur in pixels; the largest change of brightness; the second half, or all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what ``--out`` does not hold yet, one JSON line a clip, and print the tables; returns the exit code."""
    measure = lambda options, lines: measured(options.scenes, lines)  # noqa: E731
    return study(__doc__, arguments, measure, page_text, out="vbench-proxies.jsonl", resumes=True, scenes=8)


def measured(scenes: int, lines: Sequence[Line]) -> Iterator[Line]:
    """Measure the scenes' damaged clips that no line holds; each is a line."""
    there = {(line["scene"], line["damage"]) for line in lines}
    for number in range(scenes):
        scene = world.scene_of(SEED, number, held_out=True)
        for place, (name, damage) in enumerate(DAMAGES.items()):
            if (number, name) in there:
                continue
            clip = damage(scene, np.random.default_rng([SEED, number, place]))
            found = scores(NAMES, Sample(frames=np.divide(clip.frames, 255, dtype=np.float32), fps=FPS))
            yield {
                "scene": number, "damage": name, "frames": FRAMES, "size": [scene.height, scene.width],
                "world": world_scores(clip.frames, scene, clip.drawn), "metrics": found.values(),
                "skipped": found.skipped | found.unavailable,
            }  # fmt: skip


def page_text(lines: Sequence[Line]) -> str:
    """Return the tables with what was measured, for a page; scenes of which damages are missing are left out."""
    counts = {line["scene"]: sum(other["scene"] == line["scene"] for other in lines) for line in lines}
    whole = [line for line in lines if counts[line["scene"]] == len(DAMAGES)]
    scenes = len({line["scene"] for line in whole})
    return (
        f"{scenes} scenes drawn with {FRAMES} frames of 64 x 64 pixels, {len(DAMAGES)} damages each. Spearman's rank "
        "correlation of a metric with the world's score over one scene's clips, turned where less is better: mean over "
        f"scenes, 95 % interval over scenes; scenes in which either is constant say nothing.\n\n{table(whole)}"
    )


def table(lines: Sequence[Line]) -> str:
    """Return two Markdown tables: each proxy's rank correlation, and the world's scores by damage."""
    rows = correlations(lines, "scene")
    damages = [name for name in DAMAGES if any(line["damage"] == name for line in lines)]
    rows += ["", f"| name@world | {' | '.join(damages)} |", f"|---|{'---|' * len(damages)}"]
    for dimension in WORDS:
        cells = [_mean([line["world"].get(dimension) for line in lines if line["damage"] == name]) for name in damages]
        rows.append(f"| {dimension} | {' | '.join(cells)} |")
    return "\n".join(rows)


def by_scene(lines: Iterable[Line], dimension: str, name: str) -> list[float]:
    """Return the rank correlation of a metric with the world's score within each scene; turned where less is better."""
    sign = -1 if metric(name).better == "less" else 1
    kept: dict[int, list[tuple[float, float]]] = {}
    for line in lines:
        if dimension in line["world"] and name in line["metrics"]:
            kept.setdefault(line["scene"], []).append((line["world"][dimension], sign * line["metrics"][name]))
    found = (rank_correlation(*zip(*pairs, strict=True)) for pairs in kept.values() if len(pairs) > 2)
    return [one for one in found if one == one]


def correlations(lines: Sequence[Line], what: str) -> list[str]:
    """Return the rows of a table of each proxy's rank correlation, a mean over scenes, which are called ``what``."""
    rows = [f"| dimension | metric | rank correlation within a {what} | {what}s |", "|---|---|---|---|"]
    for dimension, names in PROXIES.items():
        for name in names:
            found = by_scene(lines, dimension, name)
            both = any(dimension in line["world"] and name in line["metrics"] for line in lines)
            said = str(clip_mean(found)) if found else "constant" if both else "not measured"
            rows.append(f"| {dimension} | `{name}` | {said} | {len(found)} |")
    return rows


def _mean(values: Sequence[float | None]) -> str:
    held = [value for value in values if value is not None]
    return f"{np.mean(held):.2f}" if held else ""


if __name__ == "__main__":
    sys.exit(main())
